"""Where the input of a linear layer is cut off: the value that the largest number of an 8-bit format stands for.

A high limit leaves every value in and makes all steps coarse, a low one makes them fine and cuts outliers off.

    minmax      the largest value seen: nothing is cut off
    percentile  above 99.99 % of the sample
    entropy     the least information lost, as TensorRT's calibration of 2017 counted it; int8 only
    mse         the least mean squared error of what is held
"""

from __future__ import annotations

import numpy as np

from clip_export.errors import ExportError, InputError, MissingDependencyError
from clip_export.precision.formats import Format

METHODS = ("mse", "minmax", "percentile", "entropy")

PERCENTILE = 99.99
# What `mse` chooses from, as parts of the largest value: a tenth less each time, down to 1/50. Near the best limit the
# error of int8 is flat. That of fp8 waves with where the few largest values fall between its steps, which is chance.
RATIOS = 0.9 ** np.arange(38)
# Magnitudes are counted in this many bins before the error is: ten of them to a step of int8 at the smallest ratio.
_MAGNITUDES = 2**16
_ENTROPY_BINS = 2048
# One for each level of int8, both signs. ONNX Runtime's own default is 128, half as many.
_ENTROPY_LEVELS = 255
# At a smaller limit the scale itself is no normal float32: there is as good as nothing to hold.
_SMALLEST = 2.0**-100


def activation_limit(rows: np.ndarray, largest: np.ndarray, method: str, format_: Format) -> float:
    """The absolute value that is mapped to `format_.largest`, by one of METHODS.

    `rows` float32 [n, channels] is a sample; `largest` [channels] are the largest absolute values over all data. Every
    method stays at or below the largest of all; the limit of a tensor of zeros is `format_.largest`, for a scale of 1.

    Raises InputError for an unknown method, entropy in a floating format (which has no equal bins), and arrays that are
    empty or do not fit each other; ExportError for infinity or NaN; MissingDependencyError for entropy without
    onnxruntime and onnx.
    """
    require_method(method, format_)
    _require_fit(rows, largest)
    top = float(largest.max())
    if top < _SMALLEST:
        return format_.largest
    if method == "minmax":
        return top
    magnitudes = np.minimum(np.abs(rows).reshape(-1), np.float32(top))
    limit = _chosen(method, rows, magnitudes, top, format_)
    # So sparse that the method sees zeros alone: what there is decides.
    return limit if limit >= _SMALLEST else top


def _chosen(method: str, rows: np.ndarray, magnitudes: np.ndarray, top: float, format_: Format) -> float:
    if method == "percentile":
        return float(np.percentile(magnitudes, PERCENTILE))
    if method == "entropy":
        return min(_least_divergence(rows), top)
    return _least_error(magnitudes, top, format_)


def _least_error(magnitudes: np.ndarray, top: float, format_: Format) -> float:
    """That of RATIOS times `top` with the least squared error, the larger of equals; `magnitudes` are in 0..top.

    Both formats are symmetric, so signs do not matter (int8's -128 aside), and how often each magnitude occurs is all
    there is to know.
    """
    bins = np.minimum(magnitudes * (_MAGNITUDES / top), _MAGNITUDES - 1).astype(np.int64)
    every = np.bincount(bins, minlength=_MAGNITUDES)
    held = np.flatnonzero(every)
    centres, counts = ((held + 0.5) / _MAGNITUDES).astype(np.float32), every[held].astype(np.float64)
    errors = [_squared_error(centres, counts, format_, ratio) for ratio in RATIOS.tolist()]
    return top * float(RATIOS[int(np.argmin(errors))])


def _squared_error(values: np.ndarray, counts: np.ndarray, format_: Format, limit: float) -> float:
    """The sum of squared errors of `values`, each of them `counts` times, where `limit` is the largest number.

    Not by np.dot: BLAS adds in an order that hangs on how many threads it has, and on a busy machine waits for them.
    """
    squares = np.square(format_.quantize(values, limit / format_.largest) - values, dtype=np.float64)
    squares *= counts
    return float(squares.sum())


def _least_divergence(rows: np.ndarray) -> float:
    """The threshold with the least Kullback-Leibler divergence of a histogram and what 255 levels leave of it."""
    try:
        from onnxruntime.quantization.calibrate import HistogramCollector
    except ImportError as error:
        raise MissingDependencyError(
            "the method entropy needs ONNX Runtime and onnx, not installed here",
            hint="pip install 'clip-export[cpu,export]', or choose another method",
        ) from error
    # The threshold alone: its `collect` and `compute_collection_result` make this histogram too, and print on stdout.
    top = np.abs(rows).max()
    if top < _SMALLEST:
        return 0.0
    counts, edges = np.histogram(rows, _ENTROPY_BINS, range=(-top, top))
    collector = HistogramCollector("entropy", True, _ENTROPY_BINS, _ENTROPY_LEVELS, PERCENTILE, "same")
    ends = collector.get_entropy_threshold((counts, edges, rows.min(), rows.max(), top), _ENTROPY_LEVELS)
    return float(np.abs(ends).max())


def require_method(method: str, format_: Format) -> None:
    """Raise InputError for a method that there is not, or that has no meaning for `format_`."""
    if method not in METHODS:
        raise InputError(f"there is no calibration method {method!r}", hint=f"choose one of: {', '.join(METHODS)}")
    if method == "entropy" and format_.name != "int8":
        raise InputError(
            f"the method entropy compares equal steps, and those of {format_.name} grow with the number",
            hint="choose mse, minmax or percentile",
        )


def _require_fit(rows: np.ndarray, largest: np.ndarray) -> None:
    if rows.ndim != 2 or not rows.size or largest.shape != rows.shape[1:]:
        raise InputError(
            "expected rows [n, channels], not empty, and one largest value for each channel,"
            f" found {list(rows.shape)} and {list(largest.shape)}",
            hint="calibrate the tensor that the layer reads",
        )
    if not (np.isfinite(rows).all() and np.isfinite(largest).all()):
        raise ExportError(
            "expected finite activations, found infinity or NaN",
            hint="the fp32 graph itself overflows: check the checkpoint with clip-export verify",
        )
