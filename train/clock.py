"""Where a step's time goes."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Splits time into named parts, at marks that cost nothing on the way.

    On a GPU marks are events in its queue, so a part is the time that the GPU spent on it or waited
    in it; on a CPU they are the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Forget all marks; the first part begins."""
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """The time since the last mark belongs to `part`, which may have several stretches."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by part since `start`; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for (_, since), (part, until) in zip(self._marks[:-1], self._marks[1:], strict=True):
            parts[part] = parts.get(part, 0.0) + self._between(since, until)
        return parts

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, since: Any, until: Any) -> float:
        return float(since.elapsed_time(until) / 1000 if self._on_gpu else until - since)
