"""Int8 by NVIDIA ModelOpt, as a peer: an fp32 graph and samples in, an explicit Q/DQ graph out, on a CPU.

python benchmarks/_modelopt.py GRAPH.onnx FEEDS.npz OUT.onnx [--method entropy|max] [--high-precision fp16|fp32]

Run it with the python of ModelOpt's own environment, whose pins of onnx and onnxruntime do not go with clip-export's.
FEEDS.npz has one array for each input, the samples along the first axis. One line of JSON goes to stdout, the log of
ModelOpt to stderr. What is not an option here is ModelOpt's default; its guide for ViT asks for at least 500 samples.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from modelopt.onnx.quantization import quantize


def read_feeds(graph: Path, feeds: Path) -> dict[str, np.ndarray]:
    """Arrays [samples, ...] by the name of the input, of the inputs' own types: ModelOpt hands them on as they are."""
    inputs = onnx.load(graph, load_external_data=False).graph.input
    expected = {value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in inputs}
    with np.load(feeds) as file:
        arrays = {name: file[name] for name in file.files}
    found = {name: array.dtype for name, array in arrays.items()}
    if found != expected:
        sys.exit(f"error: {feeds}: expected the arrays {expected}, found {found}\n\nhint: save one array an input")
    return arrays


def copied(graph: Path, directory: Path) -> Path:
    """A copy, with the weights beside it: ModelOpt infers shapes in place, over the file that it is given."""
    for file in (graph, graph.with_name(f"{graph.name}.data")):
        if file.exists():
            shutil.copyfile(file, directory / file.name)
    return directory / graph.name


def run(graph: Path, arrays: dict[str, np.ndarray], out: Path, options: argparse.Namespace) -> float:
    """Write the Q/DQ graph of `graph` to `out`; returns the seconds that it took."""
    started = time.perf_counter()
    # stdout is for the report alone, and onnxruntime's calibrators print
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        quantize(
            str(copied(graph, Path(directory))),
            quantize_mode="int8",
            calibration_data=arrays,
            calibration_method=options.method,
            calibration_eps=["cpu"],  # by default CUDA and TensorRT are tried as well
            high_precision_dtype=options.high_precision,
            op_types_to_quantize=options.operators,
            output_path=str(out.absolute()),  # beside it ModelOpt writes, and removes, what it makes on the way
        )
    return time.perf_counter() - started


def summary(model: onnx.ModelProto) -> dict[str, Any]:
    """What was quantized: activation pairs, other operators that read int8, MatMuls with both operands from int8."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in weights]
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    whole = {node.name for node in matmuls(graph) if dequantized.issuperset(node.input)}
    readers = [node.op_type for node in graph.node if dequantized.intersection(node.input)]
    return {
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "activation_pairs": len(pairs),
        "reading_int8": {operator: readers.count(operator) for operator in sorted(set(readers))},
        "matmuls_int8": sorted(whole),
        "matmuls_left": sorted(node.name for node in matmuls(graph) if node.name not in whole),
    }


def matmuls(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The products of two matrices."""
    return (node for node in graph.node if node.op_type == "MatMul")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("entropy", "max"), default="entropy", help="of calibration")
    parser.add_argument("--high-precision", choices=("fp16", "fp32"), default="fp16", help="of what is not int8")
    parser.add_argument("--operators", nargs="+", help="quantize these alone, as MatMul Conv; ModelOpt's choice if not")
    options = parser.parse_args()
    arrays = read_feeds(options.graph, options.feeds)
    seconds = run(options.graph, arrays, options.out, options)
    report = {
        "versions": {name: version(name) for name in ("nvidia-modelopt", "onnx", "onnxruntime-gpu")},
        "method": options.method,
        "high_precision": options.high_precision,
        "operators": options.operators,
        "samples": len(next(iter(arrays.values()))),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report | summary(onnx.load(options.out, load_external_data=False))))


if __name__ == "__main__":
    main()
