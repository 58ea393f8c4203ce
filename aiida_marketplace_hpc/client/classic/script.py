"""The script that a classic gateway submits for AiiDA: the template is ``job.sh`` beside this file."""

from __future__ import annotations

import base64
import posixpath
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources

from aiida_marketplace_hpc.client.classic.journal import Node
from aiida_marketplace_hpc.client.classic.names import piece_name
from aiida_marketplace_hpc.client.classic.tree import Piece, Pieces
from aiida_marketplace_hpc.directives import Directives, parse_directives

_INTERPRETER = re.compile(rb"#![ \t]*([^ \t\n]*)[ \t]*([^\n]*)")
_APPEND = b"#SBATCH --open-mode=append"
"""A second copy must not wipe out what the first one wrote; a line of the user's own comes after it and wins."""
_LINE = 76
_MARK = "MPHPC-END-OF-CONTENT"


@dataclass(frozen=True)
class Plan:
    """What a job script is to do.

    Small files are in the script itself, or in the pack.

    :param folder: the virtual path of the working directory.
    :param script: the name of AiiDA's script in it, and its bytes.
    :param nodes: what the folder is made of, in order.
    :param pack: the bytes of all small files, one after the other, as they were uploaded.
    :param kept: pieces that are needed by others, too, and so stay.
    :param retrieved: paths and patterns, relative to the folder, of what AiiDA will ask for.
    :param beat: seconds between two heartbeats.
    :param piece: bytes of the largest file that the gateway hands out.
    """

    folder: str
    script: str
    script_text: bytes
    nodes: tuple[Node, ...]
    pack: Pieces | None = None
    kept: frozenset[Piece] = frozenset()
    retrieved: tuple[str, ...] = ()
    beat: float = 30.0
    piece: int = 5 * 1024 * 1024


def make_script(plan: Plan) -> bytes:
    """Write the job script of a plan.

    :raises DirectiveError: sbatch would refuse the ``#SBATCH`` lines of AiiDA's script.
    """
    directives = parse_directives(plan.script_text)
    header = (_APPEND, *directives.lines)
    fields = {
        b"SCRIPT": shlex.quote(plan.script.replace("\n", " ")).encode("utf-8", "surrogateescape"),
        b"HEADER": b"\n".join(header),
        b"BEAT": f"{plan.beat:g}".encode(),
        b"LIMIT": str(directives.time_limit or "").encode(),
        b"PIECE": str(plan.piece).encode(),
        b"RETRIEVED": _encoded(" ".join(_pattern(path) for path in _retrieved(plan, directives))),
        b"FOLDER": _encoded("\n".join(_folder(plan))),
        b"COMMAND": _encoded(" ".join(shlex.quote(word) for word in _command(plan))),
    }
    template = resources.files(__package__).joinpath("job.sh").read_bytes()
    return re.sub(rb"@([A-Z]+)@", lambda match: fields[match[1]], template)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _command(plan: Plan) -> list[str]:
    """Run AiiDA's script as the kernel would: its interpreter, at most one argument, its path."""
    match = _INTERPRETER.match(plan.script_text)
    interpreter, argument = ("", "") if match is None else (_text(match[1]), _text(match[2]).rstrip(" \t\r"))
    if not interpreter:
        interpreter = "/bin/sh"
    return [interpreter, *([argument] if argument else []), f"./{plan.script}"]


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _retrieved(plan: Plan, directives: Directives) -> Iterator[str]:
    yield from plan.retrieved
    for option in ("output", "error"):
        name = directives.options.get(option, "")
        # One with a placeholder of Slurm's is found in the listing, like everything else.
        if name and "%" not in name and "\\" not in name:
            yield name


def _pattern(path: str) -> str:
    """Write a path or pattern so that bash expands it as AiiDA does, and nothing else in it."""
    quoted = re.sub(r"[^A-Za-z0-9_./*?\[\]!^-]", lambda match: _quoted(match[0]), path)
    return f"./{quoted}"


def _quoted(character: str) -> str:
    return "$'\\n'" if character == "\n" else f"\\{character}"


def _folder(plan: Plan) -> Iterator[str]:
    """The lines that make the folder."""
    modes: list[tuple[str, int]] = []
    offset = 0
    if plan.pack is not None:
        names = " ".join(piece_name(piece.digest) for piece in plan.pack.pieces)
        yield f"mphpc_pack {plan.pack.digest} {names}"
    # A piece that several files share is still needed after the first of them.
    last = {
        piece: node.path
        for node in plan.nodes
        if isinstance(node.content, Pieces)
        for piece in node.content.pieces
        if piece not in plan.kept
    }
    for node in plan.nodes:
        below = node.path[len(plan.folder) + 1 :]
        if not below:
            continue
        path = shlex.quote(below)
        if node.kind == "directory":
            yield f"mphpc_dir {path}"
            if node.mode is not None:
                modes.append((below, node.mode))
        elif node.kind == "file":
            yield from _file(node, path, None if plan.pack is None else offset)
            offset += len(node.data or b"")
            if isinstance(node.content, Pieces):
                spent = [piece_name(p.digest) for p in dict.fromkeys(node.content.pieces) if last.get(p) == node.path]
                if spent:
                    yield f"rm -f -- {' '.join(spent)}"
        elif node.kind == "symlink":
            yield f"mphpc_link {_target(plan, node)} {path}"
        elif node.kind == "links":
            yield f"mphpc_links {shlex.quote(posixpath.dirname(below) or '.')} {_glob(node.source)}"
        elif node.kind == "copies":
            how = "-L" if node.follow else "-P"
            yield f"mphpc_into {how} {shlex.quote(posixpath.dirname(below) or '.')} {_glob(node.source)}"
        elif node.kind == "copy":
            how = "-L" if node.follow else "-P"
            yield f"mphpc_copy {how} {'yes' if node.origin else shlex.quote('')} {shlex.quote(node.source)} {path}"
            if node.mode is not None:
                modes.append((below, node.mode))
    if plan.pack is not None:
        yield "rm -f mphpc-pack"
    for below, mode in reversed(modes):
        yield f"mphpc_mode {shlex.quote(below)} {mode:04o}"


def _file(node: Node, path: str, offset: int | None) -> Iterator[str]:
    mode = shlex.quote("" if node.mode is None else f"{node.mode:04o}")
    if isinstance(node.content, Pieces):
        pieces = [piece_name(piece.digest) for piece in node.content.pieces]
        yield f"mphpc_join {path} {mode} {node.content.digest} {' '.join(pieces) or '/dev/null'}"
        return
    data = node.data or b""
    if offset is not None:
        yield f"mphpc_unpack {path} {mode} {offset} {len(data)}"
        return
    text = base64.b64encode(data).decode()
    yield f"mphpc_text {path} {mode} <<'{_MARK}'"
    yield from (text[start : start + _LINE] for start in range(0, len(text), _LINE))
    yield _MARK


def _target(plan: Plan, node: Node) -> str:
    """Where a link points, on the cluster's own disk."""
    if node.origin == plan.folder or node.origin.startswith(f"{plan.folder}/"):
        return f'"$mphpc_here"{shlex.quote(node.origin[len(plan.folder) :])}'
    return shlex.quote(node.source)


def _glob(source: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./*?\[\]!^-]", lambda match: _quoted(match[0]), source)


def all_pieces(nodes: Iterable[Node]) -> set[Piece]:
    """The pieces that files consist of."""
    return {piece for node in nodes if isinstance(node.content, Pieces) for piece in node.content.pieces}
