"""The token source ``login:NAME``: an access token that is renewed ahead of its end, once for all who share the login.

A renewal runs in a thread of its own under the login's lock. Whoever asks meanwhile gets the token there is, as long as it is
good; whoever cannot wait any longer goes, but the renewal does not: its answer is the only copy of the next refresh token, and
is on disk before anybody uses the access token that came with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace

from aiida_marketplace_hpc.client.auth import COMMAND_TIMEOUT, TokenSource
from aiida_marketplace_hpc.client.logins import Login, LoginBusy, LoginStore, checked_name
from aiida_marketplace_hpc.client.oidc import PATIENCE, GrantRefused, OidcClient, Provider, Tokens
from aiida_marketplace_hpc.errors import MarketplaceHpcError, ProviderUnavailable, TokenUnavailable

_AFTER_FAILURE = 5.0
"""Seconds in which a provider that did not answer is not asked again by this process."""
_AFTER_REFUSAL = 30.0
"""Seconds in which a token that took the place of a refused one is not replaced again: it is not the token's fault."""
_LARGEST_MARGIN = 1 / 3
"""Of a token's lifetime: a margin that was made for longer-lived ones must not renew without end."""
_LAST_MOMENTS = 5.0
"""Seconds before its end in which a token may end on its way: the next one is waited for, if it comes."""
_LARGEST_LAST_MOMENTS = 1 / 4


def client_of(login: Login, clock: Callable[[], float] = time.time) -> OidcClient:
    """The client of the provider that a login was made with.

    :param clock: seconds since the epoch.
    """
    provider = Provider(
        login.issuer,
        login.token_endpoint,
        revocation_endpoint=login.revocation_endpoint,
        end_session_endpoint=login.end_session_endpoint,
        basic=login.basic,
    )
    return OidcClient(provider, login.client_id, login.client_secret, clock)


def with_tokens(login: Login, tokens: Tokens, *, forced: bool = False) -> Login:
    """A login after it was granted tokens."""
    return replace(
        login,
        access_token=tokens.access_token,
        refresh_token=tokens.refresh_token,
        received=tokens.received,
        lifetime=tokens.lifetime,
        forced=forced,
        renewing=False,
        ended="",
    )


class LoginToken(TokenSource):
    """The access token of a login that ``marketplace-hpc login`` has made.

    :param store: where logins are kept.
    :param clock: seconds since the epoch.
    :raises ConfigurationError: ``login`` is no name.
    """

    reloadable = True

    def __init__(self, login: str, *, store: LoginStore | None = None, clock: Callable[[], float] = time.time) -> None:
        self._login = checked_name(login)
        self._store = store or LoginStore()
        self._clock = clock
        self._lock = threading.Lock()
        self._known: tuple[tuple[int, int, int], Login] | None = None
        self._renewal: Future[Login | MarketplaceHpcError] | None = None
        self._failed: tuple[float, MarketplaceHpcError] | None = None
        self._refused = ""

    @property
    def name(self) -> str:
        return f"login:{self._login}"

    def token(self, within: float = COMMAND_TIMEOUT) -> str:
        login = self._read()
        left = login.lasts(self._clock()) if login.access_token not in ("", self._refused) else 0.0
        if left > 0 and (login.ended or not self._is_due(login)):
            return login.access_token
        failed = self._failed
        if failed is not None and 0 <= self._clock() - failed[0] < _AFTER_FAILURE:
            renewed: Login | MarketplaceHpcError = failed[1]
        else:
            # What is good, and being renewed by another process, is not worth waiting for.
            renewal = self._renewing(PATIENCE if left <= 0 else 0.0)
            if left > min(_LAST_MOMENTS, login.lifetime * _LARGEST_LAST_MOMENTS):
                return login.access_token
            try:
                renewed = renewal.result(max(0.0, within))
            except FutureTimeout:
                renewed = ProviderUnavailable(
                    f"the login {self._login} could not be renewed within {within:.0f} s: {login.issuer} does not answer"
                )
        if not isinstance(renewed, MarketplaceHpcError):
            return renewed.access_token
        if left > 0:
            return login.access_token
        # A new one each time: an object that several threads raise would collect all their tracebacks.
        raise type(renewed)(renewed.message)

    def forget(self, token: str) -> None:
        self._refused = token

    def _read(self) -> Login:
        with self._lock:
            signature = self._store.signature(self._login)
            if self._known is None or self._known[0] != signature:
                self._known = (signature, self._store.read(self._login))
            return self._known[1]

    def _is_due(self, login: Login) -> bool:
        return login.lasts(self._clock()) <= min(self.margin, login.lifetime * _LARGEST_MARGIN)

    def _renewing(self, patience: float) -> Future[Login | MarketplaceHpcError]:
        """The renewal under way, which is begun if there is none.

        :param patience: seconds in which another process may finish one.
        """
        with self._lock:
            if self._renewal is None:
                renewal: Future[Login | MarketplaceHpcError] = Future()
                # No daemon thread: a process that ends waits for the answer, which it must not lose.
                threading.Thread(target=self._renew, args=(renewal, patience), name=f"renew-{self._login}").start()
                self._renewal = renewal
            return self._renewal

    def _renew(self, renewal: Future[Login | MarketplaceHpcError], patience: float) -> None:
        failure: MarketplaceHpcError | None = None
        try:
            with self._store.lock(self._login, patience):
                result: Login | MarketplaceHpcError = self._renewed()
        except LoginBusy as exc:
            result = exc  # It may be over in a moment.
        except MarketplaceHpcError as exc:
            result = failure = exc
        except BaseException as exc:  # noqa: BLE001 - whoever waits must hear of it, whatever it is.
            result = failure = TokenUnavailable(f"the login {self._login} could not be renewed ({type(exc).__name__})")
        with self._lock:
            self._failed = None if failure is None else (self._clock(), failure)
            self._renewal = None
        renewal.set_result(result)

    def _renewed(self) -> Login:
        """The login with a token that is good, whoever has renewed it. Its lock is held."""
        login = self._store.read(self._login)
        now = self._clock()
        refused = bool(login.access_token) and login.access_token == self._refused
        if not refused and not self._is_due(login):
            return login  # Another process was faster.
        if refused and login.forced and 0 <= now - login.received < _AFTER_REFUSAL:
            return login
        if login.ended:
            raise self._over(login.ended, login)
        try:
            tokens = self._granted(login)
        except GrantRefused as exc:
            lost = ", after the answer to an earlier renewal was lost" if login.renewing else ""
            why = f"{exc.message}{lost}"
            self._store.write(replace(login, renewing=False, ended=why if exc.error == "invalid_grant" else ""))
            raise self._over(why, login) from None
        login = with_tokens(login, tokens, forced=refused)
        self._store.write(login)
        return login

    def _granted(self, login: Login) -> Tokens:
        client = client_of(login, self._clock)
        if login.grant == "client_credentials":
            return client.log_in_as_service(login.scope)
        if not login.refresh_token:
            raise self._over("the provider gave nothing to renew it with", login)
        if not login.renewing:
            # Also shows that there is room for the answer, before the refresh token is used up.
            self._store.write(replace(login, renewing=True))
        return client.refresh(login.refresh_token)

    def _over(self, why: str, login: Login) -> TokenUnavailable:
        service = " --client-credentials" if login.grant == "client_credentials" else ""
        return TokenUnavailable(
            f"the login {self._login} is over ({why}): run `marketplace-hpc login {self._login}{service}`"
        )
