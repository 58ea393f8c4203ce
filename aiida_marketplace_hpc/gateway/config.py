"""The gateway's settings: from flags, environment and file, in this order of precedence, checked before anything starts."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.directives import parse_duration
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.databases import parse_url
from aiida_marketplace_hpc.gateway.log import LogFormat, LogLevel
from aiida_marketplace_hpc.gateway.origins import Published, PublishedNames, origin, variable_of
from aiida_marketplace_hpc.gateway.policy import SLURM_WORD, Policy

MIB = 1024 * 1024
GIB = 1024 * MIB
MAX_JSON = 16 * MIB
"""Bytes of a JSON body."""
HOME = "home"
"""The name of the root that ``--home`` makes."""
_ROOT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,19}")  # Shorter than a job id, so that the two are never confused.
_SYSTEM = re.compile(r"[a-z0-9._-]{1,32}")  # The ledger keeps it before a job's number.


@dataclass(frozen=True)
class RootTemplate:
    """One root as the operator wrote it: ``{username}`` stands for the caller's folder name.

    :param machine: the only one that has it; empty: all have.
    """

    name: str
    template: str
    read_only: bool = False
    machine: str = ""

    @classmethod
    def parse(cls, text: str) -> RootTemplate:
        """Parse ``[MACHINE.]NAME=TEMPLATE[:ro]``.

        :raises ValueError: with what is wrong and an example.
        """
        whole, separator, template = text.partition("=")
        machine, _, name = whole.rpartition(".")
        read_only = template.endswith(":ro")
        if read_only:
            template = template[: -len(":ro")]
        if not separator or not _ROOT_NAME.fullmatch(name):
            raise ValueError(
                f"a root is NAME=TEMPLATE[:ro] with a NAME of at most 20 small letters, digits, - and _, not {text!r}; "
                "for example scratch=/scratch/{username}"
            )
        return cls(name, _absolute_template(template), read_only, machine)

    @property
    def per_user(self) -> bool:
        """Whether every user has a folder of their own here."""
        return "{username}" in self.template

    def path_for(self, username: str) -> str:
        """The absolute path of this root for one user."""
        return self.template.replace("{username}", username)

    def username_in(self, path: str) -> str | None:
        """The name in the place of ``{username}`` in a path below this root, empty where there is none to be named.

        :returns: ``None`` if the path does not lie below it.
        """
        parts, mine = PurePosixPath(path).parts, PurePosixPath(self.template).parts
        found = ""
        if len(parts) < len(mine):
            return None
        for part, template in zip(parts, mine, strict=False):
            before, placeholder, after = template.partition("{username}")
            if not placeholder and part != template:
                return None
            if placeholder:
                name = part.removeprefix(before).removesuffix(after)
                if not name or template.replace("{username}", name) != part or found not in ("", name):
                    return None
                found = name
        return found

    def lies_below(self, other: RootTemplate) -> bool:
        """Whether this root is, or lies below, another one for some user."""
        parts, above = PurePosixPath(self.template).parts, PurePosixPath(other.template).parts
        pairs = zip(parts, above, strict=False)
        return len(parts) >= len(above) and all(
            mine == theirs or "{username}" in mine + theirs for mine, theirs in pairs
        )


def _absolute_template(template: str) -> str:
    stripped = template.replace("{username}", "")
    if "{" in stripped or "}" in stripped:
        raise ValueError(f"only {{username}} is replaced in a path template, not what stands in {template!r}")
    path = PurePosixPath(template)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"a path template is an absolute path without '..', not {template!r}")
    return str(path)


def _said(value: str | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def default_state_folder() -> Path:
    """Where the gateway keeps its database when nobody says otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "marketplace-hpc"


class Product(BaseModel):
    """What users of the MarketPlace purchase before they use the gateway."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    description: str = ""
    id: str = ""
    """What the platform has called it; empty for a new one."""


class Registration(BaseModel):
    """What the MarketPlace is told about the gateway: :mod:`aiida_marketplace_hpc.gateway.registration`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    """Empty: the gateway's name."""
    description: str = "An HPC gateway: run jobs on a cluster and reach its files over HTTP."
    contact: str = Field(default="", pattern=r"^([^@\s]+@[^@\s]+)?$")
    """An e-mail address."""
    version: str = __version__
    """Of the document: the platform wants a greater one at each update."""
    api_version: str = "0.3.0"
    """Of the MarketPlace's standard API. The published client accepts no other."""
    server: str = ""
    """Where the platform reaches the gateway."""
    broker: str = ""
    """The platform whose message broker brings the requests instead."""
    product: tuple[Product, ...] = ()
    """Empty: one with the name and the description of the gateway."""


class SettingsInvalid(ConfigurationError):
    """Settings make no sense.

    :param problems: what is wrong, one by one.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


SettingsT = TypeVar("SettingsT", bound="FileSettings")


class FileSettings(BaseSettings):
    """Settings that come from flags, else from the environment, else from a TOML file.

    A variable of the environment that is empty says nothing. ``published`` are further variables.
    """

    published: ClassVar[tuple[Published, ...]] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, PublishedNames(settings_cls), TomlConfigSettingsSource(settings_cls))


class Settings(FileSettings):
    """Everything that can be set about a gateway; the flags of ``gateway serve`` have the same names.

    Read from flags, from the environment (``MARKETPLACE_HPC_`` and the name in capitals) and from a TOML file with the same
    keys; the first that says something wins.
    """

    model_config = SettingsConfigDict(
        env_prefix="MARKETPLACE_HPC_", env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )
    published: ClassVar[tuple[Published, ...]] = (Published("F7T_TOKEN", "firecrest_token"),)

    backend: Literal["local", "slurm", "firecrest"] = "local"
    home: str = ""
    root: tuple[str, ...] = ()
    allow_shared_home: bool = False
    host: str = "localhost"
    port: int = Field(default=5005, ge=0, le=65535)
    state: Path = Field(default_factory=default_state_folder)
    database: str = Field(default="", repr=False)
    dev_token: dict[str, str] = Field(default_factory=dict, repr=False)
    """Development tokens: the token of each user."""
    auth: Literal["dev", "oidc", "marketplace"] = "dev"
    """How to find out whose a token is."""
    allow_dev_tokens: bool = False
    """Accept development tokens on an address that others reach, too."""
    issuer: str = ""
    """Who issues the tokens; with ``marketplace`` the realm of ``MP_HOST_URL`` or ``MP_HOST`` by default."""
    audience: tuple[str, ...] = ()
    email_claim: str = "email"
    account: Literal["own", "shared", "delegated"] | None = None
    """Under whose Unix account files are written and jobs run."""
    owner: str = ""
    """With the account ``own``: who may use the gateway, by e-mail address or subject."""
    require_registration: bool = False
    allow: tuple[str, ...] = ()
    allow_claim: tuple[str, ...] = ()
    home_claim: str = ""
    home_map: Path | None = None
    home_command: tuple[str, ...] = ()
    name: str = "HPC gateway"
    machine: str = ""
    slots: int = Field(default=0, ge=0)
    """Jobs that the backend ``local`` runs at once; 0: as many as there are processors."""
    firecrest_url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Where the FirecREST of the backend ``firecrest`` is."""
    firecrest_version: int = Field(default=2, ge=1, le=2)
    firecrest_system: str = Field(default="", pattern=r"^([a-z0-9._-]+(,[a-z0-9._-]+)*)?$")
    """What FirecREST calls the cluster; several, with commas between them, the first of which is the default."""
    firecrest_token_url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Where the gateway gets tokens of its own for FirecREST; not needed with the account ``delegated``."""
    firecrest_client_id: str = ""
    firecrest_client_secret: SecretStr = SecretStr("")
    """From the environment or the file only: what stands in a command line is seen by everybody on the machine."""
    firecrest_token: SecretStr = SecretStr("")
    """A token that never changes, in place of the client's id and secret; from the environment or the file only, too."""
    poll_interval: float = Field(default=0.0, ge=0.0)
    """Seconds for which one answer of the scheduler serves everybody; 0: what suits the backend."""
    certfile: Path | None = None
    keyfile: Path | None = None
    trusted_proxy: tuple[str, ...] = ()
    """Addresses and networks whose word is taken for who connects to them, and whether with TLS."""
    stop_timeout: int = Field(default=30, ge=0)
    """Seconds for which requests and transfers under way go on when the gateway is asked to stop."""
    text_only: bool = False
    """Only text reaches the gateway, and nothing else leaves it: for a relay that does not say so itself."""
    access_log: Path | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    metrics: bool = False
    """Show figures for Prometheus at ``/metrics``, to everybody who reaches the gateway."""
    pages: bool = True
    """Show people who sign in with a browser their jobs and files, at ``/``."""
    page_url: str = ""
    """Where browsers reach the gateway."""
    page_client: str = ""
    """The client of the issuer with which browsers are signed in."""
    page_client_secret: SecretStr = SecretStr("")
    """Its secret, if it has one; there is no flag for it, which everybody on the machine could see."""
    page_client_secret_file: Path | None = None
    keep_unfinished: float = Field(default=3.0, ge=0.0)
    """Days for which an upload that broke off is kept, to be continued."""
    unfinished_limit: int = Field(default=100, ge=0)
    """GiB that uploads that broke off may take, in each root of a user."""
    keep_job_folders: float = Field(default=0.0, ge=0.0)
    """Days after the end of a job for which the folder is kept that the gateway made for it; 0: for ever."""
    request_limit: int = Field(default=64 * 1024, ge=1)
    """MiB of the body of one request."""
    form_limit: int = Field(default=1024, ge=1)
    """MiB of an upload in the published form, which lies in the temporary folder of the machine until it is whole."""
    requests_at_once: int = Field(default=64, ge=0)
    """Requests of one user that may be under way; 0: any number."""
    requests_per_second: float = Field(default=200.0, ge=0.0)
    """Requests of one user in a second, on average over ten; 0: any number."""
    jobs_per_user: int = Field(default=10_000, ge=0)
    """Jobs of one user that have not ended; 0: any number."""
    archive_members: int = Field(default=1_000_000, ge=1)
    """Files, folders and links that may come out of one archive."""
    archive_size: int = Field(default=1024, ge=1)
    """GiB that may come out of one archive."""
    container_runtime: str = "singularity"
    """What runs the container of a job that was created as published: a name or an absolute path."""
    container_time_limit: str = "00:10:00"
    container_account: str = ""
    container_template: Path | None = None
    """The job script of such jobs, instead of the one that comes with the package."""
    classic: bool = False
    """Serve the capabilities of the published gateway, exactly as first published, and nothing else."""
    classic_file_names: Literal["secure", "raw"] = "secure"
    """How an upload is named: as FirecREST up to 1.13.0 does it (`sub/a b.txt` becomes `sub_a_b.txt`), or as it is said."""
    classic_file_limit: float = Field(default=5.0, gt=0.0)
    """MiB of a file that is downloaded, and of the form that brings one."""
    classic_command_timeout: float = Field(default=5.0, gt=0.0)
    """Seconds that one operation on files may take."""
    classic_listing: Literal["split", "whole"] = "split"
    """How names with blanks are listed: the first word only, as by the published gateway's FirecREST, or whole."""
    connections: int = Field(default=500, ge=1)
    """Connections at once; the process needs twice as many open files (``ulimit -n``)."""
    policy: Policy = Field(default_factory=Policy)
    """What the site wants of jobs; in the file or the environment only."""
    registration: Registration = Field(default_factory=Registration)
    """Set by the options of ``gateway openapi``; everything else by those of ``gateway serve``."""

    @field_validator("home")
    @classmethod
    def _home_is_a_template(cls, value: str) -> str:
        return _absolute_template(value) if value else value

    @field_validator("root")
    @classmethod
    def _roots_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [(root.machine, root.name) for root in map(RootTemplate.parse, value)]
        if ("", HOME) in names or len(set(names)) != len(names):
            raise ValueError("every root needs a name of its own, and `home` is the one that --home makes")
        return value

    @field_validator("database")
    @classmethod
    def _database_is_known(cls, value: str) -> str:
        try:
            if value:
                parse_url(value)
        except ConfigurationError as exc:
            raise ValueError(exc.message) from None
        return value

    @field_validator("container_runtime")
    @classmethod
    def _runtime_is_known(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.name not in ("apptainer", "singularity") or (value != path.name and not path.is_absolute()):
            raise ValueError(f"a runtime is apptainer or singularity, or the absolute path of one, not {value!r}")
        return value

    @field_validator("container_time_limit")
    @classmethod
    def _limit_is_a_duration(cls, value: str) -> str:
        try:
            parse_duration(value)
        except ValueError:
            raise ValueError(
                f"a time limit is what Slurm takes for one, such as 00:10:00 or 1-12, not {value!r}"
            ) from None
        return value.strip()

    @field_validator("container_account")
    @classmethod
    def _account_is_a_word(cls, value: str) -> str:
        if value and not SLURM_WORD.fullmatch(value):
            raise ValueError(f"an account has letters, digits and . _ + - only, not {value!r}")
        return value

    @field_validator("trusted_proxy")
    @classmethod
    def _proxies_are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                ipaddress.ip_network(text)
            except ValueError as exc:
                raise ValueError(f"a trusted proxy is an address or network such as 10.0.0.0/24: {exc}") from None
        return value

    @model_validator(mode="after")
    def _key_has_a_certificate(self) -> Settings:
        if self.keyfile is not None and self.certfile is None:
            raise ValueError("a keyfile needs its certificate: give --certfile, too")
        return self

    @field_validator("page_url")
    @classmethod
    def _page_url_is_an_address(cls, value: str) -> str:
        parts = urlsplit(value)
        plain = not (parts.username or parts.query or parts.fragment)
        safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        if value and not (parts.hostname and plain and safe):
            raise ValueError(f"the page's address is one such as https://gateway.example.org, not {value!r}")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _page_can_sign_in(self) -> Settings:
        if self.page_client and self.auth == "dev":
            raise ValueError("a page_client signs in at an issuer: choose --auth oidc or marketplace with it")
        if self.page_client and not self.page_url:
            raise ValueError("with a page_client, the issuer has to know where to send browsers back: give --page-url")
        if self.page_client_secret.get_secret_value() and self.page_client_secret_file is not None:
            raise ValueError("the page_client has one secret: give page_client_secret or page_client_secret_file")
        return self

    @model_validator(mode="after")
    def _what_is_asked_for_goes_together(self) -> Settings:
        if self.classic and self.metrics:
            raise ValueError("with --classic nothing is served that was not published: leave --metrics away")
        if self.backend == "firecrest" and (self.classic or self.keep_job_folders):
            name = "classic" if self.classic else "keep_job_folders"
            raise ValueError(f"{name} needs a backend that sees the cluster's disk: local or slurm")
        return self

    @model_validator(mode="after")
    def _folders_are_apart(self) -> Settings:
        if self.backend in ("slurm", "firecrest") and not self.home:
            raise ValueError(
                f"backend {self.backend} needs to know where the users' folders on the cluster are: "
                "give --home, for example --home /scratch/gateway/{username}"
            )
        for machine in self.machines:
            self._check_roots(self.roots_of(machine))
        for root in map(RootTemplate.parse, self.root):
            if root.machine and root.machine not in self.machines:
                raise ValueError(
                    f"the root {root.machine}.{root.name} is for a machine that this gateway does not have; it has "
                    f"{', '.join(self.machines)}"
                )
        return self

    def _check_roots(self, roots: Sequence[RootTemplate]) -> None:
        for root in roots:
            above = next((one for one in roots if not one.read_only and root.lies_below(one)), None)
            if root.read_only and above is not None:
                raise ValueError(
                    f"the root {root.name} would not be read-only: it lies below {above.name} ({above.template}), "
                    "which can be written"
                )
        home = roots[0]
        if not home.per_user and self.account_mode != "own" and not self.allow_shared_home:
            raise ValueError(
                f"--home {home.template} is one folder for several users, who would reach each other's files: put "
                "{username} into it, or, if that is what you want, give --allow-shared-home"
            )

    @model_validator(mode="after")
    def _firecrest_is_whole(self) -> Settings:
        if self.backend != "firecrest":
            return self
        needed = ["firecrest_url", "firecrest_system"]
        own = ("firecrest_token_url", "firecrest_client_id", "firecrest_client_secret")
        delegated = self.account_mode == "delegated"
        if _said(self.firecrest_token):
            if delegated:
                raise ValueError(
                    "with --account delegated FirecREST gets the users' tokens: leave firecrest_token (F7T_TOKEN) away"
                )
            if beside := [name for name in own if _said(getattr(self, name))]:
                raise ValueError(
                    f"firecrest_token (F7T_TOKEN) stands in place of {', '.join(own)}: leave it away, or "
                    f"{', '.join(beside)}"
                )
        elif not delegated:
            needed += own
        written = (root for one in self.machines for root in self.roots_of(one) if not root.read_only)
        if delegated and not all(root.per_user for root in written):
            raise ValueError(
                "with --account delegated each root that can be written needs {username}: by it the gateway knows whose a "
                "folder is, and with whose token to look after it"
            )
        missing = [name for name in needed if not _said(getattr(self, name))]
        if missing:
            raise ValueError(
                f"backend firecrest needs {', '.join(missing)}, too; the secret from environment or file"
                + (
                    ""
                    if "firecrest_client_id" not in missing
                    else ", or in place of all three a constant token (F7T_TOKEN)"
                )
            )
        if len(self.systems) > 1 and self.machine:
            raise ValueError("several firecrest_systems are called as FirecREST calls them: leave machine away")
        if self.backend in self.systems[1:]:
            raise ValueError(f"a system called {self.backend} can be the first one only: jobs of an only system say so")
        if len(set(self.systems)) != len(self.systems) or not all(map(_SYSTEM.fullmatch, self.systems)):
            raise ValueError("each firecrest_system is named once, and has at most 32 characters")
        return self

    @property
    def systems(self) -> tuple[str, ...]:
        """What FirecREST calls the clusters, the default one first."""
        return tuple(self.firecrest_system.split(","))

    @property
    def machines(self) -> tuple[str, ...]:
        """What users call the machines that jobs run on, the default one first."""
        if self.backend == "firecrest" and len(self.systems) > 1:
            return self.systems
        return (self.machine or self.backend,)

    @property
    def roots(self) -> tuple[RootTemplate, ...]:
        """The roots of the default machine, ``home`` first."""
        return self.roots_of(self.machine_name)

    def roots_of(self, machine: str) -> tuple[RootTemplate, ...]:
        """The roots of one of :attr:`machines`, ``home`` first: those of all, and its own, also in place of those."""
        home = self.home or str(self.state.expanduser().absolute() / "home" / "{username}")
        found = {HOME: RootTemplate(HOME, home)}
        given = sorted(map(RootTemplate.parse, self.root), key=lambda root: root.machine != "")
        found.update((root.name, root) for root in given if root.machine in ("", machine))
        return tuple(found.values())

    def root_at(self, address: str) -> tuple[str, str] | None:
        """The machine and the name of the root that stands in place of a job's id: ``NAME``, or ``MACHINE.NAME``.

        No id of a job has a dot, nor has the name of a root.

        :returns: ``None`` if there is no such root.
        """
        machine, dot, name = address.rpartition(".")
        machine = machine if dot else self.machine_name
        known = machine in self.machines and any(root.name == name for root in self.roots_of(machine))
        return (machine, name) if known else None

    def address_of(self, machine: str, root: str) -> str:
        """What stands in place of a job's id for a root, as :meth:`root_at` reads it."""
        return root if machine == self.machine_name else f"{machine}.{root}"

    @property
    def database_url(self) -> str:
        """The database's address; by default SQLite in the state folder."""
        return self.database or f"sqlite:///{self.state.expanduser().absolute() / 'ledger.sqlite'}"

    @property
    def account_mode(self) -> Literal["own", "shared", "delegated"]:
        """Under whose Unix account files are written and jobs run: :mod:`aiida_marketplace_hpc.gateway.account`.

        Unless it is said, the account is the own one of somebody who is the only one with a development token.
        """
        return self.account or ("own" if self.auth == "dev" and len(self.dev_token) == 1 else "shared")

    @property
    def closed(self) -> bool:
        """Whether an accepted token is not enough to use the gateway."""
        return self.require_registration or bool(self.allow or self.allow_claim)

    @property
    def machine_name(self) -> str:
        """What the machine is called in ``getInfo``; of several the default one."""
        return self.machines[0]


def load(flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Make the settings from the flags that were given, the environment and a file.

    :param flags: only those that the user gave; they win over everything.
    :raises ConfigurationError: naming each setting that is wrong and why.
    """
    return load_as(Settings, flags, config)


def load_as(kind: type[SettingsT], flags: dict[str, Any], config: Path | None) -> SettingsT:
    """Make settings of some kind, as :func:`load` does.

    :raises ConfigurationError: naming each setting that is wrong, where it comes from, and why.
    """
    if config is not None and not config.is_file():
        raise ConfigurationError(f"there is no configuration file {config}")
    from_file = type(kind.__name__, (kind,), {"model_config": SettingsConfigDict(toml_file=config)})
    try:
        made: SettingsT = from_file(**flags)
    except ValidationError as exc:
        problems = []
        for error in exc.errors():
            name = ".".join(str(part) for part in error["loc"])
            message = error["msg"].removeprefix("Value error, ")
            problems.append(f"setting {name}{_from(kind, error['loc'], flags, config)}: {message}" if name else message)
        raise SettingsInvalid(problems) from exc
    except SettingsError as exc:  # A list or table in the environment that is not JSON.
        wrong = [name for name in kind.model_fields if f'"{name}"' in str(exc)]
        name = wrong[0] if wrong else ""
        where = f"setting {name} (from {variable_of(kind, name)})" if name else "a setting in the environment"
        raise ConfigurationError(f"{where}: lists and tables are written in JSON there") from exc
    except ValueError as exc:  # A TOML file that does not parse.
        raise ConfigurationError(f"configuration file {config}: {exc}") from exc
    return made


def _from(kind: type[FileSettings], location: Sequence[int | str], flags: dict[str, Any], config: Path | None) -> str:
    found = origin(kind, str(location[0]), flags, config)
    return "" if found == "default" else f" (from {found})"
