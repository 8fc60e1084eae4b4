"""Limits of activations: each method against a direct computation, and all of them on any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnxruntime.quantization.calibrate import HistogramCollector

from clip_export.errors import ExportError, InputError
from clip_export.precision.formats import FORMATS, Format
from clip_export.precision.scales import METHODS, RATIOS, activation_limit

INT8, FP8 = FORMATS["int8"], FORMATS["fp8"]
# Entropy loops over a thousand thresholds in Python, so it has examples of its own.
QUICK = [(method, format_) for method in METHODS if method != "entropy" for format_ in FORMATS.values()]
SAMPLES = ("bell", "outlier channels", "rare outliers", "QuickGELU", "heavy tails")

any_rows = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


def sample(name: str) -> np.ndarray:
    """Activations of a known kind, float32 [256, 192]."""
    generator = np.random.default_rng(SAMPLES.index(name))
    rows = generator.standard_normal((256, 192))
    if name == "outlier channels":
        rows[:, :3] *= 40
    elif name == "rare outliers":
        rows[::100, 7] *= 300
    elif name == "QuickGELU":
        rows = 2 * rows / (1 + np.exp(-3.404 * rows))
    elif name == "heavy tails":
        rows = generator.standard_t(2, rows.shape)
    return rows.astype(np.float32)


def largest_of(rows: np.ndarray) -> np.ndarray:
    return np.abs(rows).max(axis=0)


def error(rows: np.ndarray, limit: float, format_: Format) -> float:
    """The mean squared error of all of `rows`, one by one."""
    held = format_.quantize(rows, limit / format_.largest)
    return float(np.mean(np.square(held.astype(np.float64) - rows)))


@given(rows=any_rows, case=st.sampled_from(QUICK))
def test_a_limit_is_positive_and_cuts_nothing_that_is_not_there(rows: np.ndarray, case: tuple[str, Format]) -> None:
    method, format_ = case
    limit = activation_limit(rows, largest_of(rows), method, format_)
    top = float(np.abs(rows).max())
    assert 0 < limit <= (top if top >= 2.0**-100 else format_.largest)
    assert np.float32(limit / format_.largest) >= np.finfo(np.float32).tiny


@given(rows=any_rows, case=st.sampled_from(QUICK), exponent=st.integers(-20, 10))
def test_a_limit_is_in_the_units_of_the_rows(rows: np.ndarray, case: tuple[str, Format], exponent: int) -> None:
    method, format_ = case
    if np.abs(rows).max() < 1e-12:
        rows = rows + np.float32(1)
    factor = np.float32(2.0**exponent)
    limit = activation_limit(rows, largest_of(rows), method, format_)
    scaled = activation_limit(rows * factor, largest_of(rows * factor), method, format_)
    assert scaled == pytest.approx(limit * float(factor), rel=1e-5)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_finds_the_least_error(name: str, format_: Format) -> None:
    rows = sample(name)
    top = float(np.abs(rows).max())
    limit = activation_limit(rows, largest_of(rows), "mse", format_)
    best = min(error(rows, top * ratio, format_) for ratio in RATIOS.tolist())
    assert error(rows, limit, format_) <= best * 1.001


@pytest.mark.parametrize("name", SAMPLES)
def test_hardly_anything_lies_between_the_ratios(name: str) -> None:
    rows = sample(name)
    top = float(np.abs(rows).max())
    limit = activation_limit(rows, largest_of(rows), "mse", INT8)
    between = min(error(rows, top * ratio, INT8) for ratio in np.linspace(0.02, 1, 200).tolist())
    assert error(rows, limit, INT8) <= between * 1.03


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_better_than_nothing_cut_off(name: str) -> None:
    rows = sample(name)
    limits = {method: activation_limit(rows, largest_of(rows), method, INT8) for method in ("mse", "minmax")}
    assert error(rows, limits["mse"], INT8) < error(rows, limits["minmax"], INT8)


def test_minmax_knows_what_the_sample_missed() -> None:
    rows = sample("bell")
    largest = largest_of(rows)
    largest[3] = 50
    assert activation_limit(rows, largest, "minmax", INT8) == 50
    assert activation_limit(rows, largest, "percentile", INT8) < 10


@pytest.mark.parametrize("name", SAMPLES)
def test_percentile_is_that_of_the_values_and_near_onnxruntimes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sample(name)
    limit = activation_limit(rows, largest_of(rows), "percentile", INT8)
    above = np.count_nonzero(np.abs(rows) > limit)
    assert above == pytest.approx(1e-4 * rows.size, abs=1)
    assert capsys.readouterr().out == ""
    collector = HistogramCollector("percentile", True, 2048, 128, 99.99, "same")
    collector.collect({"x": rows})
    _, theirs, *_ = collector.compute_collection_result()["x"]
    # It gives an edge of a bin that is empty or not: as far off as two neighbours among the values are.
    ordered = np.sort(np.abs(rows), axis=None)
    gap = np.diff(ordered[np.searchsorted(ordered, min(limit, theirs)) - 1 :][:8]).max()
    assert abs(limit - theirs) <= gap + 2 * ordered[-1] / 2048


@pytest.mark.parametrize("name", ["bell", "QuickGELU"])
def test_entropy_is_onnxruntimes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sample(name)
    limit = activation_limit(rows, largest_of(rows), "entropy", INT8)
    assert capsys.readouterr().out == ""
    collector = HistogramCollector("entropy", True, 2048, 255, 99.99, "same")
    collector.collect({"x": rows})
    low, high, *_ = collector.compute_collection_result()["x"]
    assert limit == max(abs(low), abs(high))
    assert 0 < limit <= np.abs(rows).max()


@settings(max_examples=5)
@given(rows=any_rows)
def test_entropy_takes_any_rows(rows: np.ndarray) -> None:
    limit = activation_limit(rows, largest_of(rows), "entropy", INT8)
    assert 0 < limit <= max(float(np.abs(rows).max()), INT8.largest)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_have_a_scale_of_one(method: str) -> None:
    rows = np.zeros((4, 3), dtype=np.float32)
    assert activation_limit(rows, largest_of(rows), method, INT8) == INT8.largest


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_of_zeros_falls_back_to_what_was_seen(method: str) -> None:
    rows = np.zeros((4, 3), dtype=np.float32)
    limit = activation_limit(rows, np.array([0, 7, 0], dtype=np.float32), method, INT8)
    assert 0 < limit <= 7


def test_entropy_of_a_floating_format_means_nothing() -> None:
    rows = sample("bell")
    with pytest.raises(InputError, match="the method entropy compares equal steps, and those of fp8 grow"):
        activation_limit(rows, largest_of(rows), "entropy", FP8)


def test_what_is_no_sample_is_an_error() -> None:
    rows = np.ones((4, 3), dtype=np.float32)
    with pytest.raises(InputError, match="there is no calibration method 'best'") as caught:
        activation_limit(rows, largest_of(rows), "best", INT8)
    assert all(method in str(caught.value.hint) for method in METHODS)
    with pytest.raises(InputError, match=r"found \[4, 3\] and \[2\]"):
        activation_limit(rows, np.ones(2, dtype=np.float32), "mse", INT8)
    with pytest.raises(InputError, match=r"found \[0, 3\] and \[3\]"):
        activation_limit(rows[:0], np.ones(3, dtype=np.float32), "mse", INT8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_errors(method: str, value: float) -> None:
    rows = np.ones((4, 3), dtype=np.float32)
    bad = rows.copy()
    bad[2, 1] = value
    for wrong in ((bad, largest_of(rows)), (rows, bad[2])):
        with pytest.raises(ExportError, match="expected finite activations, found infinity or NaN"):
            activation_limit(*wrong, method, INT8)
