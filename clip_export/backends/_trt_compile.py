"""An ONNX file into a serialized plan, in the process that calls: parse, check the profiles, configure, compile.

Runs in the worker (_trt_worker.py), because a compiler that runs out of memory takes its process with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_export.backends._trt_errors import Attempt, ParseFailure, compile_error, parse_error, readable
from clip_export.backends._trt_inspect import Layer, attention_sites, onnx_node, unfused
from clip_export.backends._trt_layers import find_low_precision, quantized_products, read_inspector, read_log
from clip_export.backends._trt_library import Library
from clip_export.backends._trt_phases import Phases
from clip_export.backends._trt_profiles import check_profiles
from clip_export.backends.building import BuildRequest, Shape, ShapeRange, Target
from clip_export.errors import BackendError, DeviceError, PlanBuildError
from clip_export.output_file import reason

MIB = 1024 * 1024
_EXPECTED = re.compile("Unused Input|RemoveDeadLayers")
_ATTENTION = "ATTENTION_OUTPUT"  # the layer type that the operator leaves in a parsed network


class Compilation:
    """One build, from a request to the bytes of a plan and what is known of it.

    `step` is called with how many of STEPS are done, rising, from whatever thread the compiler runs it in.
    """

    def __init__(self, library: Library, request: BuildRequest, target: Target, step: Callable[[int], None]) -> None:
        self._library, self._request, self._target, self._step = library, request, target, step
        self._trt = library.trt
        self._logger = library.logger()
        weightless = request.strip_weights or request.refit
        self._notes: list[str] = []  # our own, beside the compiler's warnings
        self._attempt = Attempt(
            title=library.title,
            graph=request.graph.name,
            compute_capability=target.compute_capability,
            gpu=target.gpu is not None,
            weightless=weightless,
            only_one=any(_only_one(shapes) for ranges in request.profiles for shapes in ranges.values()),
        )
        try:
            builder = self._trt.Builder(self._logger)
        except (TypeError, RuntimeError) as error:  # what the bindings make of a builder that is null
            raise compile_error(self._logger.messages, self._attempt) from error
        self._builder = builder
        self._network = builder.create_network(self._network_flags())
        # The parser owns the weights that the network points to: it has to live until the plan is built.
        self._parser = self._trt.OnnxParser(self._network, self._logger)

    def parse(self) -> None:
        """Read the graph. Raises PlanBuildError, InputError for profiles that do not fit it."""
        parser, network, request = self._parser, self._network, self._request
        if not parser.parse_from_file(os.fspath(request.graph)):
            failures = [_failure(parser.get_error(index)) for index in range(parser.num_errors)]
            raise parse_error(failures, self._logger.messages, request.graph.name, self._library.title)
        if network.num_outputs == 0:
            raise PlanBuildError(
                f"{request.graph.name} is empty: it has no outputs", hint="copy it, or build it, again"
            )
        check_profiles(self._inputs(), request.profiles)
        self._layers = [_layer_of(network.get_layer(index)) for index in range(network.num_layers)]
        self._sites = attention_sites(self._layers)
        self._products = quantized_products(self._layers)
        if request.require_fused_attention:
            self._check_provable()

    def compile(self) -> Any:
        """The plan, as an object with the buffer protocol. Raises PlanBuildError, or DeviceError for want of memory."""
        builder, network = self._builder, self._network
        config = self._config()
        # Kept in a name: a monitor that is collected while the compiler calls it takes the process down.
        monitor = self._monitor()
        config.progress_monitor = monitor
        host_memory = builder.build_serialized_network(network, config)
        if host_memory is None:
            raise compile_error(self._logger.messages, self._attempt)
        if self._timing_cache_path() is not None:
            self._save_timing_cache(config)
        return host_memory

    def examine(self, plan: Any) -> dict[str, Any]:
        """What is known of the plan, as fields of BuildReport.

        Raises PlanBuildError where attention is not fused, though required, or nothing that is quantized runs so.
        """
        found: dict[str, Any] = {"attention": None, "unfused": ()}
        if self._target.gpu is not None:
            found.update(self._inspect(plan))
        operators = any(layer.type == _ATTENTION for layer in self._layers)
        if self._sites and found.get("inspector"):
            found["unfused"] = unfused(found["inspector"], self._sites)
            found["attention"] = None if found["unfused"] else "inspector"
        elif operators and not self._sites:
            found["attention"] = "operator"
        if self._request.require_fused_attention and found["attention"] is None:
            raise self._not_fused(found["unfused"])
        found.update(self._low_precision(found.get("inspector")))
        found["warnings"] = self._warnings()
        return found

    def _network_flags(self) -> int:
        flags = self._trt.NetworkDefinitionCreationFlag
        # Where the flag is gone, every network is strongly typed.
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def _inputs(self) -> dict[str, Shape]:
        network = self._network
        tensors = [network.get_input(index) for index in range(network.num_inputs)]
        return {network_tensor.name: tuple(network_tensor.shape) for network_tensor in tensors}

    def _config(self) -> Any:
        trt, request = self._trt, self._request
        config = self._builder.create_builder_config()
        if not request.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if request.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib * MIB)
        if request.optimization_level is not None:
            config.builder_optimization_level = request.optimization_level
        if self._target.gpu is not None or self._products:  # for the inspector, and for the list of layers in the log
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self._set_flags(config)
        self._set_compute_capability(config)
        for number, given in enumerate(request.profiles, start=1):
            profile = self._builder.create_optimization_profile()
            for name, shapes in given.items():
                profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
            if config.add_optimization_profile(profile) < 0:
                raise PlanBuildError(f"{self._library.title} refuses profile {number} of {request.graph.name}")
        if self._timing_cache_path() is not None:
            self._load_timing_cache(config)
        return config

    def _set_flags(self, config: Any) -> None:
        trt, request = self._trt, self._request
        wanted = (
            (request.version_compatible, "VERSION_COMPATIBLE", "--version-compatible"),
            (request.strip_weights, "STRIP_PLAN", "--strip-weights"),
            (request.refit, "REFIT", "--refit"),
        )
        for is_wanted, name, option in wanted:
            if is_wanted:
                flag = getattr(trt.BuilderFlag, name, None)
                if flag is None:
                    raise PlanBuildError(f"{self._library.title} knows no {option}", hint=f"leave {option} away")
                config.set_flag(flag)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX may allocate during a capture without it
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if request.hardware_compatibility:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def _set_compute_capability(self, config: Any) -> None:
        # Nothing set is the portable plan: sm_80 and all later ones, those included that are not yet known by name.
        name = self._target.compute_capability.replace("sm_", "SM")
        if self._library.builds_anywhere and hasattr(self._trt.ComputeCapability, name):
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self._trt.ComputeCapability, name), 0)

    def _monitor(self) -> Any:
        trt, phases, step = self._trt, Phases(), self._step

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                step(phases.start(phase_name, parent_phase, num_steps))

            def phase_finish(self, phase_name: str) -> None:
                step(phases.finish(phase_name))

            def step_complete(self, phase_name: str, done: int) -> bool:
                step(phases.advance(phase_name, done + 1))
                return True  # False would ask it to stop, at the next step that it takes: a build is killed instead

        return Monitor()

    def _timing_cache_path(self) -> Path | None:
        # A compiler for named GPUs measures nothing: a cache would do nothing, but asks for a GPU.
        return None if self._library.builds_anywhere else self._request.timing_cache

    def _load_timing_cache(self, config: Any) -> None:
        path, content = self._timing_cache_path(), b""
        with self._noting(path):
            content = path.read_bytes() if path is not None and path.is_file() else b""
        timing_cache = config.create_timing_cache(content)
        # A cache of another GPU or release is of no use, and no reason to fail: it starts anew and is replaced.
        if timing_cache is None or not config.set_timing_cache(timing_cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _save_timing_cache(self, config: Any) -> None:
        path, timing_cache = self._timing_cache_path(), config.get_timing_cache()
        if path is None or timing_cache is None:
            return
        with self._noting(path):
            if path.is_file():  # a build beside this one may have added to it meanwhile
                other = config.create_timing_cache(path.read_bytes())
                if other is not None:
                    timing_cache.combine(other, False)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(path, timing_cache.serialize())

    @contextlib.contextmanager
    def _noting(self, path: Path | None) -> Iterator[None]:
        """A timing cache that cannot be read or written costs time, not the plan: it is noted."""
        try:
            yield
        except OSError as error:
            self._notes.append(f"the timing cache {path} was not used: {reason(error)}")

    def _inspect(self, plan: Any) -> dict[str, Any]:
        trt = self._trt
        try:
            runtime = trt.Runtime(self._logger)
        except (TypeError, RuntimeError) as error:
            raise compile_error(self._logger.messages, self._attempt) from error
        if self._request.version_compatible:
            runtime.engine_host_code_allowed = True  # the plan has just been made here
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            said = compile_error(self._logger.messages, self._attempt)
            raise DeviceError(f"the plan was built, but cannot be loaded here: {said.message}", hint=said.hint)
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return {"inspector": text, "activation_bytes": _activation_bytes(engine)}

    def _low_precision(self, inspector: str | None) -> dict[str, Any]:
        layers = read_log(self._logger.layers) or read_inspector(inspector or "")
        graph, profiles = self._request.graph.name, len(self._request.profiles)
        found = find_low_precision(self._products, layers, graph=graph, profiles=profiles)
        self._notes += [] if found.warning is None else [found.warning]
        return {"low_precision": found.low_precision, "dequantized": found.dequantized}

    def _check_provable(self) -> None:
        graph, operators = self._request.graph.name, any(layer.type == _ATTENTION for layer in self._layers)
        if not self._sites and not operators:
            message = f"{graph} holds no attention: neither the operator nor a Softmax between two MatMuls"
            raise PlanBuildError(message, hint="leave --require-fused-attention away")
        if self._sites and self._target.gpu is None:
            message = f"whether the attention of {graph} becomes one kernel cannot be known here: only a GPU that runs"
            hint = "build on that GPU, or in fp16, where the Attention operator is its own proof"
            raise PlanBuildError(f"{message} the plan can inspect it", hint=hint)

    def _not_fused(self, scopes: Sequence[str]) -> BackendError:
        graph, many = self._request.graph.name, len(self._sites)
        names = ", ".join(scopes) if scopes else "those of all layers"
        hint = "build fp16, where the Attention operator is fused or refused; or leave --require-fused-attention away"
        return PlanBuildError(
            f"{len(scopes) or many} of {many} attentions of {graph} are not fused: {names}", hint=hint
        )

    def _warnings(self) -> tuple[str, ...]:
        messages = [text for severity, text in self._logger.messages if severity == "WARNING"]
        # Hidden states alone need no end of text: that input is there, and is not used.
        warned = [readable(text) for text in messages if not _EXPECTED.search(text)]
        return tuple(dict.fromkeys((*self._notes, *warned)))


def write_durably(path: Path, content: Any) -> None:
    """Write bytes, or what has the buffer protocol, as a new file; it is on the disk when this returns."""
    with path.open("xb") as file:
        file.write(memoryview(content))
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: Any) -> None:
    """Write a file beside `path` and rename it over it: what was there stays until the new one is whole."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write_durably(part, content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _only_one(shapes: ShapeRange) -> bool:
    return shapes.max[:1] == (1,)  # of the first axis, the batch


def _failure(parser_error: Any) -> ParseFailure:
    code = str(parser_error.code()).rpartition(".")[2]
    operator, node = parser_error.node_operator() or "", parser_error.node_name() or ""
    return ParseFailure(code=code, text=parser_error.desc() or "", node=node, operator=operator)


def _layer_of(network_layer: Any) -> Layer:
    inputs = [network_layer.get_input(index) for index in range(network_layer.num_inputs)]
    outputs = [network_layer.get_output(index) for index in range(network_layer.num_outputs)]
    node = onnx_node(network_layer.metadata) or network_layer.name
    return Layer(node=node, type=network_layer.type.name, inputs=_names(inputs), outputs=_names(outputs))


def _names(tensors: Sequence[Any]) -> tuple[str, ...]:
    return tuple(network_tensor.name for network_tensor in tensors if network_tensor is not None)


def _activation_bytes(engine: Any) -> tuple[int, ...]:
    profiles = range(engine.num_optimization_profiles)
    if hasattr(engine, "get_device_memory_size_for_profile_v2"):
        return tuple(int(engine.get_device_memory_size_for_profile_v2(index)) for index in profiles)
    return tuple(int(engine.device_memory_size_v2) for _ in profiles)  # the largest: true of one, enough for each


__all__ = ["Compilation", "write_durably"]
