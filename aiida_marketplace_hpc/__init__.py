"""Run AiiDA on clusters that can be reached only through a web gateway, and run that gateway.

The rooms, and which way data flows::

    AiiDA engine ─ transport.py, scheduler.py ─ client/ ── HTTP ── gateway/ ─ gateway/backends/ ── cluster
                                                   └── protocol.py, bundle.py, errors.py ──┘
                                                        (the wire: known to both sides)

``protocol`` is the table of everything that can be asked of a gateway, ``bundle`` the format in which files travel,
``errors`` the one tree of what can go wrong. ``cli`` is the command line of both sides, ``demo`` a study that shows the
whole chain, and ``testing`` holds the fixtures that the project's own tests use, for the tests of others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["HpcGateway", "__version__", "get_app"]

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.application import get_app
    from aiida_marketplace_hpc.client.gateway import HpcGateway


def __getattr__(name: str) -> Any:
    # Deferred: the gateway's processes and AiiDA's entry-point scan import this package without wanting an HTTP client.
    if name == "HpcGateway":
        from aiida_marketplace_hpc.client.gateway import HpcGateway

        return HpcGateway
    if name == "get_app":
        from aiida_marketplace_hpc.client.application import get_app

        return get_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
