"""Under which Unix account files are written and jobs run, and what that does and does not keep apart."""

from __future__ import annotations

from collections.abc import Mapping

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import Settings

SEPARATION: Mapping[str, str] = {
    "own": "This gateway serves one person, who also runs it: files and jobs are that person's own.",
    "shared": "Files and jobs of all users belong to one Unix account. The gateway keeps users apart in what goes through it; "
    "a job itself can reach whatever that account can: other users' files and jobs, and the gateway's own data.",
    "delegated": "Files and jobs belong to each user's own Unix account: the operating system keeps users apart.",
}
"""For each mode one thing to say to users and operators."""


def check_account(settings: Settings) -> None:
    """Make sure that the account which the settings name is one that can be had.

    :raises ConfigurationError: if not, with what to set instead.
    """
    mode = settings.account_mode
    if mode == "delegated" and settings.backend != "firecrest":
        raise ConfigurationError(
            "with --account delegated jobs run under each user's own account, which needs the backend firecrest: use "
            "--account shared, or own"
        )
    if settings.owner and mode != "own":
        raise ConfigurationError("--owner says who may use a gateway with --account own; this one's account is shared")
    if mode != "own":
        return
    if settings.auth == "dev" and len(settings.dev_token) > 1:
        raise ConfigurationError(
            f"with --account own the gateway serves one person, but there are development tokens of "
            f"{len(settings.dev_token)}: leave one, or choose --account shared"
        )
    if settings.auth != "dev" and not settings.owner:
        raise ConfigurationError(
            "with --account own jobs of a caller run as you: say who you are, with --owner and your e-mail address or subject"
        )
    if settings.closed:
        raise ConfigurationError(
            "with --account own nobody but the owner is served: leave --require-registration, --allow and --allow-claim away"
        )
