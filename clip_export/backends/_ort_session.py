"""Opening an ONNX Runtime session, and making sure that it runs where it was asked to run.

ONNX Runtime gives every node that its CUDA provider has no kernel for to the CPU, and copies back and forth around it
without a word. Here that is an error, which names the nodes; arithmetic on shapes is meant to be on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_export.backends._ort_memory import says_out_of_memory
from clip_export.errors import BackendError, DeviceError, MissingDependencyError

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

INSTALL = "pip install 'clip-export[cpu]' (or [cuda] for an NVIDIA GPU)"
# Both distributions bring the module onnxruntime: one installed over the other leaves neither whole.
INSTALL_CUDA = "pip uninstall onnxruntime, then pip install 'clip-export[cuda]'; or use device cpu"
# 1.24 still ran the Attention operator on the CPU, for want of a CUDA kernel; 1.25 brought those of opset 23 and 24 for
# float32, float16 and bfloat16 (onnxruntime/core/providers/cuda/llm/attention.cc).
UPGRADE = "pip install --upgrade 'onnxruntime-gpu>=1.25', or use device cpu"

# What computes shapes: a few integers, which kernels need on the CPU anyway.
_COUNTING = ("Shape", "Size", "Constant", "ConstantOfShape", "Range", "Identity", "Cast", "Where", "Equal")
_MOVING = ("Concat", "Expand", "Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "ReduceProd")
_SHAPES = frozenset((*_COUNTING, *_MOVING, *_ARITHMETIC))


def import_onnxruntime() -> Any:
    """The module. Raises MissingDependencyError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("ONNX Runtime is not installed", hint=INSTALL) from error
    return onnxruntime


def device_index(device: str) -> int | None:
    """The number of a GPU in `cuda:N`, 0 in `cuda`, None for `cpu`. Raises BackendError for anything else."""
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if device == "cpu":
        return None
    if kind != "cuda" or not (index.isdigit() or device == "cuda"):
        hint = "choose cpu, or the number of a GPU" if isinstance(device, str) else None
        raise BackendError(f"expected device cpu or cuda:N, found {device!r}", hint=hint)
    return int(index or 0)


def open_session(path: Path, *, device: str, threads: int | None, tf32: bool) -> onnxruntime.InferenceSession:
    """A session of the graph at `path` on `device` and nowhere else.

    Raises BackendError where the graph, the library or the machine does not allow it, DeviceError where the GPU cannot
    be used or lacks the memory.
    """
    ort = import_onnxruntime()
    ort.disable_telemetry_events()
    provider, its_options = provider_for(device, tf32=tf32)
    offered = ort.get_available_providers()
    if provider not in offered:
        message = f"{device} needs ONNX Runtime's {provider}; the one installed offers {', '.join(offered)}"
        raise BackendError(message, hint=INSTALL_CUDA)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings speak of its own kernels; errors are raised
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider == CUDA:
        _require_placement(ort)
        _load_cuda_libraries(ort)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        with _quiet(ort):
            session = ort.InferenceSession(str(path), options, providers=[(provider, its_options)])
    except failures() as error:
        raise _cannot_open(path, device, provider, error) from error
    # Asked for CUDA, a session that cannot have it runs on the CPU and only logs that.
    if session.get_providers()[0] != provider:
        raise _no_cuda(ort)
    if provider == CUDA:
        check_placement(assignment(session), path.name, version=ort.__version__)
    return session


def provider_for(device: str, *, tf32: bool = False) -> tuple[str, dict[str, Any]]:
    """(provider, its options) for a device. Raises BackendError for a device that cannot be."""
    index = device_index(device)
    if index is None:
        if tf32:
            raise BackendError("tf32 is a mode of NVIDIA GPUs, found device cpu", hint="leave tf32 out, or use cuda:0")
        return CPU, {}
    # TF32 keeps 10 bits of a float32's 23: not fp32. The default search, EXHAUSTIVE, would time every kernel of the
    # patch convolution again for each batch size that comes along.
    options = {"device_id": index, "use_tf32": int(tf32), "cudnn_conv_algo_search": "HEURISTIC"}
    return CUDA, options


def assignment(session: onnxruntime.InferenceSession) -> list[tuple[str, str]]:
    """(provider, operator) of every node; the session must have been opened with the recording on."""
    subgraphs = session.get_provider_graph_assignment_info()
    return [(subgraph.ep_name, node.op_type) for subgraph in subgraphs for node in subgraph.get_nodes()]


def check_placement(nodes: Iterable[tuple[str, str]], graph: str, *, version: str) -> None:
    """Raise BackendError, naming the operators, if any of `nodes` that computes more than shapes is not on CUDA."""
    nodes = list(nodes)
    strays = Counter(operator for provider, operator in nodes if provider != CUDA and operator not in _SHAPES)
    if strays or not any(provider == CUDA for provider, _ in nodes):
        names = ", ".join(f"{count} {operator}" for operator, count in sorted(strays.items())) or "all nodes"
        message = f"ONNX Runtime {version} has no CUDA kernel for {names} of {graph}, and would run them on the CPU"
        raise BackendError(message, hint=UPGRADE)


def tf32_option(options: object) -> bool:
    """`tf32` of the engine's options, False by default. Raises BackendError for an option that is not known."""
    if options is not None and not isinstance(options, Mapping):
        found = type(options).__name__
        raise BackendError(f"expected options of ONNX Runtime as a dict, found {found}", hint='such as {"tf32": True}')
    given = dict(options or {})
    tf32 = given.pop("tf32", False)
    if given:
        message = f"ONNX Runtime has no option {', '.join(sorted(given))}"
        raise BackendError(message, hint="it knows one: tf32, for 10-bit mantissas in fp32 layers on a GPU")
    if not isinstance(tf32, bool):
        raise BackendError(f"expected tf32 True or False, found {tf32!r}")
    return tf32


def failures() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises: each derives from Exception alone, so they have to be listed."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException", "InvalidProtobuf")
    more = ("ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail")
    found = tuple(getattr(state, name) for name in (*names, *more) if hasattr(state, name))
    return (*found, RuntimeError, ValueError)


def _require_placement(ort: Any) -> None:
    """Versions that cannot say where nodes run have no CUDA kernel for Attention either."""
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        message = f"ONNX Runtime {ort.__version__} cannot say which nodes it runs on the GPU and which on the CPU"
        raise BackendError(message, hint=UPGRADE)


def _load_cuda_libraries(ort: Any) -> None:
    """Find the CUDA that came through pip (nvidia-cublas and others), which no loader path names.

    What it cannot find it prints, here into nothing: whether CUDA works is seen right afterwards.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RuntimeError):
            ort.preload_dlls()


@contextlib.contextmanager
def _quiet(ort: Any) -> Iterator[None]:
    """Without what it logs while it loads CUDA in vain: `_no_cuda` says that, once."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # its default: warnings


def _no_cuda(ort: Any) -> DeviceError:
    """Why the CUDA provider is not there: its library is loaded once more, since the loader says which one it lacks."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        if library.is_file():
            ctypes.CDLL(str(library))
    except OSError as error:
        message = f"ONNX Runtime cannot load its CUDA provider: {error}"
        hint = f"pip install 'onnxruntime-gpu[cuda,cudnn]=={ort.__version__}' brings CUDA with it; or use device cpu"
        return DeviceError(message, hint=hint)
    message = f"ONNX Runtime cannot use {CUDA} on this machine: there is no GPU, no driver, or one older than its CUDA"
    return DeviceError(message, hint="check nvidia-smi, or use device cpu")


def _cannot_open(path: Path, device: str, provider: str, error: Exception) -> BackendError:
    if provider == CUDA and says_out_of_memory(error):
        hint = "free some of it (nvidia-smi shows who holds it), or use the fp16 graph"
        return DeviceError(f"not enough memory on {device} to open {path.name}: {error}", hint=hint)
    if provider == CUDA and "CUDA" in str(error):
        message = f"ONNX Runtime cannot use {device} for {path.name}: {error}"
        return DeviceError(message, hint="check nvidia-smi, or use device cpu")
    return BackendError(f"ONNX Runtime cannot open {path.name}: {error}", hint="rebuild the bundle")
