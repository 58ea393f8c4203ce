"""The way to find out who a caller is that the settings name."""

from __future__ import annotations

from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.auth import Authenticator
from aiida_marketplace_hpc.gateway.auth.development import DevelopmentTokens
from aiida_marketplace_hpc.gateway.auth.marketplace import MarketPlaceTokens, default_issuer
from aiida_marketplace_hpc.gateway.auth.oidc import OidcTokens
from aiida_marketplace_hpc.gateway.config import Settings


def authenticator(settings: Settings) -> Authenticator:
    """Make it. Nobody is asked anything yet.

    :raises ConfigurationError: if something is missing, or would be dangerous.
    """
    if settings.auth == "dev":
        ways = [*settings.trusted_proxy, *([] if is_loopback(settings.host) else [settings.host or "every address"])]
        if ways and not settings.allow_dev_tokens:
            raise ConfigurationError(
                f"development tokens never expire, and others get here by way of {', '.join(ways)}: choose --auth oidc or "
                "marketplace, listen on localhost without a proxy, or, where only people whom you trust get here, give "
                "--allow-dev-tokens"
            )
        return DevelopmentTokens(settings.dev_token)
    if settings.dev_token:
        raise ConfigurationError(
            f"development tokens are given, and --auth {settings.auth} does not accept them: remove them "
            "(--dev-token, MARKETPLACE_HPC_DEV_TOKEN, dev_token in the file)"
        )
    if settings.auth == "marketplace":
        if settings.audience:
            raise ConfigurationError("--audience is for --auth oidc: the MarketPlace itself says which tokens are good")
        return MarketPlaceTokens(settings.issuer or default_issuer(), email_claim=settings.email_claim)
    if not settings.issuer:
        raise ConfigurationError("whose tokens? Give --issuer, the address of the OpenID Connect provider")
    return OidcTokens(settings.issuer, settings.audience, email_claim=settings.email_claim)
