"""Bundle and backend -> Encoder. Needs numpy, tokenizers, pillow and one backend; never torch."""

from __future__ import annotations

import os
from functools import partial

import numpy as np

from clip_export import backends
from clip_export.bundle import Bundle
from clip_export.encoder import DEFAULT_BATCH_SIZE, Encoder
from clip_export.errors import BundleError, BundleIntegrityError, InputError
from clip_export.golden import Golden
from clip_export.manifest import REBUILD
from clip_export.preprocess import Preprocessor, preprocess_versions
from clip_export.spec import ModelSpec, Tower
from clip_export.tokenizer import Tokenizer, dialect_versions

MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would start them all


def load(
    path: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    check_files: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Encoder:
    """Open the bundle at `path` and its engines.

    `backend` is by default the best that works here; `device` is `cpu` or `cuda:0`; `threads` are those of one engine,
    all cores by default; `check_files=False` skips the hashing of files that are known to be whole; `batch_size` is
    the most that an engine is given at once.

    Raises InputError for threads or a batch size that cannot be; BundleError for a bundle that is damaged, or whose
    golden samples the libraries installed here tokenize or preprocess in another way; BackendError or
    MissingDependencyError where no engine can be opened.
    """
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        raise InputError(
            f"expected threads from 1 to {MAX_THREADS}, found {threads!r}", hint="leave it out for all cores"
        )
    bundle = path if isinstance(path, Bundle) else Bundle.open(path, check_files=check_files)
    tokenizer, preprocessor = front(bundle.spec, bundle.tokenizer_json() if bundle.spec.text is not None else None)
    _check_front(bundle, bundle.golden(), tokenizer, preprocessor)
    chosen = backends.choose(backend)
    engines: dict[str, backends.Engine] = {}

    def close() -> None:
        for engine in engines.values():
            engine.close()

    try:
        for tower in bundle.spec.towers:
            engines[tower] = backends.open_engine(chosen, bundle.graph_path(tower), device=device, threads=threads)
            _check_outputs(bundle, tower, engines[tower])
    except BaseException:
        close()
        raise
    return Encoder(
        bundle.spec,
        run_text=engines.get("text"),
        run_image=engines.get("image"),
        tokenizer=tokenizer,
        preprocessor=preprocessor,
        trim=_may_trim(bundle),
        batch_size=batch_size,
        close=close,
    )


def _check_outputs(bundle: Bundle, tower: Tower, engine: backends.Engine) -> None:
    graph = bundle.graph(tower)
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


def _may_trim(bundle: Bundle) -> bool:
    """Trimming needs a graph with a dynamic sequence, and nobody who asks for the states of all positions."""
    if bundle.spec.text is None:
        return False
    graph = bundle.graph("text")
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
