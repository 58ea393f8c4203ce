"""All commands together: importing this module makes them known to ``session.COMMANDS``."""

from __future__ import annotations

from aiida_marketplace_hpc.cli.shell import changing, content, going, listing, moving

__all__ = ["changing", "content", "going", "listing", "moving"]
