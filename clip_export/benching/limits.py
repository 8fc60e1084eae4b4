"""What a machine could do: the arithmetic of a graph, and the fastest matrix product that it gives to any library here.

The ceiling is measured, for a datasheet knows neither the clock under load, nor how many cores a container has, nor who
else is there.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_export import backends
from clip_export.errors import BundleError, MissingDependencyError
from clip_export.graph.files import missing

if TYPE_CHECKING:
    import onnx

CPU_SIZES = (512, 1024, 2048)
GPU_SIZES = (2048, 4096, 8192)  # which is fastest differs by chip
FULL = frozenset({"fp32"})  # precisions whose products are in float32 on a GPU

Product = Callable[[], object]
Shape = list[int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """FLOP/s of the fastest square matrix product here: `library` made it at `size`, in `dtype`."""

    flop_per_second: float
    library: str
    size: int
    dtype: str


def count_flop(graph: Path, sizes: Mapping[str, int]) -> int:
    """Floating-point operations of one run of `graph` at `sizes` of its axes, two to each multiply-add.

    Products alone: MatMul, Conv and both products of Attention, the masked half of a causal one included, as is usual.
    Norms, activations and softmax are limited by memory and not by arithmetic. Raises MissingDependencyError without
    onnx, BundleError for a graph that does not say the shape of a product.
    """
    if missing("onnx"):
        raise MissingDependencyError(
            "counting the FLOPs of a graph needs onnx, not installed here", hint="pip install onnx"
        )
    import onnx

    held = onnx.load(str(graph), load_external_data=False).graph
    shapes = _shapes(held)

    def shape(name: str) -> list[int]:
        if name not in shapes or not all(isinstance(size, int) or size in sizes for size in shapes[name]):
            raise BundleError(
                f"{graph.name} does not say the shape of {name}, found {shapes.get(name)}",
                hint="build the bundle again",
            )
        return [size if isinstance(size, int) else sizes[size] for size in shapes[name]]

    return sum(_node_flop(node, shape) for node in held.node)


def _node_flop(node: onnx.NodeProto, shape: Callable[[str], list[int]]) -> int:
    if node.op_type == "MatMul":
        return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[-1]
    if node.op_type == "Conv":  # weights [outputs, inputs / groups, height, width]
        return 2 * math.prod(shape(node.output[0])) * math.prod(shape(node.input[1])[1:])
    if node.op_type == "Attention":  # queries, keys, values [batch, heads, positions, features]
        (batch, heads, queries, width), keys, values = (shape(name) for name in node.input[:3])
        return 2 * batch * heads * queries * keys[2] * (width + values[3])
    return 0


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """The shape of every tensor that `graph` states one of; a moving axis by its name."""
    found: dict[str, Shape] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        found[value.name] = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    return found


def cpu_ceiling(sizes: Iterable[int] = CPU_SIZES, *, seconds: float = 0.5) -> Ceiling:
    """The fastest float32 product of numpy, ONNX Runtime and torch, as far as they are here; `seconds` for each."""
    found = [
        Ceiling(flop_per_second=_rate(product, size, seconds), library=library, size=size, dtype="float32")
        for size in sizes
        for library, product in _cpu_products(size).items()
    ]
    return max(found, key=lambda ceiling: ceiling.flop_per_second)


def gpu_ceiling(device: str, precision: str, sizes: Iterable[int] = GPU_SIZES, *, seconds: float = 1.0) -> Ceiling:
    """The fastest product of torch on `device`: float32 for fp32, else float16, of which int8 can take more than all.

    Raises MissingDependencyError without torch: nothing else here multiplies plain matrices on a GPU.
    """
    if missing("torch"):
        raise MissingDependencyError(
            "the ceiling of a GPU is measured with torch, not installed here", hint="install torch"
        )
    import torch

    dtype = torch.float32 if precision in FULL else torch.float16
    found = []
    for size in sizes:
        first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(first: torch.Tensor = first, second: torch.Tensor = second) -> None:
            for _ in range(10):
                torch.matmul(first, second)
            torch.cuda.synchronize()

        rate = 10 * _rate(product, size, seconds)
        name = str(dtype).removeprefix("torch.")
        found.append(Ceiling(flop_per_second=rate, library="torch", size=size, dtype=name))
    return max(found, key=lambda ceiling: ceiling.flop_per_second)


def _rate(product: Product, size: int, seconds: float) -> float:
    """FLOP/s of the quickest call: a ceiling is what is possible, not what is usual."""
    product()
    best, deadline = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < deadline:
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _cpu_products(size: int) -> dict[str, Product]:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    out = np.empty_like(first)
    products: dict[str, Product] = {"numpy": lambda: np.matmul(first, second, out=out)}
    if not missing("onnx", "onnxruntime"):
        products["onnxruntime"] = _onnxruntime_product(first, second)
    if not missing("torch"):
        products["torch"] = _torch_product(first, second)
    return products


def _onnxruntime_product(first: np.ndarray, second: np.ndarray) -> Product:
    from onnx import TensorProto, helper, numpy_helper, save

    shape = list(first.shape)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("first", "product")]
    node = helper.make_node("MatMul", ["first", "second"], ["product"])
    weights = [numpy_helper.from_array(second, "second")]  # constant, so that it is packed as a layer's weights are
    graph = helper.make_graph([node], "product", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    with tempfile.TemporaryDirectory(prefix="clip-export-") as work:
        save(model, str(Path(work, "product.onnx")))
        engine = backends.open_engine("onnxruntime", Path(work, "product.onnx"))
    return lambda: engine({"first": first})["product"]


def _torch_product(first: np.ndarray, second: np.ndarray) -> Product:
    import torch

    left, right = torch.from_numpy(first), torch.from_numpy(second)
    out: Any = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=out)
