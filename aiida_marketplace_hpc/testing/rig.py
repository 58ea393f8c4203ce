"""What is started for a test, and ended whatever comes of it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Rig(abc.ABC):
    """Something that is started and ended; a context manager."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start it, and wait until it can be used."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it, however far the start came, and remove what it has left. May be repeated."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
