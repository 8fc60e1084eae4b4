"""The treatment of a layer against the same computed by hand: its error, its divisors, and what wins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from precision_made import TOWERS, golden_sample

from clip_export.errors import ExportError, InputError
from clip_export.precision.formats import FORMATS, FormatName
from clip_export.precision.linears import Linear, find_linears, find_weights
from clip_export.precision.scales import activation_limit
from clip_export.precision.smooth import foldable
from clip_export.precision.treat import ROOMS, SEARCH_ROWS, SPREAD, STRENGTHS, Treatment, divisors, treat
from clip_export.spec import Tower

FORMAT_NAMES: tuple[FormatName, ...] = ("int8", "fp8")


class Layer:
    """A layer of 48 inputs and 32 outputs with a sample of its input, in which some channels are large."""

    def __init__(self, *, rows: int = 300, outlier: float = 60.0) -> None:
        rng = np.random.default_rng(0)
        self.linear = Linear(name="fc/MatMul", source="x", weight="w", inputs=48, outputs=32)
        self.weights = rng.standard_normal((48, 32), dtype=np.float32)
        self.rows = rng.standard_normal((rows, 48), dtype=np.float32)
        self.rows[:, [5, 17]] *= outlier
        self.largest = np.abs(self.rows).max(axis=0)

    def treat(self, name: FormatName = "int8", *, foldable: bool = True, method: str = "mse") -> Treatment:
        return treat(
            self.linear, self.weights, self.rows, self.largest, FORMATS[name], method=method, foldable=foldable
        )


def by_hand(layer: Layer, treatment: Treatment) -> float:
    """The mean error of a row in 8 bits, in float64 and by definition, each half treated as the other one asks for."""
    format_ = FORMATS[treatment.format]
    whole = activation_limit(layer.rows / treatment.divisor, layer.largest / treatment.divisor, "mse", format_)
    room = treatment.limit / whole
    assert min(abs(room - each) for each in ROOMS) < 1e-6
    middle = len(layer.rows) // 2
    halves, errors = (layer.rows[:middle], layer.rows[middle:]), list[np.ndarray]()
    for given, judged in (halves, halves[::-1]):
        chosen = judged[np.linspace(0, len(judged) - 1, min(SEARCH_ROWS // 2, len(judged))).round().astype(int)]
        seen = np.abs(given).max(axis=0)
        plain = np.ones(48, dtype=np.float32)
        divisor = plain if treatment.strength is None else divisors(layer.weights, seen, treatment.strength)
        limit = activation_limit(given / divisor, seen / divisor, "mse", format_) * room
        errors.append(row_errors(chosen, layer.weights, divisor, limit / format_.largest, treatment.format))
    return float(np.concatenate(errors).mean())


def row_errors(
    rows: np.ndarray, weights: np.ndarray, divisor: np.ndarray, scale: float, name: FormatName
) -> np.ndarray:
    """|xW - Q(x/d) Q(dW)|^2 / |xW|^2 of each row."""
    x, w, d = (array.astype(np.float64) for array in (rows, weights, divisor))

    def rounded(array: np.ndarray) -> np.ndarray:
        if name == "int8":
            return np.clip(np.round(array), -128, 127)
        magnitude = np.minimum(np.abs(array), 448.0)  # E4M3: 3 bits after the first, down to 2^-9
        step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(magnitude, 1e-30))), -6) - 3)
        return np.sign(array) * np.round(magnitude / step) * step

    scales = np.abs(d[:, None] * w).max(axis=0) / FORMATS[name].largest
    product = (rounded(x / d / scale) * scale) @ (rounded(d[:, None] * w / scales) * scales)
    return np.asarray(((x @ w - product) ** 2).sum(axis=1) / ((x @ w) ** 2).sum(axis=1))


@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_error_is_that_of_the_product_in_8_bits(name: FormatName, smoothed: bool) -> None:
    layer = Layer()
    treatment = layer.treat(name, foldable=smoothed)
    # In fp32 a number in the middle of two steps may go to the other one.
    assert treatment.error == pytest.approx(by_hand(layer, treatment), rel=2e-2)
    assert treatment.scale == pytest.approx(treatment.limit / FORMATS[name].largest)
    assert treatment.linear == "fc/MatMul" and treatment.format == name


def test_smoothing_saves_a_layer_with_outliers() -> None:
    plain, smoothed = Layer().treat(foldable=False), Layer().treat()
    assert plain.strength is None and (plain.divisor == 1).all()
    assert smoothed.strength is not None and smoothed.error < plain.error / 4
    assert smoothed.divisor[[5, 17]].min() > np.delete(smoothed.divisor, [5, 17]).max()
    assert smoothed.divisor.dtype == np.float32


@pytest.mark.parametrize("count", [16, 64])
def test_what_is_chosen_holds_for_rows_that_were_not_seen(count: int) -> None:
    """With long tails a small sample says little of how large channels become: the strongest smoothing fits it best."""
    layer, rng = Layer(), np.random.default_rng(1)
    layer.rows, unseen = (long_tailed(number, rng) for number in (count, 4000))
    layer.largest = np.abs(layer.rows).max(axis=0)

    def error(strength: float | None, rows: np.ndarray) -> float:
        divisor = np.ones(48) if strength is None else divisors(layer.weights, layer.largest, strength)
        limit = activation_limit(layer.rows / divisor, layer.largest / divisor, "mse", FORMATS["int8"])
        return float(row_errors(rows, layer.weights, divisor, limit / FORMATS["int8"].largest, "int8").mean())

    fits_best = min((None, *STRENGTHS), key=lambda strength: error(strength, layer.rows))
    assert error(layer.treat().strength, unseen) < 0.9 * error(fits_best, unseen)


def test_rows_that_were_not_seen_say_whether_the_limit_is_raised() -> None:
    """Where the halves are alike the limit of least error is right; where one of them is larger it wants room."""
    layer, rng = Layer(outlier=1.0), np.random.default_rng(3)
    layer.rows = rng.uniform(-1, 1, layer.rows.shape).astype(np.float32)
    layer.rows[0], layer.rows[-1] = 1, -1  # the largest value of either half is the same
    raised = []
    for factor in (1.0, 1.1):
        layer.rows[: len(layer.rows) // 2] *= np.float32(factor)
        layer.largest = np.abs(layer.rows).max(axis=0)
        found = layer.treat(foldable=False)
        raised.append(found.limit / activation_limit(layer.rows, layer.largest, "mse", FORMATS["int8"]))
    assert raised == pytest.approx(ROOMS)
    assert layer.treat(foldable=False, method="minmax").limit == layer.largest.max()


def long_tailed(count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of 48 channels, Student's t with 2 degrees of freedom, two channels large."""
    rows = rng.standard_t(2, (count, 48)).astype(np.float32)
    rows[:, [5, 17]] *= 20
    return rows


def test_where_smoothing_only_harms_it_is_left_out() -> None:
    """Large channels with large weights: what they have to lose is lost by all other weights."""
    layer = Layer(outlier=10.0)
    layer.weights[[5, 17]] *= 10
    alone = treat(
        layer.linear, layer.weights, layer.rows, layer.largest, FORMATS["int8"], foldable=True, strengths=(1.0,)
    )
    assert alone.strength is None and (alone.divisor == 1).all()


@pytest.mark.parametrize("method", ["mse", "minmax"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_treatment_is_the_same_each_time(name: FormatName, method: str) -> None:
    first, second = Layer().treat(name, method=method), Layer().treat(name, method=method)
    assert (first.strength, first.limit, first.error) == (second.strength, second.limit, second.error)
    np.testing.assert_array_equal(first.divisor, second.divisor)


def test_minmax_reaches_to_the_largest_of_all_data_not_of_the_sample() -> None:
    layer = Layer()
    layer.largest[0] = 1000.0
    assert layer.treat(method="minmax", foldable=False).limit == 1000.0


def test_divisors_are_those_of_the_paper() -> None:
    """SmoothQuant, equation 4, over the geometric mean; what is below that is left as it is."""
    layer = Layer()
    expected = layer.largest**0.7 / np.abs(layer.weights).max(axis=1) ** 0.3
    expected /= np.exp(np.log(expected).mean())
    assert expected.min() < 1 < expected.max()
    np.testing.assert_allclose(divisors(layer.weights, layer.largest, 0.7), np.maximum(expected, 1), rtol=1e-5)


def test_divisors_are_bounded_and_know_dead_channels() -> None:
    layer = Layer()
    largest, weights = layer.largest.copy(), layer.weights.copy()
    largest[0], largest[1] = 0.0, 1e9
    weights[2] = 0.0
    found = divisors(weights, largest, 0.9)
    assert (found[0], found[1], found[2]) == (1.0, SPREAD, SPREAD)
    assert found.min() >= 1
    np.testing.assert_array_equal(divisors(weights, np.zeros(48), 0.5), np.ones(48))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_an_input_of_zeros_costs_nothing(name: FormatName) -> None:
    layer = Layer()
    layer.rows[:], layer.largest[:] = 0, 0
    treatment = layer.treat(name)
    assert (treatment.error, treatment.scale, treatment.strength) == (0.0, 1.0, None)


def test_what_does_not_fit_is_refused() -> None:
    layer = Layer()
    layer.rows[3, 4] = np.nan
    with pytest.raises(ExportError, match=r"expected finite activations"):
        layer.treat()
    layer.rows = layer.rows[:0]
    with pytest.raises(InputError, match=r"expected rows of shape \[0, 48\], not empty, found \[0, 48\]"):
        layer.treat()
    layer.largest = layer.largest[:5]
    layer.rows = Layer().rows
    with pytest.raises(InputError, match=r"expected largest of shape \[48\], not empty, found \[5\]"):
        layer.treat()
    with pytest.raises(InputError, match=r"strengths from 0 to 1, found 1\.5"):
        treat(
            layer.linear, layer.weights, layer.rows, Layer().largest, FORMATS["int8"], foldable=True, strengths=(1.5,)
        )


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("tower", TOWERS)
def test_smoothing_never_costs_and_saves_int8_where_channels_of_the_demo_are_large(
    demo_bundle: Path, tower: Tower, name: FormatName
) -> None:
    sample = golden_sample(demo_bundle, tower)
    model = ir.load(sample.graph)
    linears = find_linears(model.graph)
    free = foldable(model, [linear.name for linear in linears])
    made = {value.name: value for node in model.graph for value in node.outputs}
    sources = list(dict.fromkeys(linear.source for linear in linears))
    model.graph.outputs[:] = [made[source] for source in sources]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    batches = [session.run(sources, dict(feeds)) for feeds in sample.feeds]
    gains = []
    for linear in linears:
        index, weights = sources.index(linear.source), find_weights(model.graph, linear).copy()
        rows = np.concatenate([batch[index].reshape(-1, linear.inputs) for batch in batches])[:512].copy()
        rows[:, ::20] *= 50
        weights[::20] /= 50
        largest = np.abs(rows).max(axis=0)
        plain, smoothed = (
            treat(linear, weights, rows, largest, FORMATS[name], foldable=way) for way in (False, linear.name in free)
        )
        assert smoothed.error <= plain.error
        gains.append(plain.error / smoothed.error)
    if name == "int8":
        assert np.median(gains) > 4
