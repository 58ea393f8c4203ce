"""A longer way to a port of this machine, as a process: ``python -m benchmarks.line PORT ROUND_TRIP``; prints its own port."""

from __future__ import annotations

import signal
import sys

from aiida_marketplace_hpc.testing.forwarder import Forwarder


def main() -> None:
    port, round_trip = int(sys.argv[1]), float(sys.argv[2])
    with Forwarder("127.0.0.1", port, round_trip=round_trip) as forwarder:
        print(forwarder.port, flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
