"""What the MarketPlace says of an app: the version of its API, and the capabilities that it has on offer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc.client.auth import DEFAULT_SOURCE, StaticToken, TokenSource
from aiida_marketplace_hpc.errors import Forbidden, MarketplaceHpcError, NotFound, NotSupported, Phase

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway

PUBLISHED_APPS = {
    "mc": "13f59545-cb1f-4113-b873-6bb079539788",
    "iwm": "c0ee3889-0b97-4083-8a7b-a1a807848437",
}
"""The apps that the published client knows by a name."""
_PLATFORM = "https://materials-marketplace.eu"
_STAGING = "https://staging.materials-marketplace.eu"
"""Where the apps with a name are registered."""


@dataclass(frozen=True)
class Application:
    """An app as the MarketPlace describes it.

    :param url: the platform's address.
    :param api_version: of the MarketPlace's standard API, such as ``0.3.0``; empty if it is not said.
    :param capabilities: the names of what can be asked through the platform; ``None`` if that is not said.
    """

    url: str
    app_id: str
    api_version: str = ""
    capabilities: frozenset[str] | None = None

    def offers(self, capability: str) -> bool:
        """Whether a capability is on offer, as far as is said."""
        return self.capabilities is None or capability in self.capabilities

    def require(self, capability: str) -> None:
        """Make sure that a capability can be asked for.

        :raises NotSupported: it is not on offer, or the app speaks an API that this client does not.
        """
        # The standard API is at 0.x; the published clients refuse 1.0 as well.
        if self.api_version.partition(".")[0] not in ("", "0"):
            raise NotSupported(
                f"the app {self.app_id} speaks version {self.api_version} of the MarketPlace's API, and this client knows "
                "0.x only: install a newer one"
            )
        if not self.offers(capability):
            raise NotSupported(
                f"the app {self.app_id} does not offer {capability} on {self.url}: its provider must register it there, with "
                "the OpenAPI document of a gateway that has it"
            )


def ask_application(url: str, app_id: str, ask: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Ask the platform for an app, and say in its place what an error means.

    :param ask: sends the request.
    :raises NotSupported: there is no such app, or the caller may not use it.
    """
    try:
        return dict(ask())
    except NotFound as exc:
        error: MarketplaceHpcError = NotSupported(
            f"{url} knows no app {app_id}: correct the app_id, or the url of the MarketPlace", request_id=exc.request_id
        )
    except Forbidden as exc:
        error = NotSupported(
            f"{url} does not let you use the app {app_id} ({exc.message}): buy a product of this app there, then try again",
            request_id=exc.request_id,
        )
    except MarketplaceHpcError as exc:
        error = exc
    # What was to be asked of the gateway never left.
    error.phase = Phase.NOT_SENT
    raise error


def described(url: str, app_id: str, said: Mapping[str, Any]) -> Application:
    """Read what the platform said of an app; what is missing or makes no sense counts as not said."""
    capabilities = said.get("capabilities")
    names = None
    if isinstance(capabilities, list):
        names = frozenset(str(row.get("name")) if isinstance(row, dict) else str(row) for row in capabilities)
    return Application(url, app_id, str(said.get("api_version") or ""), names)


def get_app(
    name_or_app_id: str, access_token: str | TokenSource | None = None, *, url: str = "", **options: Any
) -> HpcGateway:
    """Make a gateway that is reached through the MarketPlace, as the published client does; asks the platform for the app.

    May be repeated.

    :param name_or_app_id: ``mc`` or ``iwm``, or the id of any app.
    :param access_token: a token, or a source of tokens; by default what ``MP_ACCESS_TOKEN`` has.
    :param url: the platform's address; by default ``MP_HOST``, else the platform on which the app is registered.
    :param options: further parameters of :class:`~aiida_marketplace_hpc.client.gateway.HpcGateway`.
    :raises NotSupported: there is no such app, or the caller may not use it.
    :raises MarketplaceHpcError: the platform refuses the token, or does not answer.
    """
    from aiida_marketplace_hpc.client.gateway import HpcGateway

    known = PUBLISHED_APPS.get(name_or_app_id)
    host = url or os.environ.get("MP_HOST") or (_STAGING if known else _PLATFORM)
    source = StaticToken(access_token) if isinstance(access_token, str) else access_token or DEFAULT_SOURCE
    gateway = HpcGateway(host, app_id=known or name_or_app_id, token_source=source, **options)
    gateway.application()
    return gateway
