"""Which of two is faster, so that noise does not decide it.

Both run in turn, and each round gives one ratio: a machine that slows down slows both. What is said of the ratio is its
median, with the confidence interval that the sign test gives. That assumes nothing of how times are distributed, only
that a round is as likely above the true median as below, and needs no random numbers: the same times, the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb

import numpy as np

from clip_export.errors import SpeedError

CONFIDENCE = 0.95
LEAST_ROUNDS = 6  # the fewest whose smallest and largest ratio hold the median with 95 %: 1 - 2 / 2^6


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as fast as the first the second is, in the median over `rounds`.

    `low` and `high` end the interval that holds the true median with at least 95 % confidence. `first` and `second` are
    the medians of one call in seconds; their spreads are halves of the interquartile range.
    """

    first: float
    second: float
    first_spread: float
    second_spread: float
    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def pays(self) -> bool:
        """Whether the second is faster beyond noise: the whole interval is above 1."""
        return self.low > 1


def compare_speed(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    seconds: float = 3.0,
    least: int = LEAST_ROUNDS,
    most: int = 200,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Call both in turn for about `seconds`: `least` to `most` rounds, after `warmup` calls of each.

    A call ends when its result is there: one that only starts work on a GPU has to wait for it. A round is first,
    second, second, first, so that a drift within it cancels and each follows itself as often as the other. How many
    rounds there are depends on the time alone, never on what they gave. Raises ValueError for fewer rounds than the
    interval needs.
    """
    if not LEAST_ROUNDS <= least <= most:
        raise ValueError(f"expected {LEAST_ROUNDS} <= least <= most, found {least} and {most}")
    for _ in range(warmup):
        first()
        second()
    calls = (first, second, second, first)
    rounds: list[list[float]] = []
    end = clock() + seconds
    while len(rounds) < least or (len(rounds) < most and clock() < end):
        rounds.append([_timed(call, clock) for call in calls])
    return summarize(np.array(rounds))


def summarize(times: np.ndarray) -> Ratio:
    """What rounds say: `times` in seconds [rounds, 4], the calls of a round as `compare_speed` orders them."""
    firsts, seconds = times[:, [0, 3]], times[:, [1, 2]]
    ratios = np.sort(firsts.sum(axis=1) / seconds.sum(axis=1))
    outside = _ranks_outside(len(ratios))
    return Ratio(
        first=float(np.median(firsts)),
        second=float(np.median(seconds)),
        first_spread=_spread(firsts),
        second_spread=_spread(seconds),
        ratio=float(np.median(ratios)),
        low=float(ratios[outside]),
        high=float(ratios[-1 - outside]),
        rounds=len(ratios),
    )


def require_faster(measured: Mapping[int, Ratio], *, candidate: str, baseline: str) -> None:
    """Raise SpeedError unless `candidate` is faster than `baseline` at every batch size of `measured`.

    The first of a ratio is the baseline. Both are named as a user knows them: "the int8 image tower on tensorrt".
    """
    if all(ratio.pays for ratio in measured.values()):
        return
    rows = "; ".join(f"batch {batch}: {_row(ratio)}" for batch, ratio in measured.items())
    raise SpeedError(
        f"expected {candidate} to be faster than {baseline}, measured {rows}",
        hint="leave this precision out, or have it all the same: --allow-slower",
    )


def _timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _ranks_outside(count: int) -> int:
    """How many of `count` sorted values lie below the interval, and as many above it.

    The median is below the k-th smallest value with probability P(at most k - 1 of `count` fair coins show heads):
    Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2.
    """
    tail, outside = 0.0, -1
    while (tail := tail + comb(count, outside + 1) / 2**count) <= (1 - CONFIDENCE) / 2:
        outside += 1
    if outside < 0:
        raise ValueError(f"expected at least {LEAST_ROUNDS} rounds, found {count}")
    return outside


def _spread(times: np.ndarray) -> float:
    lower, upper = np.percentile(times, (25, 75))
    return float(upper - lower) / 2


def _row(ratio: Ratio) -> str:
    second, first = _milliseconds(ratio.second, ratio.second_spread), _milliseconds(ratio.first, ratio.first_spread)
    interval = f"{CONFIDENCE:.0%}: {ratio.low:.2f} to {ratio.high:.2f}, {ratio.rounds} rounds"
    return f"{second} against {first}, {ratio.ratio:.2f} times as fast ({interval})"


def _milliseconds(median: float, spread: float) -> str:
    return f"{median * 1e3:.2f} ± {spread * 1e3:.2f} ms"
