"""Bundle and backend -> Encoder. Needs numpy, tokenizers, pillow and one backend; never torch."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from clip_export import backends
from clip_export.backends.building import EngineOptions
from clip_export.bundle import Bundle
from clip_export.choice import GRAPHS, Choice, choose
from clip_export.context_inputs import completed
from clip_export.encoder import Encoder, OnDevice, Run
from clip_export.errors import BackendError, BundleError, BundleIntegrityError, InputError, MissingDependencyError
from clip_export.golden import Golden
from clip_export.graph.files import missing
from clip_export.graph.primitives import prepare
from clip_export.manifest import REBUILD
from clip_export.plans import Plan
from clip_export.preprocess import Preprocessor, preprocess_versions
from clip_export.spec import ModelSpec, Tower
from clip_export.tokenizer import Tokenizer, dialect_versions

MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would start them all
TRIM_STEP = 8  # tokens: plans meet few lengths, and tensor cores like multiples of 8


def load(
    path: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    fallback: str | None = None,
    threads: int | None = None,
    check_files: bool = True,
    batch_size: int | None = None,
    options: EngineOptions | Mapping[str, Any] | None = None,
) -> Encoder:
    """Open the bundle at `path` and its engines.

    `backend` is tensorrt, tensorrt-rtx or onnxruntime, by default the best that works here: a plan that fits this GPU,
    or the graphs. `device` is `cpu` or `cuda:0`, by default what the backend runs on; `precision` is that of the plan
    or graph, by default the fastest that there is a plan of, and fp32 of the graphs. `fallback="onnxruntime"` runs the
    graphs, with a warning, where `backend` cannot run here. `threads` are those of one engine, all cores by default;
    `check_files=False` skips the hashing of files that are known to be whole; `batch_size` is the most that an engine
    is given at once; `options` are the backend's own (`clip_export.EngineOptions` for plans). A precision that was
    published below its accuracy contract is loaded with a warning that says what it missed.

    Raises InputError for threads or a batch size that cannot be; BundleError for a bundle that is damaged, or whose
    golden samples the libraries installed here tokenize or preprocess in another way; NoPlanError where no plan fits,
    saying of each why; other BackendErrors or MissingDependencyError where no engine can be opened.
    """
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        raise InputError(
            f"expected threads from 1 to {MAX_THREADS}, found {threads!r}", hint="leave it out for all cores"
        )
    if fallback not in (None, GRAPHS):
        raise InputError(f"expected fallback {GRAPHS} or none, found {fallback!r}")
    if backend is not None and backend not in backends.names():
        raise BackendError(f"there is no backend {backend!r}", hint=f"choose one of: {', '.join(backends.names())}")
    bundle = path if isinstance(path, Bundle) else Bundle.open(path, check_files=check_files)
    host_code = isinstance(options, EngineOptions) and options.allow_host_code
    try:
        choice = choose(bundle, backend=backend, device=device, precision=precision, host_code=host_code)
        for part in filter(None, (bundle, bundle.second)):
            contract = part.manifest.contracts.get(choice.precision)
            if contract is not None and not contract.kept:
                words = "; ".join(contract.missed)
                warnings.warn(f"{choice.precision} of {part.path} misses its accuracy contract: {words}", stacklevel=2)
        opened = partial(open_choice, threads=threads, options=options, batch_size=batch_size)
        return _with_second(bundle, choice, opened)
    except (BackendError, MissingDependencyError) as error:
        if fallback is None or backend == fallback:
            raise
        warnings.warn(f"running on {fallback} instead of {backend or 'a plan'}: {error.message}", stacklevel=2)
    opened = partial(open_choice, threads=threads, batch_size=batch_size)
    return _with_second(bundle, choose(bundle, backend=fallback), opened)


def _with_second(bundle: Bundle, choice: Choice, opened: Callable[[Bundle, Choice], Encoder]) -> Encoder:
    """The Encoder of `bundle` and, for a model with two text encoders, the second in it, on what the first runs on."""
    encoder, second = opened(bundle, choice), bundle.second
    if second is not None:
        try:
            chosen = choose(second, backend=choice.backend, device=choice.device, precision=choice.precision)
            encoder.second = opened(second, chosen)
        except BaseException:
            encoder.close()
            raise
    return encoder


def open_choice(
    bundle: Bundle,
    choice: Choice,
    *,
    threads: int | None = None,
    options: EngineOptions | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> Encoder:
    """The Encoder of `bundle` over the engines of `choice`. Raises as `load` does."""
    wanted = EngineOptions if choice.plans else Mapping
    if options is not None and not isinstance(options, wanted):
        hint = "plans take clip_export.EngineOptions, onnxruntime a mapping such as {'tf32': True}; name the backend"
        raise InputError(f"{choice.backend} cannot be given {type(options).__name__} as options", hint=hint)
    size = choice.batch_size if batch_size is None else batch_size
    return assemble(bundle, choice, partial(_open, bundle, choice, threads, options), batch_size=size)


def assemble(
    bundle: Bundle, choice: Choice, open_tower: Callable[[Tower], backends.Engine], *, batch_size: int
) -> Encoder:
    """The Encoder of `bundle` over the engines that `open_tower` opens; closes them where anything goes wrong."""
    tokenizer, preprocessor = front(bundle.spec, bundle.tokenizer_json() if bundle.spec.text is not None else None)
    _check_front(bundle, bundle.golden(), tokenizer, preprocessor)
    engines: dict[Tower, backends.Engine] = {}

    def close() -> None:
        for engine in engines.values():
            engine.close()

    try:
        for tower in choice.plans or bundle.spec.towers:
            engines[tower] = open_tower(tower)
            _check_outputs(bundle, tower, choice.precision, engines[tower])
        return Encoder(
            bundle.spec,
            run_text=_text_run(bundle.spec, engines.get("text")),
            run_image=engines.get("image"),
            on_device=_on_device(bundle.spec, choice, engines),
            tokenizer=tokenizer,
            preprocessor=preprocessor,
            trim=_may_trim(bundle, choice.precision),
            trim_embeddings=bundle.spec.text is not None and bundle.graph("text", choice.precision).sequence_dynamic,
            trim_step=TRIM_STEP if choice.plans else 1,
            batch_size=batch_size,
            close=close,
            engine=choice.title,
        )
    except BaseException:
        close()
        raise


def _open(bundle: Bundle, choice: Choice, threads: int | None, options: Any, tower: Tower) -> backends.Engine:
    plan = choice.plans.get(tower)
    if plan is not None:
        return _open_plan(bundle, choice.device, plan, options or EngineOptions())
    path = bundle.graph_path(tower, choice.precision)
    return backends.open_engine(choice.backend, path, device=choice.device, threads=threads, options=options)


def _open_plan(bundle: Bundle, device: str, plan: Plan, options: EngineOptions) -> backends.Engine:
    path = bundle.plan_path(plan)
    outputs = bundle.graph(plan.tower, plan.precision).outputs
    # Beside the plan and hidden, so that it is no file of the bundle: what this GPU has compiled serves the next start.
    cache = options.runtime_cache or path.with_name(f".runtime-{plan.tower}.cache")
    options = dataclasses.replace(options, runtime_cache=cache)
    if not plan.needs_graph or options.refit_from is not None:
        return backends.open_engine(plan.backend, path, device=device, outputs=outputs, options=options)
    with tempfile.TemporaryDirectory(prefix="clip-export-") as work:  # its weights have the names of what was compiled
        options = dataclasses.replace(options, refit_from=_prepared(bundle, plan, Path(work)))
        return backends.open_engine(plan.backend, path, device=device, outputs=outputs, options=options)


def _prepared(bundle: Bundle, plan: Plan, work: Path) -> Path:
    """The graph as it was compiled: the bundle's, with what the compiler's own form of it adds."""
    lacking = missing("onnx", "onnx_ir")
    if lacking:
        message = f"{plan.file} has no weights, and taking those of its graph needs {' and '.join(lacking)}"
        raise MissingDependencyError(message, hint="pip install onnx onnx-ir")
    graph = bundle.graph_path(plan.tower, plan.precision)
    return prepare(graph, work / graph.name, primitive=plan.options.get("attention") == "primitive")


def _on_device(spec: ModelSpec, choice: Choice, engines: Mapping[Tower, backends.Engine]) -> dict[Tower, OnDevice]:
    """The towers that can leave their outputs on a GPU, with the outputs that are there to be left."""
    if choice.device == "cpu":
        return {}
    outputs = {
        tower: choice.plans[tower].outputs if tower in choice.plans else engines[tower].outputs for tower in engines
    }
    runs = {tower: cast(backends.DeviceEngine, engine).run_on_device for tower, engine in engines.items()}
    if "text" in runs and spec.context is not None:
        runs["text"] = completed(runs["text"], spec)
    return {tower: OnDevice(run, outputs[tower]) for tower, run in runs.items()}


def _text_run(spec: ModelSpec, engine: backends.Engine | None) -> Run | None:
    return engine if engine is None or spec.context is None else completed(engine, spec)


def _check_outputs(bundle: Bundle, tower: Tower, precision: str, engine: backends.Engine) -> None:
    graph = bundle.graph(tower, precision)
    if set(engine.outputs) != set(graph.outputs):
        message = f"{graph.file} gives {', '.join(engine.outputs)}, the manifest says {', '.join(graph.outputs)}"
        raise BundleIntegrityError(message, hint=REBUILD)


def front(spec: ModelSpec, tokenizer_json: str | None) -> tuple[Tokenizer | None, Preprocessor | None]:
    """What stands before the towers of `spec`: its tokenizer and its preprocessing, None for a tower it lacks."""
    tokenizer = None
    if spec.tokenizer is not None:
        assert tokenizer_json is not None
        tokenizer = Tokenizer(spec.tokenizer, tokenizer_json)
    return tokenizer, Preprocessor(spec.preprocess) if spec.preprocess is not None else None


def _may_trim(bundle: Bundle, precision: str) -> bool:
    """Trimming needs a graph with a dynamic sequence, and nobody who asks for the states of all positions."""
    if bundle.spec.text is None:
        return False
    graph = bundle.graph("text", precision)
    return graph.sequence_dynamic and "hidden_states" not in graph.outputs


def _check_front(
    bundle: Bundle, golden: Golden, tokenizer: Tokenizer | None, preprocessor: Preprocessor | None
) -> None:
    """A library that tokenizes or resizes in another way than the build's would change embeddings silently."""
    mismatch = partial(_mismatch, bundle)
    if tokenizer is not None and golden.text is not None:
        tokens = tokenizer(golden.text.texts, truncate=True)
        same = (tokens.input_ids == golden.text.input_ids).all(axis=1) & (tokens.eot_index == golden.text.eot_index)
        if not same.all():
            text = golden.text.texts[int(np.argmin(same))]
            raise mismatch(f"other token ids than the build for the golden text {text!r}", dialect_versions())
    if preprocessor is not None and golden.image is not None:
        pixels = preprocessor(golden.image.files)
        same = (pixels == golden.image.pixels).all(axis=(1, 2, 3))
        if not same.all():
            what = f"other pixels than the build for golden picture {int(np.argmin(same))}"
            raise mismatch(what, preprocess_versions())


def _mismatch(bundle: Bundle, what: str, versions: dict[str, str]) -> BundleError:
    built = bundle.manifest.provenance.versions
    changed = [f"{name} {built.get(name)} -> {here}" for name, here in versions.items() if built.get(name) != here]
    return BundleError(
        f"the libraries installed here give {what}",
        hint=f"changed since the build: {', '.join(changed) or 'no version that is recorded'}; "
        "install the versions of the build, or build the bundle again",
    )
