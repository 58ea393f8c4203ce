"""The directives of a job script are read as sbatch reads them."""

from __future__ import annotations

import pytest

from aiida_marketplace_hpc.directives import DirectiveError, parse_directives, parse_duration

AIIDA_SCRIPT = b"""\
#!/bin/bash
#SBATCH --no-requeue
#SBATCH --job-name="aiida-42"
#SBATCH --get-user-env
#SBATCH --output=_scheduler-stdout.txt
#SBATCH --error=_scheduler-stderr.txt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --time=01:30:00

#SBATCH -p debug
'mpirun' '-np' '2' 'pw.x' > 'aiida.out'
#SBATCH --partition=not-read-any-more
"""


def options(*lines: str) -> dict[str, str]:
    return dict(parse_directives(("#!/bin/sh\n" + "\n".join(lines) + "\n").encode()).options)


def test_reads_what_aiida_writes() -> None:
    directives = parse_directives(AIIDA_SCRIPT)
    assert directives.options == {
        "no-requeue": "",
        "job-name": "aiida-42",
        "get-user-env": "",
        "output": "_scheduler-stdout.txt",
        "error": "_scheduler-stderr.txt",
        "nodes": "1",
        "ntasks-per-node": "2",
        "time": "01:30:00",
        "partition": "debug",
    }
    assert directives.time_limit == 5400


def test_keeps_the_comment_lines_of_the_header_verbatim() -> None:
    script = b"#!/bin/sh\n# a remark\n#SBATCH  -n 1 # \xff\n\n  #SBATCH -n 2\n#DW jobdw\n \t\n#PBS -q x\ntrue\n#SBATCH -n 3\n"
    directives = parse_directives(script)
    assert directives.lines == (b"# a remark", b"#SBATCH  -n 1 # \xff", b"  #SBATCH -n 2", b"#DW jobdw", b"#PBS -q x")
    assert directives.options == {"ntasks": "1"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["#SBATCH --time=5"], {"time": "5"}),
        (["#SBATCH --time 5"], {"time": "5"}),
        (["#SBATCH -t 5"], {"time": "5"}),
        (["#SBATCH -t5"], {"time": "5"}),
        (["#SBATCH --exclusive -N2"], {"exclusive": "", "nodes": "2"}),
        (["#SBATCH --exclusive=user"], {"exclusive": "user"}),
        (["#SBATCH -Hn4"], {"hold": "", "ntasks": "4"}),
        (["#SBATCH --job-n=x"], {"job-name": "x"}),
        (["#SBATCH --tasks-per-node=3"], {"ntasks-per-node": "3"}),
        (["#SBATCH -J first", "#SBATCH --job-name=last"], {"job-name": "last"}),
        (["#SBATCH --job-name", "#SBATCH next-line"], {"job-name": "next-line"}),
        (["#SBATCH --comment='a \"b\" # c' # remark"], {"comment": 'a "b" # c'}),
        (['#SBATCH --comment=a"b c"d'], {"comment": "ab cd"}),
        ([r"#SBATCH --comment=a\"b\#c"], {"comment": 'a"b#c'}),
        (["#SBATCH --comment=a#b -n 1"], {"comment": "a"}),
        (["#SBATCH --comment="], {"comment": ""}),
        (["#SBATCH-n1"], {"ntasks": "1"}),
        (["#SLURM -n1"], {"ntasks": "1"}),
        (["# SBATCH -n1"], {}),
        (["#sbatch -n1"], {}),
        (["#SBATCH\t-n\t1\t"], {"ntasks": "1"}),
        (["#SBATCH --from-the-future value -n1"], {"from-the-future": "value", "ntasks": "1"}),
        (["#SBATCH --mem-per=1"], {"mem-per": "1"}),
    ],
)
def test_reads_options_in_all_their_forms(lines: list[str], expected: dict[str, str]) -> None:
    assert options(*lines) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('#SBATCH --comment="open', 'line 2: Unmatched `"` in'),
        ("#SBATCH : -n1", "line 2: Unexpected `:` in"),
        ("#SBATCH word", "Invalid directive found in batch script: word"),
        ("#SBATCH -n1 -- word", "Invalid directive found in batch script: word"),
        ("#SBATCH -Y", "invalid option -- 'Y'"),
        ("#SBATCH -J", "option requires an argument -- 'J'"),
        ("#SBATCH --time", "option '--time' requires an argument"),
    ],
)
def test_refuses_what_sbatch_refuses(line: str, message: str) -> None:
    with pytest.raises(DirectiveError) as error:
        options(line)
    assert str(error.value).startswith(message)


def test_further_components_of_a_heterogeneous_job_are_not_mixed_up_with_the_first() -> None:
    directives = parse_directives(b"#!/bin/sh\n#SBATCH -n1\n#SBATCH hetjob\n#SBATCH -n2\ntrue\n")
    assert directives.heterogeneous
    assert directives.options == {"ntasks": "1"}
    assert len(directives.lines) == 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("0:02", 2),
        ("01:02:03", 3723),
        ("100:00:00", 360000),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-01:01:01", 90061),
        (" 5 ", 300),
        ("0", 0),
        ("UNLIMITED", None),
        ("infinite", None),
        ("-1", None),
    ],
)
def test_reads_durations(text: str, seconds: int | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:", ":1", "1:2:3:4", "1-2:3:4:5", "-", "1.5", "N/A", "INVALID"])
def test_refuses_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("line", "limit"), [("", None), ("#SBATCH -t0", None), ("#SBATCH -tUNLIMITED", None), ("#SBATCH -t0:7", 7)]
)
def test_knows_the_time_limit(line: str, limit: int | None) -> None:
    assert parse_directives(f"#!/bin/sh\n{line}\n".encode()).time_limit == limit


def test_refuses_a_time_limit_that_is_none() -> None:
    with pytest.raises(DirectiveError, match="Invalid --time specification"):
        _ = parse_directives(b"#!/bin/sh\n#SBATCH -t soon\n").time_limit
