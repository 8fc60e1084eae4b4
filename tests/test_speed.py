"""Comparing speeds: on a clock that the calls themselves move, so that nothing here depends on the machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from clip_export.errors import SpeedError
from clip_export.speed import Ratio, compare_speed, require_faster, summarize


class Machine:
    """A clock; what runs on it takes the time that it says, and is written down."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ran: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, times: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(name)
            self.now += next(times)

        return run


def constant(first: float, second: float, **options: float) -> tuple[Ratio, Machine]:
    machine = Machine()
    calls = (machine.call(name, itertools.repeat(time)) for name, time in (("first", first), ("second", second)))
    return compare_speed(*calls, clock=machine.clock, **options), machine  # type: ignore[arg-type]


def noisy(ratio: float, noise: float, seed: int, rounds: int = 20) -> Ratio:
    """What rounds say when the second is `ratio` times as fast, and each call takes a random factor more or less."""
    factors = np.random.default_rng(seed).lognormal(0, noise, (rounds, 4))
    return summarize(factors * [ratio, 1, 1, ratio])


def test_constant_times() -> None:
    ratio, _ = constant(0.25, 0.125)
    assert (ratio.first, ratio.second, ratio.ratio, ratio.low, ratio.high) == (0.25, 0.125, 2, 2, 2)
    assert (ratio.first_spread, ratio.second_spread) == (0, 0)
    assert ratio.pays


@pytest.mark.parametrize("second", [0.25, 0.5])
def test_as_fast_or_slower_does_not_pay(second: float) -> None:
    assert not constant(0.25, second)[0].pays


def test_calls_are_interleaved_after_the_warm_up() -> None:
    ratio, machine = constant(1, 1, warmup=3, least=6, seconds=0)
    assert ratio.rounds == 6
    assert machine.ran == ["first", "second"] * 3 + ["first", "second", "second", "first"] * 6


def test_the_warm_up_is_not_measured() -> None:
    machine = Machine()
    first, second = (machine.call(name, itertools.chain([50, 20], itertools.repeat(0.5))) for name in ("a", "b"))
    ratio = compare_speed(first, second, warmup=2, clock=machine.clock)
    assert (ratio.first, ratio.second, ratio.low) == (0.5, 0.5, 1)


def test_time_says_how_many_rounds() -> None:
    assert constant(0.25, 0.25, seconds=8)[0].rounds == 8
    assert constant(0.25, 0.25, seconds=80, most=12)[0].rounds == 12
    assert constant(0.25, 0.25, seconds=1, least=9)[0].rounds == 9


def test_drift_cancels() -> None:
    machine, grows = Machine(), itertools.count(1.0, 0.25)  # both take longer with every call
    ratio = compare_speed(machine.call("first", grows), machine.call("second", grows), clock=machine.clock, most=20)
    assert (ratio.ratio, ratio.low, ratio.high) == (1, 1, 1)


def test_a_disturbed_round_decides_nothing() -> None:
    times = np.tile([2.0, 1.0, 1.0, 2.0], (20, 1))
    times[7, 1] = times[11, 2] = 1000
    assert summarize(times).pays and summarize(times).ratio == 2
    times = np.tile([1.0, 1.0, 1.0, 1.0], (20, 1))
    times[7, 0] = 1000
    assert not summarize(times).pays


# The ranks of the interval, from a table of the sign test: Conover, or scipy.stats.binom.
@pytest.mark.parametrize(("rounds", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6), (25, 8)])
def test_the_interval_is_that_of_the_sign_test(rounds: int, rank: int) -> None:
    times = np.ones((rounds, 4))
    times[:, [0, 3]] = np.random.default_rng(0).permutation(np.arange(1.0, rounds + 1))[:, None]
    ratio = summarize(times)
    assert (ratio.low, ratio.high) == (rank, rounds + 1 - rank)


def test_noise_alone_seldom_pays_and_speed_does() -> None:
    # One side of a 95 % interval is 2.5 %; of 2000 draws, 50 on average, and more than 80 once in 30,000 times.
    assert 0 < sum(noisy(1, 0.1, seed).pays for seed in range(2000)) <= 80
    assert all(noisy(1.5, 0.1, seed).pays for seed in range(200))
    holds = [noisy(1.1, 0.1, seed) for seed in range(2000)]
    assert sum(ratio.low <= 1.1 <= ratio.high for ratio in holds) >= 0.95 * 2000 - 30


def test_the_same_times_give_the_same_answer() -> None:
    assert noisy(1.2, 0.2, 5) == noisy(1.2, 0.2, 5)


@pytest.mark.parametrize(("least", "most"), [(5, 200), (9, 8)])
def test_too_few_rounds_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match="expected 6 <= least <= most"):
        constant(1, 1, least=least, most=most)


def test_five_rounds_have_no_interval() -> None:
    with pytest.raises(ValueError, match="expected at least 6 rounds, found 5"):
        summarize(np.ones((5, 4)))


def test_faster_at_every_batch_is_let_through() -> None:
    require_faster({1: constant(0.2, 0.1)[0], 8: constant(1, 0.5)[0]}, candidate="int8", baseline="fp32")


def test_slower_at_one_batch_is_refused_with_all_figures() -> None:
    measured = {1: constant(0.25, 0.5, seconds=12)[0], 8: constant(1, 0.5, seconds=18)[0]}
    with pytest.raises(SpeedError) as caught:
        require_faster(measured, candidate="int8 image tower, onnxruntime on cpu", baseline="fp32")
    assert caught.value.message == (
        "expected int8 image tower, onnxruntime on cpu to be faster than fp32, measured "
        "batch 1: 500.00 ± 0.00 ms against 250.00 ± 0.00 ms, 0.50 times as fast (95%: 0.50 to 0.50, 8 rounds); "
        "batch 8: 500.00 ± 0.00 ms against 1000.00 ± 0.00 ms, 2.00 times as fast (95%: 2.00 to 2.00, 6 rounds)"
    )
    assert caught.value.hint == "leave this precision out, or have it all the same: --allow-slower"
