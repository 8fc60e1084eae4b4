"""The flow on one screen: checkpoint -> towers -> graphs -> bundle.

Each tower is read, traced, written and freed before its engine is opened, and before the next tower is read: the peak
is that of one tower. A bundle is published only after its own engines have replayed its golden samples.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export import __version__, backends
from clip_export.bundle import Bundle, Graph, Provenance, write_manifest
from clip_export.checkpoints import Checkpoint, Options, read
from clip_export.context_inputs import completed, sampled_feeds
from clip_export.encoder import Encoder
from clip_export.errors import InputError, MissingDependencyError
from clip_export.golden import Golden, ImageGolden, TextGolden, golden_images, golden_texts
from clip_export.graph.files import missing
from clip_export.manifest import GOLDEN, REPORT, SECOND, TOKENIZER
from clip_export.preprocess import preprocess_versions
from clip_export.progress import Progress, silent
from clip_export.publish import staged
from clip_export.runtime import front
from clip_export.spec import TOWERS, Activation, Dialect, Tower
from clip_export.tokenizer import dialect_versions
from clip_export.verification import replay, require_contract

if TYPE_CHECKING:
    from clip_export.graph.export import GraphShape

ENGINES = Path("engines")
PROOF_BACKEND = "onnxruntime"
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "torch")


def build(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    towers: Sequence[Tower] | None = None,
    outputs: Sequence[str] | None = None,
    context: bool = False,
    force: bool = False,
    activation: Activation | None = None,
    tokenizer_dialect: Dialect | None = None,
    preprocess_dialect: Dialect | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Export `checkpoint` to a bundle at `output` (engines/NAME by default) and return it, verified.

    `checkpoint` is a directory, a file, a hub id or "demo"; `towers` are those to export, all by default; `outputs`
    are among embedding, pooled and hidden_states; `context` makes text graphs that give a diffusion model's Context,
    and embeddings too, of the text encoders alone; `force` replaces a bundle that is there. The rest states what the
    checkpoint leaves open.

    Raises CheckpointError, ExportError, ContractError or BundleError. Nothing is left at `output` then, and what was
    there before is untouched.
    """
    if not os.fspath(checkpoint):
        raise InputError("expected a checkpoint, found an empty name", hint="a directory, a file, a hub id or demo")
    versions = _versions()
    options = Options(
        towers=None if towers is None else _checked(towers),
        activation=activation,
        tokenizer_dialect=tokenizer_dialect,
        preprocess_dialect=preprocess_dialect,
        context=context,
    )
    if context and "image" in (towers or ()):
        raise InputError("Context comes from text towers, and an image tower was asked for", hint="leave out --towers")
    target = Path(output) if output is not None else ENGINES / default_name(checkpoint)
    with staged(target, force=force) as staging:
        progress("read the checkpoint", 0, 0)
        source = read(checkpoint, options)
        stated = dataclasses.asdict(options) | {"towers": ",".join(towers or ()), "outputs": ",".join(outputs or ())}
        stated["context"] = "true" if context else ""
        selected = ("text",) if context else towers
        made = partial(
            _build_parts, towers=selected, outputs=outputs, versions=versions, stated=stated, progress=progress
        )
        name = default_name(checkpoint)
        if source.second is not None:
            # A bundle of its own, so that all that is done with one can be done with it.
            (staging / SECOND).mkdir()
            made(source.second, staging / SECOND, f"{name}.{SECOND}")
        made(source, staging, name)
        require_contract(replay(staging, backend=PROOF_BACKEND, progress=progress))
    return Bundle.open(target, check_files=False)


def reference(checkpoint: str | os.PathLike[str], options: Options | None = None) -> Encoder:
    """The torch towers of `checkpoint` in float32 behind the same Encoder that runs a bundle's engines."""
    return _reference(read(checkpoint, options))


def _reference(source: Checkpoint) -> Encoder:
    from clip_export.graph.proof import run_tower
    from clip_export.towers import check_outputs, make_tower

    runs = {}
    for tower in source.spec.towers:
        names = check_outputs(source.spec, tower, None)
        module = make_tower(source.spec, tower, source.weights, names)
        runs[tower] = lambda feeds, module=module, names=names: run_tower(module, names, feeds)
    if source.spec.context is not None:
        runs["text"] = completed(runs["text"], source.spec)
    tokenizer, preprocessor = front(source.spec, source.tokenizer_json)
    return Encoder(
        source.spec,
        run_text=runs.get("text"),
        run_image=runs.get("image"),
        tokenizer=tokenizer,
        preprocessor=preprocessor,
        second=None if source.second is None else _reference(source.second),
    )


def _build_parts(
    source: Checkpoint,
    staging: Path,
    name: str,
    *,
    towers: Sequence[Tower] | None,
    outputs: Sequence[str] | None,
    versions: dict[str, str],
    stated: dict[str, str | None],
    progress: Progress,
) -> None:
    """The graphs of one checkpoint, and all that goes with them, into `staging`."""
    if towers is not None:
        source = dataclasses.replace(source, spec=source.spec.select(towers))
    built = [_build_tower(source, tower, outputs, staging, progress) for tower in source.spec.towers]
    _write(staging, name, source, built, _provenance(source, versions, stated))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """One tower in the staging directory: its graph, its golden samples, the differences that its proof found."""

    tower: Tower
    graph: Graph
    golden: TextGolden | ImageGolden
    proof: dict[str, float]


def _build_tower(
    source: Checkpoint, tower: Tower, outputs: Sequence[str] | None, staging: Path, progress: Progress
) -> _Built:
    from clip_export.graph.export import OPSET, export
    from clip_export.graph.proof import Case, cases, context_feeds, prove, run_tower
    from clip_export.towers import check_outputs, make_tower

    step = _stepper(tower, progress)
    step("read the weights")
    outputs = check_outputs(source.spec, tower, outputs)
    shape = _graph_shape(source, tower, outputs)
    module = make_tower(source.spec, tower, source.weights, outputs)
    step("run the reference")
    feeds = _golden_feeds(source, tower)
    expected = run_tower(module, outputs, feeds)
    questions = cases(shape, feeds, expected)
    if shape.context_width is not None:
        asked = context_feeds(feeds)
        questions.append(Case(title="hidden positions", feeds=asked, expected=run_tower(module, outputs, asked)))
    step("export")
    path = staging / f"{tower}.onnx"
    export(module, shape, path)
    del module
    gc.collect()  # the exporter leaves cycles that hold the weights
    step("prove the graph")
    engine = backends.open_engine(PROOF_BACKEND, path)
    proof = prove(engine, tower, questions)
    engine.close()
    step("done")
    graph = Graph(
        file=path.name, opset=OPSET, inputs=shape.inputs, outputs=outputs, sequence_dynamic=shape.sequence_dynamic
    )
    return _Built(tower=tower, graph=graph, golden=_golden(tower, feeds, expected), proof=proof)


def _stepper(tower: Tower, progress: Progress) -> Callable[[str], None]:
    counter = itertools.count()
    return lambda step: progress(f"{tower} tower: {step}", next(counter), 4)


def _graph_shape(source: Checkpoint, tower: Tower, outputs: tuple[str, ...]) -> GraphShape:
    from clip_export.graph.export import GraphShape

    spec, width = source.spec, None
    if tower == "text":
        assert spec.text is not None
        size: tuple[int, ...] = (spec.text.context_length,)
        width = spec.text.transformer.width if spec.context is not None else None
        layers, causal = spec.text.transformer.layers, spec.text.causal
    else:
        assert spec.image is not None
        size = (3, spec.image.image_size, spec.image.image_size)
        layers, causal = spec.image.transformer.layers, False
    return GraphShape(
        tower=tower, input=size, layers=layers, outputs=outputs, sequence_dynamic=causal, context_width=width
    )


def _golden_feeds(source: Checkpoint, tower: Tower) -> dict[str, np.ndarray]:
    """The golden inputs of one tower, as its graph takes them."""
    tokenizer, preprocessor = front(source.spec, source.tokenizer_json)
    if tower == "image":
        assert preprocessor is not None
        return {"pixels": preprocessor(golden_images())}
    assert tokenizer is not None
    tokens = tokenizer(golden_texts(), truncate=True)
    feeds = {"input_ids": tokens.input_ids, "eot_index": tokens.eot_index}
    return feeds if source.spec.context is None else sampled_feeds(feeds, source.spec)


def _golden(tower: Tower, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> TextGolden | ImageGolden:
    if tower == "text":
        ids, ends = feeds["input_ids"], feeds["eot_index"]
        return TextGolden(texts=golden_texts(), input_ids=ids, eot_index=ends, outputs=outputs)
    return ImageGolden(files=golden_images(), **feeds, outputs=outputs)


def _write(staging: Path, name: str, source: Checkpoint, built: Sequence[_Built], provenance: Provenance) -> None:
    """Everything but the graphs: golden samples, tokenizer, report, and last the manifest."""
    texts = [part.golden for part in built if isinstance(part.golden, TextGolden)]
    images = [part.golden for part in built if isinstance(part.golden, ImageGolden)]
    Golden(text=next(iter(texts), None), image=next(iter(images), None)).save(staging / GOLDEN)
    if source.spec.text is not None:
        assert source.tokenizer_json is not None
        (staging / TOKENIZER).write_bytes(source.tokenizer_json.encode())
    # No times in it: the same inputs and versions give the same bytes.
    report = {"relative_difference_of_engine_to_torch": {part.tower: part.proof for part in built}}
    (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_manifest(
        staging,
        name=name,
        spec=source.spec,
        provenance=provenance,
        variants={"fp32": {part.tower: part.graph for part in built}},
    )


def _provenance(source: Checkpoint, versions: dict[str, str], stated: dict[str, str | None]) -> Provenance:
    return Provenance(
        format=source.source.format,
        name=source.source.name,
        files=source.source.sha256,
        versions=versions,
        options={key: value for key, value in stated.items() if value},
    )


def default_name(checkpoint: str | os.PathLike[str]) -> str:
    """What a bundle is called: the last part of the path or hub id, in lower case, with `-` for unusual characters."""
    last = os.fspath(checkpoint).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    stem = re.sub(r"\.(pt|pth|bin|ckpt|safetensors)$", "", last.lower())
    return re.sub(r"[^a-z0-9._+-]+", "-", stem).strip("-.") or "bundle"


def _checked(towers: Sequence[Tower]) -> tuple[Tower, ...]:
    unknown = sorted(set(towers) - set(TOWERS))
    if unknown or not towers:
        raise InputError(f"expected towers among {', '.join(TOWERS)}, found {', '.join(unknown) or 'none'}")
    return tuple(towers)


def _versions() -> dict[str, str]:
    """What the numbers of a build depend on. Raises before minutes of work, not after, where something is missing."""
    lacking = missing("torch", "onnx", "onnx_ir", "onnxscript")
    if lacking:
        raise MissingDependencyError(
            f"building needs {', '.join(lacking)}, not installed here", hint="pip install 'clip-export[export,cpu]'"
        )
    # The backend is asked, not its distribution: that of onnxruntime may also be called onnxruntime-gpu.
    backend = backends.status(backends.choose(PROOF_BACKEND))
    versions = {"clip-export": __version__, backend.name: str(backend.version)}
    versions |= {library: metadata.version(library) for library in _LIBRARIES}
    return versions | dialect_versions() | preprocess_versions()
