"""Peak memory of a process and all it has started."""

from __future__ import annotations

import threading

import psutil


class PeakMemory:
    """Samples the memory that this process and all it started take, as a context manager.

    Attributes:
        first_bytes: at the start.
        peak_bytes: the most that was seen.
    """

    def __init__(self, seconds_between: float) -> None:
        self._seconds_between = (
            seconds_between  # one sample of a Ray's processes takes 0.05 CPU seconds
        )

    def __enter__(self) -> PeakMemory:
        self.first_bytes = self.peak_bytes = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._seconds_between):
            self.peak_bytes = max(self.peak_bytes, self._now())

    @staticmethod
    def _now() -> int:
        """Proportional set size, so that the object store, which is shared, counts once."""
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total
