"""Tables that are made from the code when the pages are built, and a role that checks what the pages say about files.

Whatever a page says about the wire, the settings or the states comes from the table in the code itself, so that it cannot
drift from it. Where a page adds words of its own (the meaning of a job's fields), the build fails when one is missing or
left over.

The role ``repo`` names a file of the repository, ``{repo}`path``` or ``{repo}`path::name```; it warns when there is no such
file, or no function, class or constant of that name in it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

ROOT = Path(__file__).parents[2]
PACKAGE = "aiida_marketplace_hpc"
logger = logging.getLogger(__name__)


# --- text ------------------------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """A docstring's reStructuredText, as far as ours use it, as Markdown on one line."""
    text = re.sub(r":[a-z]+(?::[a-z]+)?:`~?(?:[\w.]*\.)?([\w]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, as Markdown."""
    return markdown((text or "").strip().partition("\n\n")[0])


def attribute_docs(module: str) -> dict[tuple[str, str], str]:
    """What stands below each attribute of a module, by class and name."""
    found = ModuleAnalyzer.for_module(module).find_attr_docs()
    return {key: markdown(" ".join(lines)) for key, lines in found.items()}


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def code(text: object) -> str:
    """Literal text, or nothing for an empty one."""
    return f"`{text}`" if str(text) else ""


def yes(value: bool) -> str:
    return "yes" if value else ""


# --- tables ----------------------------------------------------------------------------------------------------------


class FromCode(SphinxDirective):
    """A directive that makes Markdown."""

    has_content = False

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        try:
            text = self.lines()
        except ValueError as exc:
            raise self.error(str(exc)) from exc
        container = nodes.container()
        self.state.nested_parse(StringList(text, self.get_location()), self.content_offset, container)
        return container.children


class Capabilities(FromCode):
    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import CAPABILITIES

        def kind(row: Any) -> str:
            if not row.registered:
                return "added, direct only"
            return "published" if row.published else "added"

        def notes(row: Any) -> str:
            bodies = {"json": "The body is a JSON object.", "file": "The body is the file."}
            said = [f"{row.summary}.", bodies.get(row.body, "")]
            said += [] if row.authenticated else ["Needs no token."]
            said += [] if row.repeatable else ["Not repeated by a client that does not know whether it arrived."]
            return " ".join(filter(None, said))

        rows = [[code(row.name), code(f"{row.method} {row.path}"), kind(row), notes(row)] for row in CAPABILITIES]
        return table(["Capability", "Request", "", "What it does"], rows)


class Parameters(FromCode):
    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import CAPABILITIES

        lines = []
        for row in CAPABILITIES:
            if not row.parameters:
                continue
            lines += [code(row.name)]
            for number, parameter in enumerate(row.parameters):
                facts = [parameter.where, parameter.type]
                facts += ["required"] if parameter.required else []
                facts += [] if parameter.published else ["added"]
                item = f"- {code(parameter.name)} ({', '.join(facts)}): {parameter.description}."
                lines.append(f": {item}" if number == 0 else f"  {item}")
            lines.append("")
        return lines


class CreateFields(FromCode):
    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import CREATE_FIELDS_ADDED, CREATE_FIELDS_PUBLISHED

        added = attribute_docs(f"{PACKAGE}.protocol")["", "CREATE_FIELDS_ADDED"]
        return [
            f"Published: {', '.join(map(code, CREATE_FIELDS_PUBLISHED))}.",
            "",
            f"Added: {', '.join(map(code, CREATE_FIELDS_ADDED))}. {added}",
        ]


class Operations(FromCode):
    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import OPERATIONS

        return table(
            ["Operation", "Needs", "May have", "What it does", "Repeatable"],
            [
                [
                    code(row.name),
                    ", ".join(map(code, row.required)),
                    ", ".join(map(code, row.optional)),
                    row.summary,
                    yes(row.repeatable),
                ]
                for row in OPERATIONS.values()
            ],
        )


class Limits(FromCode):
    """The limits of a gateway, as `getInfo` announces them, and some that it does not."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.bundle import PART
        from aiida_marketplace_hpc.gateway import config, submission
        from aiida_marketplace_hpc.protocol import MAX_JOBIDS, MAX_OPERATIONS

        def default(name: str) -> str:
            return f"{int(config.Settings.model_fields[name].default):,}"

        return table(
            ["Limit", "In `getInfo`", "Value"],
            [
                ["operations in one `query`", "`operations`", f"{MAX_OPERATIONS:,}"],
                ["ids in one `jobs.states`", "`jobids`", f"{MAX_JOBIDS:,}"],
                ["a job script", "`script`", f"{submission.MAX_SCRIPT:,} bytes"],
                ["a JSON body", "`json`", f"{config.MAX_JSON:,} bytes"],
                ["a part of a file in a bundle", "`part`", f"{PART:,} bytes"],
                ["the body of a request", "`request`", f"{default('request_limit')} MiB, unless set otherwise"],
                ["an upload in the published form", "`form`", f"{default('form_limit')} MiB, unless set otherwise"],
                [
                    "requests of a user under way",
                    "`requests_at_once`",
                    f"{default('requests_at_once')}, unless set otherwise",
                ],
                [
                    "requests of a user in a second",
                    "`requests_per_second`",
                    f"{default('requests_per_second')}, unless set otherwise",
                ],
                ["jobs of a user that have not ended", "`jobs`", f"{default('jobs_per_user')}, unless set otherwise"],
                [
                    "what comes out of one archive",
                    "",
                    f"{default('archive_members')} members, {default('archive_size')} GiB, unless set otherwise",
                ],
            ],
        )


class InfoFields(FromCode):
    """The fields of the answer of `getInfo`."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import INFO_FIELDS

        return table(["Field", "What it says"], [[code(name), text] for name, text in INFO_FIELDS.items()])


class EnvelopeFields(FromCode):
    """What stands in the envelope."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import ENVELOPE_FIELDS

        return table(["Field", "What it is"], [[code(name), text] for name, text in ENVELOPE_FIELDS.items()])


class States(FromCode):
    def lines(self) -> list[str]:
        from aiida_marketplace_hpc import scheduler
        from aiida_marketplace_hpc.gateway.backends.slurm_states import STATES
        from aiida_marketplace_hpc.protocol import JobState

        docs = attribute_docs(f"{PACKAGE}.protocol")
        rows = []
        for state in JobState:
            in_aiida = "DONE" if state.final else scheduler._STATES[state].name
            in_slurm = ", ".join(code(name) for name, meaning in STATES.items() if meaning is state)
            text = docs.get(("JobState", state.name), "")
            rows.append([code(state.value), yes(state.final), code(in_aiida), in_slurm, text])
        return table(["State", "Ended", "In AiiDA", "In Slurm", ""], rows)


class Errors(FromCode):
    def lines(self) -> list[str]:
        from aiida_marketplace_hpc import errors

        def below(cls: type[Any]) -> list[type[Any]]:
            return [cls, *(found for child in cls.__subclasses__() for found in below(child))]

        rows = []
        for cls in below(errors.MarketplaceHpcError)[1:]:
            if cls is errors.GatewayError:
                continue
            answered = issubclass(cls, errors.GatewayError)
            rows.append(
                [
                    code(cls.code),
                    cls.status if answered else "",
                    yes(cls.retryable),
                    code(cls.__name__),
                    paragraph(cls.__doc__),
                ]
            )
        return table(["Code", "Status", "Retryable", "Class", "Meaning"], rows)


class Fields(FromCode):
    """The fields of a job; the body says each field's meaning, ``name: text``."""

    has_content = True

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.protocol import JOB_FIELDS

        said: dict[str, str] = {}
        for line in "\n".join(self.content).split("\n"):
            name, separator, text = line.partition(": ")
            if separator:
                said[name.strip()] = text.strip()
        missing = [name for name in JOB_FIELDS if name not in said]
        left_over = [name for name in said if name not in JOB_FIELDS]
        if missing or left_over:
            raise ValueError(f"job fields without a meaning: {missing}; meanings without a field: {left_over}")
        return table(["Field", "Meaning"], [[code(name), said[name]] for name in JOB_FIELDS])


class Settings(FromCode):
    """The gateway's settings with the help of the flags that set them."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.cli.gateway import serve
        from aiida_marketplace_hpc.gateway.config import Settings

        flags = {option.name: option for option in serve.params}
        only_flags = {"config", "reload"}
        no_flags = {
            "registration",
            "policy",
            "page_client_secret",
            "firecrest_client_secret",
            "firecrest_token",
        }  # The page says of these what there is to say.
        fields = {name: field for name, field in Settings.model_fields.items() if name not in no_flags}
        if set(flags) - only_flags != set(fields):
            raise ValueError(f"flags and settings differ: {set(flags) ^ set(fields) ^ only_flags}")
        prefix = Settings.model_config["env_prefix"]
        lines = []
        for name, field in fields.items():
            help, default = _help(flags[name])
            if not default and field.default not in ("", (), None) and field.default_factory is None:
                default = code(str(field.default).lower() if isinstance(field.default, bool) else field.default)
            facts = [f"{_type(name, field.annotation).capitalize()}.", f"Default: {default}." if default else ""]
            facts.append(f"Environment: {code(prefix + name.upper())}. Key in the file: {code(name)}.")
            lines += [code(flags[name].opts[0]), f": {help} {' '.join(filter(None, facts))}", ""]
        return lines


class Policy(FromCode):
    """The keys of a site's policy, with what the code says about each."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.gateway.policy import Policy

        docs = attribute_docs(Policy.__module__)
        return table(["Key", "Meaning"], [[code(name), docs["Policy", name]] for name in Policy.model_fields])


class RelaySettings(FromCode):
    """The relay's settings with what the code says about each."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.cli.relay import relay
        from aiida_marketplace_hpc.gateway.relay_config import RelaySettings

        flags = {option.name: option.opts[0] for option in relay.params}
        secret = {"broker", "client_secret"}
        if set(flags) - {"config"} != set(RelaySettings.model_fields) - secret:
            raise ValueError(f"flags and settings of the relay differ: {sorted(flags)}")
        analyzer = ModuleAnalyzer.for_module(RelaySettings.__module__)
        analyzer.analyze()
        prefix = RelaySettings.model_config["env_prefix"]
        rows = []
        for name, field in RelaySettings.model_fields.items():
            meaning = paragraph("\n".join(analyzer.attr_docs["RelaySettings", name]))
            default = "" if name in secret or field.default in ("", None) else code(str(field.default).lower())
            rows.append([code(name), code(flags[name]) if name in flags else "none", meaning, default])
        return [
            *table(["Setting", "Flag", "Meaning", "Default"], rows),
            "",
            f"In the environment: {code(prefix)} and the name in capitals.",
        ]


def _help(option: Any) -> tuple[str, str]:
    """A flag's help, and the default that it names."""
    help, _, default = (option.help or "").replace("{username}", "`{username}`").partition("  [default: ")
    return help, default.rstrip("]")


def _type(name: str, annotation: Any) -> str:
    from typing import Literal, get_args, get_origin

    parts = [part for part in get_args(annotation) if part is not type(None)]
    if len(parts) == 1 and get_origin(parts[0]) is Literal:  # or None
        annotation = parts[0]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(code(value) for value in get_args(annotation))
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    words = {
        "bool": "true or false",
        "int": "integer",
        "float": "number",
        "str": "text",
        "Path": "path",
        "pathlib.Path | None": "path",
        "dict[str, str]": "table of texts",
        "tuple[str, ...]": "list of texts",
    }
    if text not in words:
        raise ValueError(f"the setting {name} is of a type that has no word yet: {text}")
    return words[text]


class AuthParameters(FromCode):
    """What `verdi computer configure marketplace_hpc` asks for."""

    def lines(self) -> list[str]:
        from aiida_marketplace_hpc.transport import MarketplaceHpcTransport as Transport

        rows = []
        for options, asked in ((Transport._valid_auth_options, True), (Transport._common_auth_options, False)):
            for name, option in options:
                if option.get("hidden"):
                    continue
                default = option.get("default", "")
                rows.append(
                    [
                        code(name),
                        code(str(default)) if asked else code(option["callback"](None, None, None)),
                        yes(asked),
                        option.get("help", ""),
                    ]
                )
        return table(["Parameter", "Default", "Asked for", "Meaning"], rows)


class Fixtures(FromCode):
    """The pytest fixtures of a module, read without importing it."""

    required_arguments = 1

    def lines(self) -> list[str]:
        tree = ast.parse((ROOT / self.arguments[0]).read_text(encoding="utf-8"))
        rows = []
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (scope := _fixture_scope(node)):
                rows.append([code(node.name), scope, paragraph(ast.get_docstring(node))])
        return table(["Fixture", "Lasts for", "What it is"], rows)


def _fixture_scope(node: ast.FunctionDef) -> str | None:
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else None
        if ast.unparse(call.func if call else decorator) == "pytest.fixture":
            scopes = [ast.literal_eval(word.value) for word in call.keywords if word.arg == "scope"] if call else []
            return f"a {scopes[0] if scopes else 'test'}".replace("a session", "the session")
    return None


# --- references to files ---------------------------------------------------------------------------------------------


class RepositoryPath(SphinxRole):
    """A file of the repository, or something in it, that is there."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        path, _, name = self.text.partition("::")
        place = ROOT / path
        if not place.exists():
            logger.warning("there is no %s in the repository", path, location=self.get_location())
        elif name and name not in _names_in(place):
            logger.warning("there is no %s in %s", name, path, location=self.get_location())
        shown = f"{path}::{name}" if name else path
        return [nodes.literal(self.rawtext, shown)], []


def _names_in(place: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(place.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


# --- the command line ------------------------------------------------------------------------------------------------


def plain_help(_: Sphinx, __: Any, lines: list[str]) -> None:
    """Help texts are plain text: what reStructuredText would read as markup is literal."""
    for number, line in enumerate(lines):
        line = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line)
        lines[number] = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", line)


def plain_options(_: Sphinx, __: Any, lines: list[str]) -> None:
    """What sphinx-click makes of defaults and of names with brackets."""
    for number, line in enumerate(lines):
        line = re.sub(r"PosixPath\('([^']*)'\)", r"\1", line)
        lines[number] = re.sub(r"(\[[^\]>]*)>$", r"\1]>", line)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register directives and the role."""
    for name, directive in {
        "capability-table": Capabilities,
        "parameter-table": Parameters,
        "create-fields": CreateFields,
        "operation-table": Operations,
        "limit-table": Limits,
        "info-fields": InfoFields,
        "envelope-fields": EnvelopeFields,
        "job-states": States,
        "job-fields": Fields,
        "error-table": Errors,
        "setting-table": Settings,
        "policy-table": Policy,
        "relay-setting-table": RelaySettings,
        "auth-parameters": AuthParameters,
        "fixture-table": Fixtures,
    }.items():
        app.add_directive(name, directive)
    app.connect("sphinx-click-process-description", plain_help)
    app.connect("sphinx-click-process-options", plain_options)
    app.add_role("repo", RepositoryPath())
    return {"version": "1", "parallel_read_safe": True}
