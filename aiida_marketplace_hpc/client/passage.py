"""The way to one gateway: what gets through there, found out by asking, and each request sent in the form that does.

Nothing above it knows that form. What is asked, of whom and in which order, is so chosen that a published gateway has nothing
of it but a question for its heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.application import Application, ask_application, described
from aiida_marketplace_hpc.client.body import BodyLimit
from aiida_marketplace_hpc.client.info import InfoCache
from aiida_marketplace_hpc.client.packing import Way, as_text, in_envelope
from aiida_marketplace_hpc.client.routes import ProxyRoute, Route, Target
from aiida_marketplace_hpc.client.session import GatewaySession, Request
from aiida_marketplace_hpc.errors import Forbidden, InvalidRequest, MarketplaceHpcError, NotFound, NotSupported, Phase
from aiida_marketplace_hpc.protocol import CARRIER

T = TypeVar("T")
Json = dict[str, Any]


class Passage:
    """May be used by many threads; nothing is sent before the first call.

    :param learnt: is told what the gateway says about itself, whenever that was asked for.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(
        self, route: Route, session: GatewaySession, learnt: Callable[[Json], None], clock: Callable[[], float]
    ) -> None:
        self._route = route
        self._session = session
        self._learnt = learnt
        self._way = Way()
        self.proxy = route if isinstance(route, ProxyRoute) else None
        self.body_limit = BodyLimit(proxied=self.proxy is not None)
        """How large bodies may be."""
        self.info = InfoCache(route.url, self._ask_info, clock)
        """What the gateway says about itself."""
        self.offer = InfoCache(route.url, self._ask_offer, clock)
        """What the platform says of the app."""

    def application(self) -> Application:
        """What the platform says of the app. May be repeated.

        :raises NotSupported: there is no such app, the caller may not use it, or the gateway is asked directly.
        """
        return described(self._route.url, self.proxy.app_id if self.proxy else "", self.offer.get())

    def send(self, request: Request, handle: Callable[[Answer], T]) -> T:
        """Send a request in the form in which it gets through, and give the answer to ``handle``.

        May be repeated if the request may. For what is raised see
        :meth:`~aiida_marketplace_hpc.client.session.GatewaySession.call`; what goes wrong before that was not sent.

        :raises NotSupported: the platform does not offer it.
        """
        target = request.target
        way = self._known(target)
        try:
            return self._send_by(way, request, handle)
        except (NotFound, InvalidRequest, Forbidden) as exc:
            # Something on the way refused it. The app may have been registered anew meanwhile.
            if not (exc.foreign and self.proxy and target.has_additions):
                raise
            self.offer.forget()
            self.info.forget()
            if self._known(target) == way:
                raise
        return self._send_by(self._way, request, handle)

    def _known(self, target: Target) -> Way:
        """What is known of the way, after a question where the form of this request depends on it."""
        if self.proxy and target.has_additions:
            if self.application().capabilities != self._way.offered:
                self.info.forget()
            try:
                self.info.get()
            except NotSupported:
                pass
            except MarketplaceHpcError as exc:
                # What was to be asked never left.
                exc.phase = Phase.NOT_SENT
                raise
        return self._way

    def _send_by(self, way: Way, request: Request, handle: Callable[[Answer], T]) -> T:
        enclose = way.wants_envelope(request.target)
        if self.proxy:
            application, asked = self.application(), request.target.capability.name
            enclose = enclose or (way.envelope and not application.offers(asked))
            application.require(CARRIER if enclose else asked)
        if enclose:
            request, handle = in_envelope(request, handle, self._route.target(CARRIER))
        elif way.wants_text(request.target):
            request, handle = as_text(request, handle)
        return self._session.call(request, handle)

    def _ask_info(self) -> Json:
        offered = self.application().capabilities if self.proxy else None
        try:
            info, nine_only = self._look()
        except (NotFound, NotSupported):
            self._way = Way(offered=offered)
            self.body_limit.suit(coded=False)
            raise
        route = info.get("route")
        route = route if isinstance(route, dict) else {}
        text_only, limit = route.get("text_only") is True, route.get("answer_limit")
        self._way = Way("envelope" in info.get("extensions", ()), nine_only, text_only, offered)
        limits = info.get("limits")
        whole = limits.get("whole") if isinstance(limits, dict) else None
        self.body_limit.suit(
            coded=nine_only or text_only,
            answer_limit=limit if isinstance(limit, int) else None,
            whole=whole if isinstance(whole, int) else None,
        )
        self._learnt(info)
        return info

    def _look(self) -> tuple[Json, bool]:
        """Ask for what the gateway says about itself, without anything that a published one would take for a job.

        :return: that, and whether the way lets through nothing but the nine.
        """
        request = Request(self._route.target("getInfo"), repeatable=True)
        if self.proxy is None:
            return self._send_by(Way(), request, Answer.json), False
        application = self.application()
        refused: NotFound | NotSupported = NotSupported(
            f"the app {self.proxy.app_id} offers only what was published on {self.proxy.url}, and the gateway behind it is a "
            "classic one, which cannot do that"
        )
        if application.offers("getInfo"):
            try:
                return self._send_by(Way(), request, Answer.json), False
            except NotFound as exc:
                refused = exc
        if application.offers("heartbeat") and application.offers(CARRIER):
            # A published gateway makes a folder of a newTransformation that it does not understand; this it answers.
            beat = self._send_by(Way(), Request(self._route.target("heartbeat"), repeatable=True), Answer.json)
            if "envelope" in beat.get("extensions", ()):
                return self._send_by(Way(envelope=True, nine_only=True), request, Answer.json), True
        raise refused

    def _ask_offer(self) -> Json:
        if self.proxy is None:
            raise NotSupported(f"{self._route.url} is asked directly: only an app on the MarketPlace has a description")
        request = Request(self.proxy.application(), repeatable=True)
        url, app_id = self.proxy.url, self.proxy.app_id
        return ask_application(url, app_id, lambda: self._session.call(request, Answer.json))
