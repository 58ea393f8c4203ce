"""Each command on a real gateway: what it prints, what it does, how it fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from aiida_marketplace_hpc.cli.shell.cluster import Cluster
from aiida_marketplace_hpc.cli.shell.line import LineError
from aiida_marketplace_hpc.cli.shell.session import Leave, Session
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.served import ServedGateway
from tests.cli.shell.conftest import Run

ODD = os.fsdecode(b"odd \xff\n'\"*")


def good(said: object) -> str:
    assert said.status == 0, said  # type: ignore[attr-defined]
    assert said.err == ""  # type: ignore[attr-defined]
    return str(said.text)  # type: ignore[attr-defined]


def fill(home: Path) -> None:
    (home / "b").mkdir()
    (home / "b" / "inner.txt").write_text("inner")
    (home / "a.txt").write_text("a\n" * 10)
    (home / "run.sh").write_text("#!/bin/sh\n")
    (home / "run.sh").chmod(0o755)
    (home / ".hidden").write_text("h")
    (home / "link").symlink_to("b")
    (home / "nowhere").symlink_to("gone")


# ls


def test_ls_lists_a_folder_in_one_request(run: Run, home: Path, served: ServedGateway, session: Session) -> None:
    fill(home)
    assert good(run("ls")) == "a.txt\nb\nlink\nnowhere\nrun.sh\n"
    assert good(run("ls -a")).splitlines()[:2] == [".hidden", "a.txt"]
    assert good(run("ls b; ls link; ls b/ ; ls ./b/../b")) == "inner.txt\n" * 4
    served.stop()
    asked = [line["capability"] for line in served.requests()]
    assert asked.count("query") == 6


def test_ls_in_the_long_form(run: Run, home: Path) -> None:
    fill(home)
    os.utime(home / "a.txt", (999_990_000, 999_990_000))
    os.utime(home / "run.sh", (900_000_000, 900_000_000))
    lines = run("ls -l").lines
    assert lines[0].startswith("-rw-r--r--   20 Sep  ")
    assert lines[0].endswith(" a.txt")
    assert lines[1].startswith("drwx")
    assert lines[2].startswith("lrwx")
    assert lines[2].endswith(" link -> b")
    assert "1998 run.sh" in lines[4]


def test_a_time_that_no_calendar_has_is_shown(run: Run, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = {"type": "file", "mode": 0o100644, "size": 1, "uid": 0, "gid": 0, "atime": 1e15, "mtime": 1e15}
    listed = [{"path": "/x", "name": "x", **attributes}]
    monkeypatch.setattr(HpcGateway, "query", lambda *_: [listed[0], {"entries": listed}])
    assert good(run("ls -l")) == "-rw-r--r-- 1 1000000000000000 x\n"
    monkeypatch.setattr(HpcGateway, "query", lambda *_: listed)
    assert "1000000000000000 seconds" in good(run("stat x"))


def test_ls_orders_and_sizes(run: Run, home: Path) -> None:
    for name, size, when in (("x", 1, 300), ("y", 3_000_000, 100), ("z", 2048, 200)):
        (home / name).write_bytes(b"\0" * size)
        os.utime(home / name, (when, when))
    assert good(run("ls -t")) == "x\nz\ny\n"
    assert good(run("ls -tr")) == "y\nz\nx\n"
    assert good(run("ls -S")) == "y\nz\nx\n"
    assert [line.split()[1] for line in run("ls -lh").lines] == ["1", "2.9M", "2.0K"]


def test_ls_of_several_things(run: Run, home: Path) -> None:
    fill(home)
    said = run("ls b a.txt gone link nowhere")
    assert said.text == "a.txt\nnowhere\n\nb:\ninner.txt\n\nlink:\ninner.txt\n"
    assert said.err == f"ls: No such file or directory: {home}/gone\n"
    assert said.status == 1
    assert good(run("ls -d b link")) == "b\nlink\n"
    assert good(run("ls *.txt ?")) == "a.txt\n\nb:\ninner.txt\n"


def test_ls_on_a_terminal_has_columns_and_no_surprises(
    run: Run, home: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b b", "c" * 20, "日本", "e\x1b[31m"):
        (home / name).write_text("")
    (home / ODD).write_text("")
    (home / "folder").mkdir()
    monkeypatch.setenv("COLUMNS", "44")
    assert good(run("ls")).splitlines() == [
        "a                     folder",
        "'b b'                 'odd \\udcff\\n'\\''\"*'",
        "cccccccccccccccccccc  日本",
        "'e\\x1b[31m'",
    ]
    assert "\x1b" not in run("ls -l").text
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[34m\x1b[1mfolder\x1b[0m" in run("ls").text
    assert run("ls -1").lines[0] == "a"


def test_ls_of_odd_names_into_a_pipe_has_the_names_themselves(run: Run, home: Path) -> None:
    (home / ODD).write_text("x")
    assert run("ls").out == b"odd \xff\n'\"*\n"
    assert good(run("cat odd*")) == "x"


# Going


def test_cd(run: Run, home: Path, session: Session) -> None:
    (home / "a b" / "c").mkdir(parents=True)
    (home / "link").symlink_to("a b/c")
    (home / "file").write_text("")
    assert good(run("pwd")) == f"{home}\n"
    assert good(run("cd 'a b'/c; pwd; cd ..; pwd; cd; pwd")) == f"{home}/a b/c\n{home}/a b\n{home}\n"
    assert good(run("cd a\\ b; cd -; cd -")) == f"{home}\n{home}/a b\n"
    # As in other shells: back to where one came from.
    assert good(run("cd ~/link; pwd; cd ..; pwd")) == f"{home}/link\n{home}\n"
    assert good(run("cd ~; cd ./a*//c/.; pwd; cd ~/'a b'; pwd")) == f"{home}/a b/c\n{home}/a b\n"
    for wrong, message in (
        ("cd gone", "No such file or directory"),
        ("cd ~/file", "Not a directory"),
        ("cd /etc", "outside the roots"),
        ("cd a b", "one folder"),
        ("cd ''", "empty name"),
    ):
        before = session.cluster.folder
        said = run(wrong)
        assert said.status in (1, 2)
        assert message in said.err
        assert session.cluster.folder == before


def test_there_is_no_folder_to_go_back_to_at_first(run: Run) -> None:
    assert "go back to" in run("cd -").err


def test_local_folders(run: Run, here: Path) -> None:
    (here / "x y").mkdir()
    assert good(run("lpwd")) == f"{here}\n"
    assert good(run("lcd x*; lpwd; lcd ..; lpwd")) == f"{here}/x y\n{here}\n"
    assert "No such file" in run("lcd gone").err
    assert good(run("lcd; lpwd")) == os.path.expanduser("~") + "\n"


def test_roots(run: Run, home: Path) -> None:
    assert str(home) in good(run("roots -h"))


def test_help_and_exit(run: Run, session: Session) -> None:
    listed = good(run("help"))
    for name in (
        "ls",
        "cd",
        "pwd",
        "cat",
        "head",
        "tail",
        "less",
        "get",
        "put",
        "rm",
        "mkdir",
        "mv",
        "cp",
        "du",
        "stat",
    ):
        assert f"\n{name} " in f"\n{listed}"
    assert "Usage: ls [OPTIONS] [PATH]..." in good(run("help ls"))
    assert "Usage: tail" in good(run("tail --help"))
    assert run("help nothing").status == 2
    for line, status in (("exit", None), ("quit", None), ("exit 7", 7)):
        with pytest.raises(Leave) as info:
            session.run(line)
        assert info.value.status == status


# Content


def test_cat_prints_the_bytes(run: Run, home: Path) -> None:
    content = os.urandom(3_000_000)
    (home / "big").write_bytes(content)
    (home / "empty").write_bytes(b"")
    assert run("cat big empty big").out == content * 2
    said = run("cat gone empty big")
    assert (said.out, said.status) == (content, 1)
    assert "No such file" in said.err
    assert "Is a directory" in run("cat .").err
    assert run("cat").status == 2


def test_head_and_tail(run: Run, home: Path) -> None:
    (home / "f").write_text("".join(f"{number}\n" for number in range(1, 31)))
    (home / "short").write_text("one\ntwo")
    (home / "empty").write_text("")
    assert run("head f").lines == [str(number) for number in range(1, 11)]
    assert run("tail f").lines == [str(number) for number in range(21, 31)]
    assert run("head -n 2 f; tail -n 2 f; head -3 short; tail -1 short").text == "1\n2\n29\n30\none\ntwotwo"
    assert run("head -c 3 f; tail -c 3 f; tail -n 0 f; head -n0 f").text == "1\n230\n"
    assert run("tail -n 99 short; tail empty; head empty").text == "one\ntwo"
    assert run("tail -n 1 short empty f").text == "==> short <==\ntwo\n==> empty <==\n\n==> f <==\n30\n"
    assert run("head -n x f").status == 2
    assert "Is a directory" in run("tail .").err


def test_the_ends_of_a_large_file_are_read_without_the_rest(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (home / "large").open("wb") as file:
        file.write(b"first\n")
        file.truncate(10 * 1024**3)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    asked: list[tuple[int, int]] = []
    original = Cluster.read

    def counted(self: Cluster, path: str, offset: int, length: int) -> bytes:
        piece = original(self, path, offset, length)
        asked.append((offset, len(piece)))
        return piece

    monkeypatch.setattr(Cluster, "read", counted)
    assert run("head -n 1 large").text == "first\n"
    assert run("tail -n 2 large").text == "last but one\nlast\n"
    assert sum(length for _, length in asked) <= 2 * 64 * 1024


# Changing


def test_mkdir(run: Run, home: Path) -> None:
    good(run("mkdir a 'b c'; mkdir -p a/x/y a"))
    assert (home / "a" / "x" / "y").is_dir()
    assert (home / "b c").is_dir()
    said = run("mkdir a new")
    assert (said.status, (home / "new").is_dir()) == (1, True)
    assert "File exists" in said.err
    assert run("mkdir no/where").status == 1


def test_rm_removes_what_was_named(run: Run, home: Path) -> None:
    fill(home)
    (home / "a*").write_text("")
    (home / "-rf").write_text("")
    good(run("rm 'a*' ./-rf nowhere link"))
    assert run("ls -a").lines == [".hidden", "a.txt", "b", "run.sh"]
    said = run("rm b a.txt")
    assert said.status == 1
    assert "rm -r" in said.err
    assert (home / "b" / "inner.txt").exists()
    assert not (home / "a.txt").exists()
    good(run("rm -r b"))
    assert not (home / "b").exists()
    assert run("rm gone").status == 1
    good(run("rm -f gone"))


def test_rm_of_a_link_leaves_what_it_points_to(run: Run, home: Path) -> None:
    fill(home)
    good(run("rm -rf link/"))
    assert (home / "b" / "inner.txt").exists()
    assert not (home / "link").is_symlink()


@pytest.mark.parametrize("line", ["rm -rf .", "rm -rf ..", "rm -rf b/.", "rm -rf b/..", "rm -rf /", "rm -rf ~"])
def test_rm_never_takes_the_ground_away(run: Run, home: Path, line: str) -> None:
    fill(home)
    assert run(line).status == 1
    assert (home / "b" / "inner.txt").exists()


def test_rm_of_a_pattern_needs_force_where_nobody_can_be_asked(run: Run, home: Path) -> None:
    fill(home)
    said = run("rm *.txt")
    assert said.status == 1
    assert "rm -f" in said.err
    assert (home / "a.txt").exists()
    good(run("rm -f *.txt"))
    assert not (home / "a.txt").exists()
    assert run("rm -f *.txt").status == 1


def test_rm_asks_a_person(run: Run, home: Path, asked: list[str], session: Session) -> None:
    fill(home)
    good(run("rm run.sh"))
    assert asked == []
    good(run("rm -r b"))
    assert asked == ["remove b and all that is in it?"]
    for number in range(7):
        (home / f"f{number}").write_text("")
    (home / "f8").mkdir()
    session.confirm = lambda question: asked.append(question) is not None
    good(run("rm -r f* a.txt"))
    assert asked[1:] == ["remove f0, f1, f2, f3, f4 and 3 more?"]
    assert (home / "f8").is_dir()
    assert not (home / "a.txt").exists()
    good(run("rm -rf f*"))
    assert len(asked) == 2
    assert sorted(path.name for path in home.glob("f*")) == []


def test_mv(run: Run, home: Path) -> None:
    fill(home)
    (home / "other").write_text("o")
    good(run("mv a.txt 'c d'; mv run.sh b; mv 'c d' other b/"))
    assert sorted(os.listdir(home / "b")) == ["c d", "inner.txt", "other", "run.sh"]
    good(run("mv b/ e"))
    assert (home / "e" / "other").exists()
    (home / "other").write_text("kept")
    said = run("mv other e")
    assert "File exists" in said.err
    assert "choose another name" in said.err
    assert (home / "e" / "other").read_text() == "o"
    assert run("mv other e gone").status == 1
    assert run("mv other gone/").status == 1
    assert run("mv other").status == 2
    assert run("mv gone x").status == 1
    assert (home / "other").read_text() == "kept"


def test_cp(run: Run, home: Path) -> None:
    fill(home)
    good(run("cp a.txt x; cp a.txt run.sh b; cp -r b c"))
    assert (home / "x").read_text() == "a\n" * 10
    assert sorted(os.listdir(home / "c")) == ["a.txt", "inner.txt", "run.sh"]
    assert os.access(home / "c" / "run.sh", os.X_OK)
    good(run("cp -r b c"))
    assert (home / "c" / "b" / "inner.txt").exists()
    said = run("cp b a.txt gone c")
    assert said.status == 1
    assert "cp -r" in said.err
    assert "No such file" in said.err
    assert run("cp x y z").status == 1


# Attributes


def test_du(run: Run, home: Path) -> None:
    (home / "t" / "a" / "b").mkdir(parents=True)
    (home / "t" / "one").write_bytes(b"x" * 1000)
    (home / "t" / "a" / "two").write_bytes(b"x" * 200)
    (home / "t" / "a" / "b" / "three").write_bytes(b"x" * 30)
    (home / "t" / "link").symlink_to("one")
    assert good(run("du t")) == "30\tt/a/b\n230\tt/a\n1230\tt\n"
    assert good(run("du -sh t t/one; cd t; du -s")) == "1.2K\tt\n1000\tt/one\n1230\t.\n"
    assert run("du gone").status == 1


def test_stat(run: Run, home: Path) -> None:
    fill(home)
    shown = dict(line.split(":", 1) for line in good(run("stat run.sh")).splitlines())
    assert shown["Size"].strip() == "10 bytes"
    assert shown["Mode"].strip() == "0755 -rwxr-xr-x"
    assert shown["Type"].strip() == "regular file"
    assert shown["Path"].strip() == f"{home}/run.sh"
    assert "link -> b" in good(run("stat link"))
    assert "folder" in good(run("stat -L link"))
    assert run("stat gone run.sh").status == 1


# Moving


def test_get(run: Run, home: Path, here: Path) -> None:
    fill(home)
    assert good(run("get a.txt")) == "a.txt\n"
    assert (here / "a.txt").read_text() == "a\n" * 10
    good(run("get b; get a.txt renamed; get b copy; cd b; get inner.txt .. ; cd .."))
    assert (here / "b" / "inner.txt").exists()
    assert (here / "renamed").exists()
    assert (here / "copy" / "inner.txt").exists()
    assert (here.parent / "inner.txt").exists()
    (here / "into").mkdir()
    good(run("get *.txt *.sh into"))
    assert sorted(os.listdir(here / "into")) == ["a.txt", "run.sh"]
    good(run("cd b; get . into"))
    assert (here / "into" / "b" / "inner.txt").exists()


def test_get_says_what_is_wrong(run: Run, home: Path, here: Path) -> None:
    fill(home)
    said = run("get gone a.txt .")
    assert said.status == 1
    assert "No such file" in said.err
    assert (here / "a.txt").exists()
    assert "no folder on this machine" in run("get a.txt run.sh gone").err
    assert "nothing matches" in run("get *.gone").err
    (here / "a.txt").write_text("mine")
    said = run("get -n a.txt")
    assert said.status == 1
    assert (here / "a.txt").read_text() == "mine"
    good(run("get a.txt"))
    assert (here / "a.txt").read_text() == "a\n" * 10
    assert run("get a.txt no/where/x").status == 1


def test_put(run: Run, home: Path, here: Path) -> None:
    (here / "tree" / "sub").mkdir(parents=True)
    (here / "tree" / "sub" / "f").write_text("f")
    (here / "a b.txt").write_text("ab")
    (here / "run.sh").write_text("#!/bin/sh\n")
    (here / "run.sh").chmod(0o750)
    assert good(run("put 'a b.txt'")) == f"{home}/a b.txt\n"
    good(run("put run.sh other.sh; put tree; put tree renamed; mkdir into; put *.txt *.sh into; put tree into/"))
    assert stat.S_IMODE((home / "other.sh").stat().st_mode) == 0o750
    assert (home / "tree" / "sub" / "f").exists()
    assert (home / "renamed" / "sub" / "f").exists()
    assert sorted(os.listdir(home / "into")) == ["a b.txt", "run.sh", "tree"]
    good(run("lcd tree; put . in-home; put .; put sub/f"))
    assert (home / "in-home" / "sub" / "f").exists()
    assert (home / "f").exists()


def test_put_says_what_is_wrong(run: Run, home: Path, here: Path) -> None:
    (here / "a").write_text("a")
    (home / "a").write_text("theirs")
    said = run("put gone a .")
    assert said.status == 1
    assert "gone: No such file" in said.err
    assert (home / "a").read_text() == "a"
    (home / "a").write_text("theirs")
    assert "File exists" in run("put -n a").err
    assert (home / "a").read_text() == "theirs"
    assert "no folder on the cluster" in run("put a a gone").err
    assert "no folder on the cluster" in run("put a gone/").err
    assert "nothing matches" in run("put *.gone").err


def test_what_a_live_job_needs_is_changed_only_with_a_word_of_its_own(
    run: Run, home: Path, here: Path, gateway: HpcGateway
) -> None:
    fill(home)
    (home / "b" / "run.sh").write_text("#!/bin/sh\n")
    gateway.submit(str(home / "b"), "run.sh")
    (here / "run.sh").write_text("#!/bin/sh\necho mine\n")
    for line in ("rm -rf b", "rm -f b/run.sh", "mv b c", "cp run.sh b", "cp a.txt b/run.sh", "put run.sh b"):
        said = run(line)
        assert said.status == 1, line
        assert "is protected" in said.err, line
        if not line.startswith("put"):
            assert "--live" in said.err, line
        assert (home / "b" / "run.sh").read_text() == "#!/bin/sh\n", line
    good(run("put --live run.sh b"))
    assert (home / "b" / "run.sh").read_text() == "#!/bin/sh\necho mine\n"
    good(run("cp --live a.txt b/run.sh; mv --live b c; mv c b; rm -r --live b"))
    assert not (home / "b").exists()


def test_a_person_sees_progress(
    run: Run, home: Path, here: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: list[int | None] = []

    class Bar:
        def __init__(self, total: int | None = None, **options: object) -> None:
            totals.append(total)
            self.moved = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *details: object) -> None:
            totals.append(self.moved)

        def update(self, count: int) -> None:
            self.moved += count

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("tqdm.tqdm", Bar)
    fill(home)
    run("get a.txt; get b; get run.sh x")
    assert totals == [20, 20, 5, 5, 10, 10]
    totals.clear()
    run("put a.txt c")
    assert totals == [20, 20]


# Lines


def test_a_command_that_fails_does_not_end_the_line(run: Run, home: Path) -> None:
    said = run("cat gone; pwd && nothing && pwd; cd gone && rm -rf *")
    assert said.text == f"{home}\n"
    assert said.err.splitlines()[1].startswith("nothing: no such command")
    assert "cd: No such file" in said.err
    assert said.status == 1


def test_a_line_that_cannot_be_understood_does_nothing(run: Run, home: Path, session: Session) -> None:
    with pytest.raises(LineError, match="no pipes"):
        session.run("mkdir a; cat b | grep c")
    assert not (home / "a").exists()


def test_a_wrong_option_says_where_the_help_is(run: Run) -> None:
    said = run("ls --wrong")
    assert said.status == 2
    assert "(help ls)" in said.err


def test_a_pattern_above_the_folder(run: Run, home: Path) -> None:
    fill(home)
    assert good(run("cd b; ls ../*.txt")) == f"{home}/a.txt\n"
    assert good(run("ls ~/*.txt; cd ..")) == f"{home}/a.txt\n"
    assert "nothing matches" in run("ls *.gone").err


def test_no_connection_is_an_error_of_the_command(run: Run, served: ServedGateway, session: Session) -> None:
    served.stop()
    said = run("ls")
    assert said.status == 3
    assert said.err.startswith("ls: ")
