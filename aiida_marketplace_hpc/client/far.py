"""What is behind a gateway's address: a gateway of this package, or a classic one, which has only the nine capabilities.

Both have a disk (:class:`~aiida_marketplace_hpc.client.files.RemoteDisk`) and jobs (the methods that
:class:`~aiida_marketplace_hpc.client.gateway.HpcGateway` has for them).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from aiida_marketplace_hpc.client.classic.disk import ClassicDisk
from aiida_marketplace_hpc.client.classic.gateway import ClassicGateway
from aiida_marketplace_hpc.client.classic.jobs import ClassicJobs
from aiida_marketplace_hpc.client.files import RemoteDisk
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.info import INFO_AGE


class FarSide:
    """The far side of a gateway; which one it is may take a request, and is asked again from time to time.

    :param threads: how many requests may be under way at once.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, gateway: HpcGateway, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._gateway = gateway
        self._threads = threads
        self._clock = clock
        self._disk = RemoteDisk(gateway)
        self._lock = threading.Lock()
        self._classic: tuple[ClassicGateway, ClassicDisk, ClassicJobs] | None = None
        self._classic_until = -1.0

    @property
    def disk(self) -> RemoteDisk:
        """The cluster's disk."""
        classic = self._if_classic()
        return self._disk if classic is None else classic[1]

    @property
    def jobs(self) -> HpcGateway | ClassicJobs:
        """The cluster's jobs."""
        classic = self._if_classic()
        return self._gateway if classic is None else classic[2]

    def close(self) -> None:
        """Close what was opened for a classic gateway."""
        with self._lock:
            if self._classic is not None:
                self._classic[2].close()
                self._classic[0].close()
            self._classic = None
            self._classic_until = -1.0

    def _if_classic(self) -> tuple[ClassicGateway, ClassicDisk, ClassicJobs] | None:
        if self._clock() < self._classic_until:
            return self._classic
        if self._gateway.extensions():
            return None
        with self._lock:
            if self._classic is None:
                classic = ClassicGateway(self._gateway)
                disk = ClassicDisk(self._gateway, classic)
                self._classic = classic, disk, ClassicJobs(classic, disk, threads=self._threads)
            made = self._classic
        # Another gateway of ours, too, has nothing but the nine for a moment, when a proxy's way to it is closed: this asks.
        made[0].account()
        self._classic_until = self._clock() + INFO_AGE
        return made
