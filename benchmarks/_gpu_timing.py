"""Interleaved timing: every contestant once a round, in an order that turns, so that a drift of the chip meets all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Work = Callable[[], Any]


class Clock(Protocol):
    """Seconds that one call of `work` takes, measured over `calls` of them back to back."""

    def __call__(self, work: Work, calls: int) -> float: ...


def wall_clock(work: Work, calls: int) -> float:
    """For work whose results are on the host when it returns."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def event_clock(work: Work, calls: int) -> float:
    """For work on the GPU: two CUDA events in torch's stream.

    An engine computes in a stream of its own. What it returns is a DeviceArray, which torch's stream is told to wait
    for, so that the second event comes after the last result wherever that was computed.
    """
    stream = torch.cuda.current_stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record(stream)
    for _ in range(calls):
        result = work()
        if hasattr(result, "wait_in"):
            result.wait_in(stream.cuda_stream)
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


@dataclass(frozen=True)
class Timing:
    """Seconds a call in each round. `ratio` is the median over rounds of baseline / own: above 1 is faster.

    It is None where the baseline itself could not run.
    """

    seconds: tuple[float, ...]
    ratio: float | None

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The middle half of the rounds, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def calls_for(work: Work, clock: Clock, seconds: float) -> int:
    """Warm up, then: how many calls take about `seconds`."""
    for _ in range(3):
        work()
    return max(1, min(1000, math.ceil(seconds / max(clock(work, 1), 1e-6))))


def interleaved(
    works: Mapping[str, Work], clock: Clock, calls: Mapping[str, int], *, baseline: str, rounds: int
) -> dict[str, Timing]:
    """Time each of `works` once a round; the order turns by one from round to round."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(clock(works[name], calls[name]))
    base = seconds.get(baseline)
    return {name: Timing(tuple(own), _ratio(base, own)) for name, own in seconds.items()}


def _ratio(base: Sequence[float] | None, own: Sequence[float]) -> float | None:
    return None if base is None else statistics.median(b / a for a, b in zip(own, base, strict=True))
