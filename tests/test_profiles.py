"""Which profile runs a batch, and how a batch is cut: on examples, and for any profiles by what must always hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_export.backends.building import Profile, ShapeRange
from clip_export.backends.profiles import choose, limits, padded, smallest, split
from clip_export.errors import InputError


def span(low: int, high: int, *rest: int, opt: int | None = None) -> ShapeRange:
    return ShapeRange(min=(low, *rest), opt=(opt or high, *rest), max=(high, *rest))


def pixels(*batches: tuple[int, int]) -> list[Profile]:
    return [{"pixels": span(low, high, 3)} for low, high in batches]


DEFAULT = pixels((1, 1), (2, 8), (9, 64))
ONE = {"pixels": (3,)}


def text(low: int, high: int, short: int, long: int) -> Profile:
    ids = ShapeRange(min=(low, short), opt=(high, long), max=(high, long))
    return {"input_ids": ids, "eot_index": span(low, high)}


TEXT = [text(1, 8, 1, 16), text(1, 8, 17, 77), text(9, 64, 1, 16), text(9, 64, 17, 77)]


def runs(rows: int, profiles: list[Profile], cap: int | None = None) -> list[tuple[int, int, int]]:
    return [(part.rows, part.size, part.profile) for part in split(rows, profiles, ONE, cap=cap)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [(1, 1, 0)]),
        (2, [(2, 2, 1)]),
        (8, [(8, 8, 1)]),
        (9, [(9, 9, 2)]),
        (64, [(64, 64, 2)]),
        (65, [(64, 64, 2), (1, 1, 0)]),  # the last has a profile of its own
        (130, [(64, 64, 2), (64, 64, 2), (2, 2, 1)]),
        (128, [(64, 64, 2), (64, 64, 2)]),
        (100, [(50, 50, 2), (50, 50, 2)]),  # both would be large: equally so
    ],
)
def test_batches_of_the_default_profiles(rows: int, expected: list[tuple[int, int, int]]) -> None:
    assert runs(rows, DEFAULT) == expected


def test_a_batch_beyond_a_single_profile_is_cut_evenly() -> None:
    assert runs(130, pixels((1, 64))) == [(44, 44, 0), (43, 43, 0), (43, 43, 0)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (3, [(3, 4, 0)]),  # below every profile: padded
        (4, [(4, 4, 0)]),
        (5, [(3, 4, 0), (2, 4, 0)]),  # 64 would be twelve times the work
        (20, [(4, 4, 0)] * 5),  # 64 is more than twice the work
        (40, [(40, 64, 1)]),  # 64 is less than twice the work
        (66, [(64, 64, 1), (2, 4, 0)]),
    ],
)
def test_fixed_sizes(rows: int, expected: list[tuple[int, int, int]]) -> None:
    assert runs(rows, pixels((4, 4), (64, 64))) == expected


def test_a_cap_keeps_every_run_small() -> None:
    assert runs(64, DEFAULT, cap=32) == [(32, 32, 2), (32, 32, 2)]
    assert runs(9, DEFAULT, cap=8) == [(8, 8, 1), (1, 1, 0)]
    with pytest.raises(InputError, match="no profile runs 3 rows or fewer"):
        runs(9, pixels((4, 8)), cap=3)


def test_the_tightest_profile_is_chosen_and_of_equal_ones_the_nearest() -> None:
    assert choose(TEXT, {"input_ids": (4, 12), "eot_index": (4,)}) == 0
    assert choose(TEXT, {"input_ids": (4, 20), "eot_index": (4,)}) == 1
    assert choose(TEXT, {"input_ids": (65, 12), "eot_index": (65,)}) is None
    assert choose(TEXT, {"input_ids": (4, 12)}) is None
    assert choose([{"pixels": span(1, 64, opt=8)}, {"pixels": span(1, 8, opt=1)}], {"pixels": (8,)}) == 1
    same = [{"pixels": span(1, 64, opt=64)}, {"pixels": span(1, 64, opt=2)}]
    assert choose(same, {"pixels": (60,)}) == 0
    assert choose(same, {"pixels": (3,)}) == 1


def test_a_sequence_outside_the_profiles_says_which_axis_and_what_to_do() -> None:
    with pytest.raises(InputError, match=r"input_ids: 90 on axis 1 is outside the profiles 1\.\.77") as caught:
        split(4, TEXT, {"input_ids": (90,), "eot_index": ()})
    assert caught.value.hint == "build the plan again with a profile that holds it"
    with pytest.raises(InputError, match="pixels: expected 3 on axis 1, found 4"):
        split(4, DEFAULT, {"pixels": (4,)})
    with pytest.raises(InputError, match="pixels: expected 2 axes, found 3"):
        split(4, DEFAULT, {"pixels": (3, 3)})
    with pytest.raises(InputError, match="expected inputs pixels, found image"):
        split(4, DEFAULT, {"image": (3,)})
    gap = [{"x": ShapeRange(min=(1, 1, 1), opt=(1, 1, 9), max=(1, 1, 9))}]
    gap += [{"x": ShapeRange(min=(1, 9, 9), opt=(1, 9, 9), max=(1, 9, 9))}]
    with pytest.raises(InputError, match=r"no single profile holds x \[rows, 4, 4\]"):
        split(1, gap, {"x": (4, 4)})


def test_limits_span_all_profiles() -> None:
    found = limits(TEXT)
    assert (found["input_ids"].min, found["input_ids"].max) == ((1, 1), (64, 77))
    assert (found["eot_index"].min, found["eot_index"].max) == ((1,), (64,))


def test_padding_alone() -> None:
    assert padded(9, DEFAULT, ONE) == 9
    assert padded(2, pixels((4, 8)), ONE) == 4
    assert padded(65, DEFAULT, ONE) is None
    assert smallest(pixels((4, 8), (2, 3)), ONE) == 2
    assert smallest(DEFAULT, {"pixels": (4,)}) is None


@st.composite
def batch_ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    lows = draw(st.lists(st.integers(1, 80), min_size=1, max_size=4))
    return [(low, low + draw(st.integers(0, 40))) for low in lows]


@given(ranges=batch_ranges(), rows=st.integers(1, 400))
def test_every_row_is_run_once_by_a_profile_that_holds_it(ranges: list[tuple[int, int]], rows: int) -> None:
    profiles = pixels(*ranges)
    parts = split(rows, profiles, ONE)
    assert sum(part.rows for part in parts) == rows
    for part in parts:
        assert 1 <= part.rows <= part.size
        assert profiles[part.profile]["pixels"].holds((part.size, 3))
        assert part.size == part.rows or not any(low <= part.rows <= high for low, high in ranges)


@given(ranges=batch_ranges(), rows=st.integers(1, 400), cap=st.integers(1, 120))
def test_a_cap_holds_for_padding_too(ranges: list[tuple[int, int]], rows: int, cap: int) -> None:
    profiles = pixels(*ranges)
    if all(low > cap for low, _ in ranges):
        with pytest.raises(InputError, match=f"no profile runs {cap} rows"):
            split(rows, profiles, ONE, cap=cap)
        return
    parts = split(rows, profiles, ONE, cap=cap)
    assert sum(part.rows for part in parts) == rows
    assert all(part.size <= cap for part in parts)


@given(high=st.integers(1, 64), rows=st.integers(1, 400))
def test_no_more_runs_than_needed(high: int, rows: int) -> None:
    parts = split(rows, pixels((1, high)), ONE)
    assert len(parts) == -(-rows // high)
    assert max(part.rows for part in parts) - min(part.rows for part in parts) <= 1 or len(parts) == 1
