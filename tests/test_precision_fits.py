"""The limits of the half types, and what rounding does to products."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_export.precision.fits import (
    HALF_TYPES,
    HEADROOM,
    HalfType,
    constant_misfit,
    operand_misfit,
    size_misfit,
    tensor_misfit,
    weights_misfit,
)

FP16, BF16 = HALF_TYPES["fp16"], HALF_TYPES["bf16"]
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(0, 0.05, (64, 96)).astype(np.float32)
CHANNELS = RNG.uniform(1, 4, 64)


@pytest.mark.parametrize(("half", "dtype"), [(FP16, torch.float16), (BF16, torch.bfloat16)])
def test_limits_are_those_of_the_type(half: HalfType, dtype: torch.dtype) -> None:
    facts = torch.finfo(dtype)
    assert (half.eps, half.largest, half.smallest_normal) == (facts.eps, facts.max, facts.tiny)
    assert half.smallest == facts.tiny * facts.eps


@given(arrays.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False)))
def test_rounding_is_torchs(values: np.ndarray) -> None:
    for half, dtype in ((FP16, torch.float16), (BF16, torch.bfloat16)):
        expected = torch.from_numpy(values).to(dtype).float().numpy()
        np.testing.assert_array_equal(half.round(values).astype(np.float32), expected)


def test_tensors_overflow_vanish_or_fit() -> None:
    largest = FP16.largest / HEADROOM
    assert tensor_misfit(FP16, "t", largest) is None
    assert tensor_misfit(FP16, "t", 0.0) is None
    for value in (largest * 1.001, float("inf"), float("nan")):
        found = tensor_misfit(FP16, "t", value)
        assert found is not None and (found.reason, found.limit) == ("overflow", largest)
    small = tensor_misfit(FP16, "t", 2.0**-13)
    assert small is not None and (small.reason, small.value, small.limit) == ("underflow", 2.0**-13, 2.0**-12)
    assert tensor_misfit(BF16, "t", 1e30) is None
    assert size_misfit(BF16, "t", 1e-30) is None


def test_plain_weights_and_operands_fit() -> None:
    for half in (FP16, BF16):
        assert weights_misfit(half, "w", WEIGHTS, CHANNELS) is None
        assert operand_misfit(half, "x", WEIGHTS, CHANNELS) is None


def test_rows_that_vanish_beside_large_activations_are_harm() -> None:
    weights, channels = WEIGHTS.copy(), CHANNELS.copy()
    weights[::4] /= 1e5
    assert weights_misfit(FP16, "w", weights, channels) is None  # they contribute nothing
    channels[::4] *= 1e5
    found = weights_misfit(FP16, "w", weights, channels)
    assert found is not None and found.reason == "underflow" and found.value > found.limit == FP16.eps
    assert weights_misfit(BF16, "w", weights, channels) is None


def test_outputs_that_vanish_are_harm_unless_they_are_few() -> None:
    weights = WEIGHTS.copy()
    weights[:, :4] *= 1e-7
    assert weights_misfit(FP16, "w", weights, CHANNELS) is None  # 4 of 96: neurons that died
    weights[:, :32] = WEIGHTS[:, :32] * 1e-7
    found = weights_misfit(FP16, "w", weights, CHANNELS)
    assert found is not None and found.value == pytest.approx(1)


def test_weights_that_overflow() -> None:
    weights = WEIGHTS.copy()
    weights[0, 0] = 7e4
    found = weights_misfit(FP16, "w", weights, CHANNELS)
    assert found is not None and (found.reason, found.value, found.limit) == ("overflow", 7e4, 65504)


def test_activations_that_vanish_before_large_weights_are_harm() -> None:
    weights, channels = WEIGHTS.copy(), CHANNELS.copy()
    channels[::4] *= 1e-6
    assert operand_misfit(FP16, "x", weights, channels) is None
    weights[::4] *= 1e6
    found = operand_misfit(FP16, "x", weights, channels)
    assert found is not None and found.reason == "underflow" and found.value > found.limit == FP16.eps
    assert operand_misfit(BF16, "x", weights, channels) is None


def test_what_is_always_zero_does_no_harm() -> None:
    assert operand_misfit(FP16, "x", WEIGHTS, np.zeros(64)) is None
    assert weights_misfit(FP16, "w", np.zeros_like(WEIGHTS), CHANNELS) is None
    assert constant_misfit(FP16, "c", np.zeros(4, dtype=np.float32)) is None


def test_constants_are_judged_by_themselves_or_by_the_sum_they_go_into() -> None:
    tiny = np.array([1e-8, 3e-8], dtype=np.float32)
    found = constant_misfit(FP16, "c", tiny)
    assert found is not None and found.reason == "underflow"
    assert constant_misfit(FP16, "c", tiny, scale=1.0) is None
    large = constant_misfit(FP16, "c", np.array([1e5], dtype=np.float32), scale=1.0)
    assert large is not None and large.reason == "overflow"


@given(scale=st.floats(-5, 5), seed=st.integers(0, 100))
def test_what_passes_is_off_by_little(scale: float, seed: int) -> None:
    """Half of the channels times 10^scale and their weights divided by it: what both checks pass is a good product."""
    rng = np.random.default_rng(seed)
    factor = np.where(np.arange(64) % 2, 10.0**scale, 1.0)
    x = (rng.standard_normal((200, 64)) * factor).astype(np.float32)
    weights = (WEIGHTS / factor[:, None]).astype(np.float32)
    channels = np.abs(x).max(axis=0).astype(np.float64)
    if tensor_misfit(FP16, "x", float(channels.max())) or weights_misfit(FP16, "w", weights, channels):
        return
    if operand_misfit(FP16, "x", weights, channels):
        return
    exact = x.astype(np.float64) @ weights.astype(np.float64)
    rounded = FP16.round(x).astype(np.float64) @ FP16.round(weights).astype(np.float64)
    assert np.linalg.norm(rounded - exact) <= 8 * FP16.eps * np.linalg.norm(exact)
