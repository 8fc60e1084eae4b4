"""Interleaved timing: every contestant once a round, in an order that turns, so that a drift of the machine meets all.

How many rounds there are is decided by a pilot whose times are thrown away. Stopping as soon as an interval looks
narrow enough would pick the rounds in which it happens to be, and the interval would promise too much.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.speed import CONFIDENCE, LEAST_ROUNDS, Ratio, summarize

__all__ = ["CONFIDENCE", "Clock", "Repeats", "Timing", "event_clock", "measure", "ratio", "rounds_needed", "wall_clock"]

Work: TypeAlias = Callable[[], object]
Seconds: TypeAlias = npt.NDArray[np.float64]

_WARMUP = 3
_PILOT_ROUNDS = LEAST_ROUNDS
_MOST_CALLS = 1000  # a round
_NORMAL = 1.96  # standard deviations that hold 95 % of a normal distribution
_MEDIAN = 1.2533  # sqrt(pi / 2): how many times the standard error of a mean that of a median is


class Clock(Protocol):
    """Seconds of each of `calls` calls of `work`, made back to back: [calls]."""

    def __call__(self, work: Work, calls: int) -> Seconds: ...


def wall_clock(work: Work, calls: int) -> Seconds:
    """For work whose results are on the host when it returns."""
    ticks = np.empty(calls + 1)
    ticks[0] = time.perf_counter()
    for call in range(calls):
        work()
        ticks[call + 1] = time.perf_counter()
    return np.diff(ticks)


def event_clock(work: Work, calls: int) -> Seconds:
    """For work on the GPU: a CUDA event in torch's stream before the first call, and one after each.

    An engine computes in a stream of its own. What it returns is a DeviceArray, which torch's stream is told to wait
    for, so that an event comes after its result wherever that was computed. Needs torch with CUDA.
    """
    import torch

    stream = torch.cuda.current_stream()
    make: Any = torch.cuda.Event  # which has no annotations
    events = [make(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record(stream)
    for event in events[1:]:
        result: Any = work()
        if hasattr(result, "wait_in"):
            result.wait_in(stream.cuda_stream)
        event.record(stream)
    events[-1].synchronize()
    # Milliseconds, between each and the next.
    return np.array([start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(events)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """How often to measure.

    A contestant is called for about `sample_seconds` a round, and there are as many rounds as it takes for half the
    interval of each median to be `error` of it, as far as the pilot can tell: at least LEAST_ROUNDS, at most
    `most_rounds`, and no more than last about `seconds` for each contestant.
    """

    error: float = 0.03
    sample_seconds: float = 0.1
    seconds: float = 5.0
    most_rounds: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call. `p50`, `p90`, `p99`, `mean` are over all calls; with fewer than 100, `p99` is the slowest.

    `median` is that of the rounds, each of which counts as its median call, so that one interrupted call weighs as much
    as any other. `low` and `high` end the interval that holds the true one with 95 % confidence; `spread` is half of
    the interquartile range of the rounds, as a fraction of `median`.
    """

    p50: float
    p90: float
    p99: float
    mean: float
    median: float
    low: float
    high: float
    spread: float
    rounds: int
    calls: int

    @classmethod
    def of(cls, seconds: Seconds) -> Timing:
        """What `seconds` [rounds, calls] say. Raises ValueError for fewer than LEAST_ROUNDS rounds."""
        p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99), method="inverted_cdf"))
        rounds = np.median(seconds, axis=1)
        median, (lower, upper) = float(np.median(rounds)), np.percentile(rounds, (25, 75))
        per_second = ratio(np.ones(seconds.shape), seconds)  # order statistics: their reciprocals are those of seconds
        return cls(
            p50=p50,
            p90=p90,
            p99=p99,
            mean=float(seconds.mean()),
            median=median,
            low=1 / per_second.high,
            high=1 / per_second.low,
            spread=float(upper - lower) / 2 / median,
            rounds=len(rounds),
            calls=seconds.size,
        )

    @property
    def error(self) -> float:
        """Half of the interval, as a fraction of the median: what the figure is good for."""
        return (self.high - self.low) / 2 / self.median


def ratio(baseline: Seconds, own: Seconds) -> Ratio:
    """How many times as fast as the baseline: times of the same rounds, [rounds, calls], one ratio a round."""
    first, second = np.median(baseline, axis=1), np.median(own, axis=1)
    return summarize(np.stack([first, second, second, first], axis=1))


def measure(works: Mapping[str, Work], clock: Clock, repeats: Repeats) -> dict[str, Seconds]:
    """Time each of `works`: seconds [rounds, calls] by name, the same rounds for all."""
    if not works:
        return {}
    calls = {name: _calls(work, clock, repeats.sample_seconds) for name, work in works.items()}
    start = time.perf_counter()
    pilot = _rounds(works, clock, calls, _PILOT_ROUNDS)
    a_round = (time.perf_counter() - start) / _PILOT_ROUNDS
    wanted = max(rounds_needed(np.median(seconds, axis=1), repeats.error) for seconds in pilot.values())
    affordable = int(repeats.seconds * len(works) / max(a_round, 1e-9))
    return _rounds(works, clock, calls, max(LEAST_ROUNDS, min(wanted, affordable, repeats.most_rounds)))


def rounds_needed(pilot: Seconds, error: float) -> int:
    """How many rounds make half of the median's 95 % interval `error` of it, if rounds vary as those of `pilot` [n].

    The standard error of a median of n normal values is sqrt(pi / 2) * s / sqrt(n).
    """
    deviation = float(np.std(pilot, ddof=1)) / float(np.median(pilot))
    return math.ceil((_NORMAL * _MEDIAN * deviation / error) ** 2)


def _calls(work: Work, clock: Clock, seconds: float) -> int:
    """Warm up, then: how many calls take about `seconds`."""
    for _ in range(_WARMUP):
        work()
    return max(1, min(_MOST_CALLS, math.ceil(seconds / max(float(clock(work, 1)[0]), 1e-6))))


def _rounds(works: Mapping[str, Work], clock: Clock, calls: Mapping[str, int], count: int) -> dict[str, Seconds]:
    names = list(works)
    found: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(count):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            # Not timed: it finds the caches full of another's weights, and its threads perhaps still spinning.
            works[name]()
            found[name].append(clock(works[name], calls[name]))
    return {name: np.stack(rows) for name, rows in found.items()}
