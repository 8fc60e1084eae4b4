"""What the parser and the compiler of TensorRT said, as one sentence and what to do about it. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clip_export.errors import BackendError, DeviceError, PlanBuildError, UnsupportedOperatorError

LONGEST = 300  # characters of the compiler's own words in a message: its sentences run to pages of source positions
_NOISE = re.compile(r"\[\w+\.(?:cpp|h):+[^\]]*\]|\(See http\S+[^)]*\)|catchCudaError.*|In \w+ at \S+")
_WEIGHTS_FILE = re.compile(r"Failed to open file: (?P<absent>.+)|out of range for file: (?P<short>[^\n(]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseFailure:
    """One error of OnnxParser: the `code` by name, what it says, and the node it says it of ("" for none)."""

    code: str
    text: str
    node: str = ""
    operator: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What was to be built, as far as an explanation needs it; `title` is the compiler and its version."""

    title: str
    graph: str
    compute_capability: str
    gpu: bool
    weightless: bool = False  # stripped or refittable
    only_one: bool = False  # an axis that a profile keeps at 1, as a batch of exactly one


@dataclass(frozen=True, slots=True)
class _Cause:
    pattern: re.Pattern[str]
    message: str
    hint: str
    kind: type[BackendError] = PlanBuildError
    applies: Callable[[Attempt], bool] = lambda attempt: True


_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|cudaErrorMemoryAllocation|Error Code 2\b", re.IGNORECASE)
_NO_DRIVER = re.compile(r"driver version is insufficient|cudaErrorNoDevice|no CUDA-capable device", re.IGNORECASE)
_NO_KERNEL = re.compile("not supported by a dedicated kernel")
_CAUSES = (  # the first that is found in what the compiler said, and applies
    _Cause(
        _NO_KERNEL,
        "{title} has no fused kernel for an Attention operator of {graph} where the batch can only be 1",
        "let every profile reach a batch of 2, and build fp16 or bf16: fp32 has no such kernel at all",
        applies=lambda attempt: attempt.only_one,
    ),
    _Cause(
        _NO_KERNEL,
        "{title} has no fused kernel for an Attention operator of {graph}",
        "build fp16 or bf16: fp32 takes the graph in which attention is written out as MatMul and Softmax",
    ),
    _Cause(
        re.compile("FP32 GEMM is not supported"),
        "{title} multiplies no fp32 matrices on sm_75, and {graph} has some",
        "build it with --precision fp16all",
    ),
    _Cause(
        re.compile(r"fp8|float8|e4m3", re.IGNORECASE),
        "{graph} holds fp8, which {compute_capability} lacks",
        "fp8 needs sm_89 or later: build fp16 or int8 for this GPU",
    ),
    _Cause(
        re.compile("nvinfer_lean"),
        "{title} cannot build version-compatible plans here: its lean runtime library is not installed",
        "leave --version-compatible away: plans are quickly built again",
    ),
    _Cause(
        re.compile("CUDA_SUCCESS"),
        "{title} builds stripped and refittable plans only where a GPU is, and there is none here",
        "build it on a machine with a GPU, or with its weights in it",
        applies=lambda attempt: attempt.weightless and not attempt.gpu,
    ),
    _Cause(
        _OUT_OF_MEMORY,
        "the GPU has not enough free memory to compile {graph}",
        "give smaller profiles, a smaller --workspace-mib or --jobs 1, or stop what else uses this GPU",
        DeviceError,
    ),
    _Cause(
        _NO_DRIVER,
        "{title} found no NVIDIA driver that it can use while compiling {graph}",
        "check nvidia-smi and update the driver, or build for a named GPU with backend tensorrt-rtx",
        DeviceError,
    ),
)


def compile_error(log: Sequence[tuple[str, str]], attempt: Attempt) -> BackendError:
    """The error for a build that gave no plan; `log` is what the compiler said, as (severity, text)."""
    errors = [text for severity, text in log if severity != "WARNING"] or [text for _, text in log]
    whole, said = "\n".join(map(_clean, errors)), _first_words(errors)
    names = {"title": attempt.title, "graph": attempt.graph, "compute_capability": attempt.compute_capability}
    for cause in _CAUSES:
        if cause.pattern.search(whole) and cause.applies(attempt):
            return cause.kind(f"{cause.message.format(**names)} ({said})", hint=cause.hint)
    message = f"{attempt.title} could not compile {attempt.graph} for {attempt.compute_capability}: {said}"
    return PlanBuildError(message, hint="another precision, or another backend, may take this graph")


def parse_error(
    failures: Sequence[ParseFailure], log: Sequence[tuple[str, str]], graph: str, title: str
) -> PlanBuildError:
    """The error for a graph that the parser refused."""
    weights = _WEIGHTS_FILE.search("\n".join(text for _, text in log))
    if weights is not None:
        name = (weights["absent"] or weights["short"]).strip()
        what = "is missing" if weights["absent"] else "is shorter than the graph says"
        return PlanBuildError(f"{graph} keeps weights in {name}, which {what}", hint="copy the whole bundle again")
    if any(failure.code == "MODEL_DESERIALIZE_FAILED" for failure in failures):
        return PlanBuildError(f"{graph} is no ONNX file, or a truncated one", hint="copy it, or build it, again")
    refused = [failure for failure in failures if _is_unsupported(failure)]
    if refused:
        operators = tuple(dict.fromkeys(failure.operator for failure in refused))
        each = "; ".join(dict.fromkeys(_of_node(failure) for failure in refused))
        message = f"{title} does not take every operator of {graph}: {each}"
        hint = "backend onnxruntime runs this graph; a later compiler may"
        return UnsupportedOperatorError(readable(message), operators=operators, hint=hint)
    said = "; ".join(dict.fromkeys(_of_node(failure) for failure in failures)) or _first_words([t for _, t in log])
    return PlanBuildError(readable(f"{title} cannot read {graph}: {said}"), hint="see that onnx.checker accepts it")


def readable(text: str) -> str:
    """The compiler's words on one line, without source positions, cut at LONGEST characters."""
    line = _clean(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1].rstrip()}…"


def _clean(text: str) -> str:
    return " ".join(_NOISE.sub("", text).split())


def _first_words(texts: Sequence[str]) -> str:
    return next((words for text in texts if (words := readable(text))), "it gave no reason")


def _is_unsupported(failure: ParseFailure) -> bool:
    # An operator that the parser has never heard of is looked for among the plugins, and not found there.
    return bool(failure.operator) and (
        failure.code.startswith("UNSUPPORTED_NODE") or "Plugin not found" in failure.text
    )


def _of_node(failure: ParseFailure) -> str:
    words = re.search(r'"([^"]{8,})"', failure.text)  # an assertion holds its sentence in quotes
    said = words[1] if words else failure.text
    if "Plugin not found" in said or said in {"", "false"}:
        said = "no such operator"
    where = f"{failure.operator} (node {failure.node})" if failure.operator else failure.node
    return f"{where}: {readable(said)}" if where else readable(said)


__all__ = ["Attempt", "ParseFailure", "compile_error", "parse_error", "readable"]
