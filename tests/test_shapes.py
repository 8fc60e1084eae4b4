"""Profiles: every batch and length that a user may send has one, and no two overlap."""

from __future__ import annotations

import dataclasses

import pytest
import specs_made
from hypothesis import given
from hypothesis import strategies as st

from clip_export.errors import InputError
from clip_export.shapes import batch_bounds, profiles

_TINY = specs_made.tiny_spec()
assert _TINY.text is not None
assert _TINY.tokenizer is not None
SPEC = dataclasses.replace(
    _TINY,
    text=dataclasses.replace(_TINY.text, context_length=77),
    tokenizer=dataclasses.replace(_TINY.tokenizer, context_length=77),
)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.lists(st.integers(1, 77), max_size=4),
    st.integers(1, 40),
    st.integers(1, 77),
)
def test_every_shape_within_the_bounds_has_a_profile(
    batches: list[int], lengths: list[int], batch: int, length: int
) -> None:
    bounds = batch_bounds(batches, None)
    made = profiles(SPEC, "text", sequence_dynamic=True, batches=bounds, lengths=lengths)
    holding = [p for p in made if p["input_ids"].holds((batch, length)) and p["eot_index"].holds((batch,))]
    # One profile each, but for a batch of two, which the profile for one takes as well.
    assert (len(holding) > 0) == (batch <= bounds[-1] or (batch == 2 and bounds[-1] == 1))
    assert len(holding) <= 1 + (batch == 2)


def test_no_text_profile_is_for_a_batch_of_one_alone() -> None:
    made = profiles(SPEC, "text", sequence_dynamic=True, batches=(1, 8))
    assert [(p["input_ids"].min[0], p["input_ids"].opt[0], p["input_ids"].max[0]) for p in made] == [
        (1, 1, 2),
        (1, 1, 2),
        (2, 8, 8),
        (2, 8, 8),
    ]
    assert all(p["eot_index"].max[0] == p["input_ids"].max[0] for p in made)


def test_kernels_are_chosen_for_the_end_of_a_range() -> None:
    text = profiles(SPEC, "text", sequence_dynamic=True, batches=(1, 8))
    assert [(p["input_ids"].min, p["input_ids"].opt) for p in text] == [
        ((1, 1), (1, 16)),
        ((1, 17), (1, 77)),
        ((2, 1), (8, 16)),
        ((2, 17), (8, 77)),
    ]
    image = profiles(SPEC, "image", sequence_dynamic=False, batches=(4,))
    assert [p["pixels"].opt for p in image] == [(4, 3, 32, 32)]


def test_a_text_that_may_not_be_trimmed_has_its_whole_context() -> None:
    made = profiles(SPEC, "text", sequence_dynamic=False, batches=(1,))
    assert [(p["input_ids"].min, p["input_ids"].max) for p in made] == [((1, 77), (2, 77))]


@pytest.mark.parametrize(
    ("batches", "most", "expected"),
    [
        (None, None, (1, 8, 64)),
        (None, 8, (1, 8)),
        (None, 4, (1, 4)),
        (None, 100, (1, 8, 64, 100)),
        ([8, 2, 8], None, (2, 8)),
    ],
)
def test_batch_bounds(batches: list[int] | None, most: int | None, expected: tuple[int, ...]) -> None:
    assert batch_bounds(batches, most) == expected


@pytest.mark.parametrize(
    ("batches", "most", "message"),
    [
        ([0], None, "expected a batch profile from 1 to 4096, found 0"),
        ([1, 5000], None, "found 5000"),
        (None, -1, "expected max batch from 1 to 4096, found -1"),
        ([], None, "expected at least one batch profile"),
        ([1, 16], 8, "batch profile 16 is above the max batch 8"),
    ],
)
def test_bounds_that_cannot_be(batches: list[int] | None, most: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch_bounds(batches, most)


@pytest.mark.parametrize("length", [0, 78, -3])
def test_a_length_outside_the_context(length: int) -> None:
    with pytest.raises(InputError, match=rf"sequence profile {length} is outside 1\.\.77") as caught:
        profiles(SPEC, "text", sequence_dynamic=True, batches=(1,), lengths=(length,))
    assert caught.value.hint == "the model's context has 77 tokens"
