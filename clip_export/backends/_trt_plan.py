"""A plan that was read and can run: its engine, its profiles and what its contexts need.

Whatever keeps a plan from running is said here in a sentence: TensorRT's own words for a plan of another version or
another GPU help nobody.
"""

from __future__ import annotations

import re
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from clip_export.backends import _cuda
from clip_export.backends._cuda_memory import Stream
from clip_export.backends._trt_cache import RuntimeCache
from clip_export.backends._trt_errors import readable
from clip_export.backends.building import EngineOptions, Profile, Shape, ShapeRange
from clip_export.errors import BackendError, DeviceError

MIB: Final = 1 << 20
FORGET_AFTER: Final = 100  # messages; the logger keeps only so many, and the next error is wanted

# TensorRT's names of types, as far as numpy has them.
_DTYPES: Final = MappingProxyType(
    {
        "FLOAT": "float32",
        "HALF": "float16",
        "INT64": "int64",
        "INT32": "int32",
        "INT8": "int8",
        "UINT8": "uint8",
        "BOOL": "bool",
    }
)
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|cudaErrorMemoryAllocation", re.IGNORECASE)
_HOST_CODE = re.compile(r"host ?code|lean runtime", re.IGNORECASE)
_SEVERE = ("ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or an output of a plan."""

    name: str
    dtype: np.dtype[Any]


class Plan:
    """A plan on one GPU. Contexts are made from it; all of them have to be gone before `close`."""

    def __init__(self, library: Any, path: Path, device: _cuda.Device, options: EngineOptions) -> None:
        self.trt, self.title, self.name = library.trt, library.title, path.name
        self.device, self.options = device, options
        self.lock = threading.RLock()  # making and deleting contexts is not safe from several threads
        self._logger = _logger(library)
        self._logger.messages.clear()
        self._runtime: Any = None
        self._engine: Any = None
        self._runtime_config: Any = None
        self._cache: RuntimeCache | None = None
        blob = _read(path)
        try:
            with device.current():
                self._open(blob)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the engine, which has to be freed on its own GPU
            self.close()
            raise

    def _open(self, blob: bytes) -> None:
        trt = self.trt
        runtime = _runtime(self)
        check_validity(trt, runtime, blob, self.name, self.title)
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is None:
            raise self._unreadable(len(blob))
        self._runtime, self._engine = runtime, engine
        self._supply_weights()
        self.inputs, self.outputs = _tensors(self, "INPUT"), _tensors(self, "OUTPUT")
        self.profiles = _profiles(self)
        self.weight_bytes = self._weight_bytes(len(blob))
        self._runtime_config = self._configured()
        self._cache = self._open_cache()
        self._logger.messages.clear()  # asking what this release can do has been logged as an error

    @property
    def own_graphs(self) -> bool:
        """Whether CUDA graphs are to be captured here: TensorRT-RTX does that itself."""
        return self.options.cuda_graphs and not hasattr(self.trt, "CudaGraphStrategy")

    @property
    def library_graphs(self) -> bool:
        """Whether the library captures CUDA graphs by itself."""
        return self.options.cuda_graphs and hasattr(self.trt, "CudaGraphStrategy")

    def new_context(self, profile: int, stream: Stream) -> Any:
        """A context without memory of its own, set to `profile` by work in `stream`. Raises GpuMemoryError."""
        trt, engine = self.trt, self._engine
        with self.lock, self.device.current():
            if len(self._logger.messages) >= FORGET_AFTER:
                self._logger.messages.clear()
            runtime_config = self._runtime_config
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy if runtime_config is None else runtime_config)
            if context is None:
                raise self.failed("cannot make an execution context for")
            try:
                chosen = context.set_optimization_profile_async(profile, stream.pointer)
            except RuntimeError as error:
                raise self.failed(f"cannot choose profile {profile} of") from error
            if not chosen:
                raise self.failed(f"cannot choose profile {profile} of")
            return context

    def activation_bytes(self, profile: int) -> int:
        """The memory that a context needs at the largest shapes of `profile`."""
        engine = self._engine
        return int(engine.get_device_memory_size_for_profile_v2(profile))

    def largest_shapes(self, profile: int, rows: int) -> dict[str, Shape]:
        """The largest input shapes of `profile` with `rows` rows."""
        return {name: (rows, *span.max[1:]) for name, span in self.profiles[profile].items()}

    def most_rows(self, profile: int) -> int:
        """The largest batch of `profile`."""
        return min(span.max[0] for span in self.profiles[profile].values())

    def failed(self, what: str) -> BackendError:
        """The error for something that TensorRT just refused, with the words that it logged."""
        said = self._said()
        message = f"{self.title} {what} {self.name}: {readable(said) or 'it gave no reason'}"
        if _OUT_OF_MEMORY.search(said):
            return _cuda.GpuMemoryError(message, hint="free GPU memory: nvidia-smi shows who holds it")
        return BackendError(message, hint=f"{rebuild(self.trt)}; or use backend onnxruntime")

    def save_cache(self) -> None:
        """Keep the kernels that were compiled since the plan was opened."""
        if self._cache is not None:
            with self.device.current():
                self._cache.save()

    def close(self) -> None:
        """Free the weights. Every context must be gone."""
        with self.lock, self.device.current():
            # Each before what it refers to.
            self._runtime_config = None
            self._cache = None
            self._engine = None
            self._runtime = None

    def _said(self) -> str:
        messages, self._logger.messages[:] = list(self._logger.messages), []
        return "; ".join(dict.fromkeys(text for severity, text in messages if severity in _SEVERE))

    def _unreadable(self, size: int) -> BackendError:
        said = self._said()
        if _HOST_CODE.search(said) and not self.options.allow_host_code:
            message = f"{self.name} is a version-compatible plan: it carries code that would run on this machine"
            return BackendError(
                message, hint="if you trust where it comes from, load with options=EngineOptions(allow_host_code=True)"
            )
        if _OUT_OF_MEMORY.search(said):
            free = self.device.free_bytes() // MIB
            message = f"not enough GPU memory for {self.name}: it has {size // MIB} MiB, {free} MiB are free"
            return DeviceError(message, hint="free GPU memory: nvidia-smi shows who holds it")
        message = f"{self.title} cannot open {self.name} ({size} bytes): it is damaged, or of another version or GPU"
        return BackendError(message, hint=rebuild(self.trt))

    def _supply_weights(self) -> None:
        trt, engine, source = self.trt, self._engine, self.options.refit_from
        if source is not None:
            refit(self, engine, source)
            return
        # Older releases do not tell; there, a plan without weights is known by its manifest entry alone.
        if hasattr(engine, "get_engine_stat") and engine.refittable:
            stripped = _stat(engine, trt.EngineStat.STRIPPED_WEIGHTS_SIZE)
            if stripped > 0:
                message = f"{self.name} was built without its weights ({stripped // MIB} MiB are missing)"
                raise BackendError(
                    message, hint="load with options=EngineOptions(refit_from=...), the ONNX file that has them"
                )

    def _weight_bytes(self, plan_bytes: int) -> int:
        trt, engine = self.trt, self._engine
        if hasattr(engine, "get_engine_stat"):
            found = _stat(engine, trt.EngineStat.TOTAL_WEIGHTS_SIZE)
            if found > 0:
                return found
        return plan_bytes  # nearly all of a plan is weights

    def _configured(self) -> Any:
        """The settings of every context; None where this TensorRT has no such thing."""
        trt, engine = self.trt, self._engine
        # TensorRT has it too, for nothing that a strategy given to create_execution_context does not do.
        if not hasattr(trt, "CudaGraphStrategy") and not hasattr(trt, "IRuntimeCache"):
            return None
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(runtime_config, "cuda_graph_strategy"):
            graphs = trt.CudaGraphStrategy
            wanted = graphs.WHOLE_GRAPH_CAPTURE if self.options.cuda_graphs else graphs.DISABLED
            runtime_config.cuda_graph_strategy = wanted
        if hasattr(runtime_config, "dynamic_shapes_kernel_specialization_strategy"):
            named = trt.DynamicShapesKernelSpecializationStrategy.__members__
            wanted = named[self.options.specialization.upper()]
            runtime_config.dynamic_shapes_kernel_specialization_strategy = wanted
        return runtime_config

    def _open_cache(self) -> RuntimeCache | None:
        runtime_config, path = self._runtime_config, self.options.runtime_cache
        if path is None or runtime_config is None or not hasattr(runtime_config, "create_runtime_cache"):
            return None
        cache = RuntimeCache(runtime_config, path)
        if not runtime_config.set_runtime_cache(cache.runtime_cache):
            raise self.failed("refuses the runtime cache of")
        return cache


def rebuild(trt: Any) -> str:
    """What to do about a plan that does not run here."""
    backend = trt.__name__.replace("_", "-")
    return f"build the plan again for this machine: clip-export build BUNDLE --engine {backend}"


def check_validity(trt: Any, runtime: Any, blob: bytes, name: str, title: str) -> None:
    """Raise BackendError, naming the cause, for a plan whose header says that it cannot run here.

    Only TensorRT-RTX can tell; elsewhere this finds nothing.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, diagnostics = runtime.get_engine_validity(blob)
    if validity != trt.EngineValidity.INVALID:
        return
    causes = trt.EngineInvalidityDiagnostics.__members__
    found = [sentence for key, sentence in _CAUSES.items() if key in causes and int(diagnostics) & int(causes[key])]
    why = ", ".join(found) or "its header does not fit this machine"
    raise BackendError(f"{title} cannot run {name} here: {why}", hint=rebuild(trt))


_CAUSES: Final = MappingProxyType(
    {
        "VERSION_MISMATCH": "it was built by another version",
        "UNSUPPORTED_CC": "it was built for another kind of GPU",
        "OLD_CUDA_DRIVER": "the NVIDIA driver is older than the one that it needs",
        "OLD_CUDA_RUNTIME": "the CUDA runtime is older than the one that it needs",
        "INSUFFICIENT_GPU_MEMORY": "this GPU has too little memory for it",
        "MALFORMED_ENGINE": "the file is damaged or no plan at all",
        "CUDA_ERROR": "the CUDA driver or runtime is not installed as it should be",
    }
)


def refit(plan: Plan, engine: Any, source: Path) -> None:
    """Give a plan the weights of the ONNX file `source`. Raises BackendError."""
    trt = plan.trt
    if not source.is_file():
        raise BackendError(f"there is no {source}, which has the weights of {plan.name}", hint="copy the whole bundle")
    if not hasattr(trt, "OnnxParserRefitter"):
        raise BackendError(f"{plan.title} takes no weights from an ONNX file", hint="build the plan with its weights")
    if not engine.refittable:
        raise BackendError(
            f"{plan.name} takes no other weights",
            hint="load it without EngineOptions(refit_from=...), or build it with --refit",
        )
    refitter = trt.Refitter(engine, plan._logger)
    parser = trt.OnnxParserRefitter(refitter, plan._logger)
    if not parser.refit_from_file(str(source)):
        missing = ", ".join(list(refitter.get_missing_weights())[:3])
        said = missing or readable("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
        message = f"{source.name} does not have all weights of {plan.name}: {said}"
        raise BackendError(message, hint="refit from the graph that the plan was built from, with other weights")
    if not refitter.refit_cuda_engine():
        missing = refitter.get_missing_weights()
        if missing:
            shown = ", ".join(missing[:3])
            message = f"{source.name} lacks {len(missing)} weights of {plan.name}: {shown}"
            raise BackendError(message, hint="refit from the graph that the plan was built from, with other weights")
        raise plan.failed(f"cannot take the weights of {source.name} for")


def _stat(engine: Any, kind: Any) -> int:
    """A number of bytes, 0 where it is not told."""
    try:
        return int(engine.get_engine_stat(kind))
    except TypeError:  # the bindings of 10.14 ask for a weak reference to the number, which no int has
        return 0


_LOGGERS: dict[str, Any] = {}


def _logger(library: Any) -> Any:
    """One logger for the process: TensorRT keeps the first that it is given, and ignores every other."""
    return _LOGGERS.setdefault(library.trt.__name__, library.logger())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BackendError(
            f"{path.name} cannot be read: {error.strerror or error}",
            hint="copy the whole bundle, or build the plan again",
        ) from error


def _runtime(plan: Plan) -> Any:
    try:
        runtime = plan.trt.Runtime(plan._logger)
    except (TypeError, RuntimeError) as error:  # what the bindings make of a runtime that is null
        raise plan.failed("cannot start, to run") from error
    if plan.options.allow_host_code:
        runtime.engine_host_code_allowed = True
    return runtime


def _tensors(plan: Plan, mode: str) -> tuple[Tensor, ...]:
    trt, engine = plan.trt, plan._engine
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    wanted = trt.TensorIOMode.__members__[mode]
    return tuple(_tensor(plan, name) for name in names if engine.get_tensor_mode(name) == wanted)


def _tensor(plan: Plan, name: str) -> Tensor:
    trt, engine = plan.trt, plan._engine
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        message = f"{plan.name}: {name} is {kind}, which numpy does not have"
        raise BackendError(message, hint="build from a graph with float32, float16 or integer inputs and outputs")
    if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
        message = f"{plan.name}: the shapes of other tensors depend on the values of {name}"
        raise BackendError(message, hint="build from a graph whose shapes depend on shapes alone")
    return Tensor(name, np.dtype(_DTYPES[kind]))


def _profiles(plan: Plan) -> tuple[Profile, ...]:
    engine = plan._engine

    def span(name: str, number: int) -> ShapeRange:
        whole = tuple(int(size) for size in engine.get_tensor_shape(name))
        if -1 not in whole:
            return ShapeRange(min=whole, opt=whole, max=whole)
        low, mid, high = (tuple(int(size) for size in dims) for dims in engine.get_tensor_profile_shape(name, number))
        return ShapeRange(min=low, opt=mid, max=high)

    numbers = range(engine.num_optimization_profiles)
    return tuple({tensor.name: span(tensor.name, number) for tensor in plan.inputs} for number in numbers)


__all__ = ["EngineOptions", "Plan", "Tensor", "check_validity", "refit"]
