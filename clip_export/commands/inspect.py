"""clip-export inspect: what a bundle is, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clip_export.commands._eight_bits import percent
from clip_export.commands._output import print_columns, print_json, size_text
from clip_export.spec import ModelSpec, PreprocessSpec, TokenizerSpec, TransformerSpec, to_dict

if TYPE_CHECKING:
    from clip_export.bundle import Bundle
    from clip_export.plans import Plan


def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of a bundle.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a bundle.

    Its towers, its graphs, where it comes from and what it holds. Every file is checked against the manifest first.
    Needs neither torch nor a backend.
    """
    import clip_export

    opened = clip_export.Bundle.open(bundle)
    golden = _golden_counts(opened)
    if json:
        print_json({**to_dict(opened.manifest), "golden": golden})
        return
    typer.echo(f"{opened.manifest.name}, bundle schema {opened.manifest.schema_version}")
    _section("towers", _spec_rows(opened.manifest.spec))
    _section("graphs", _graph_rows(opened))
    if opened.manifest.contracts:
        _section("8 bits", _eight_bit_rows(opened))
    if opened.manifest.plans:
        _section("plans", _plan_rows(opened))
    _section("built from", _provenance_rows(opened))
    counts = ", ".join(f"{count} {kind}" for kind, count in golden.items() if count)
    _section("golden samples", [(counts,)])
    _section("files, all as the manifest has them", _file_rows(opened))


def _section(title: str, rows: list[tuple[str, ...]]) -> None:
    typer.echo(f"\n{title}")
    print_columns(rows)


def _golden_counts(bundle: Bundle) -> dict[str, int]:
    golden = bundle.golden()
    texts = 0 if golden.text is None else len(golden.text.texts)
    images = 0 if golden.image is None else len(golden.image.files)
    return {"texts": texts, "images": images}


def _spec_rows(spec: ModelSpec) -> list[tuple[str, ...]]:
    return list(_spec_lines(spec))


def _spec_lines(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    if spec.text is not None and spec.tokenizer is not None:
        context = f"{spec.text.context_length} tokens of {spec.text.vocab_size}"
        mask = "causal" if spec.text.causal else "not causal"
        yield "text", f"{context} -> {_transformer(spec.text.transformer)}, {mask} -> {_dim(spec.text.embedding_dim)}"
        yield "tokenizer", _tokenizer(spec.tokenizer)
    if spec.context is not None:
        others = ", with a second encoder in text_2" if spec.context.second else ""
        yield "context", f"as {spec.context.family} takes it{others}"
    if spec.image is not None and spec.preprocess is not None:
        size, patch = spec.image.image_size, spec.image.patch_size
        patches = f"{size} x {size} pixels in patches of {patch} x {patch}"
        yield "image", f"{patches} -> {_transformer(spec.image.transformer)} -> {_dim(spec.image.embedding_dim)}"
        yield "preprocess", _preprocess(spec.preprocess)
    if spec.logit_scale is not None:
        bias = "" if spec.logit_bias is None else f" + {spec.logit_bias:.4g}"
        yield "similarity", f"{math.exp(spec.logit_scale):.4g} x cosine{bias}"


def _transformer(spec: TransformerSpec) -> str:
    return f"{spec.layers} layers of width {spec.width}, {spec.heads} heads, {spec.activation}"


def _dim(dim: int | None) -> str:
    return "no projection" if dim is None else f"embedding of {dim}"


def _tokenizer(spec: TokenizerSpec) -> str:
    ids = f"start {spec.start_id}, end {spec.end_id}, padded with {spec.pad_id}"
    long = "is cut" if spec.truncate else "is an error"
    return f"{spec.dialect} dialect; {ids}; pooled at the {_POOLING[spec.pooling]}; longer text {long}"


_POOLING = {"argmax": "first highest id", "first_end": "first end id"}


def _preprocess(spec: PreprocessSpec) -> str:
    how = {"shortest": "short side to", "longest": "long side to", "squash": "both sides to"}[spec.resize_mode]
    statistics = f"mean {_numbers(spec.mean)}, std {_numbers(spec.std)}"
    return (
        f"{spec.dialect} dialect; {how} {spec.resize_size}, {spec.interpolation}; crop {spec.crop_size}; {statistics}"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _graph_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    rows = [("precision", "tower", "file", "size", "opset", "inputs", "outputs")]
    for precision, graphs in bundle.manifest.variants.items():
        for tower, graph in graphs.items():
            # The weights of a large graph are a second file, which carries the graph's name in front.
            size = sum(entry.size for name, entry in bundle.manifest.files.items() if name.startswith(graph.file))
            names = (", ".join(graph.inputs), ", ".join(graph.outputs))
            rows.append((precision, tower, graph.file, size_text(size), str(graph.opset), *names))
    return list(rows)


def _eight_bit_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    """How much of each precision is in 8 bits, and how exact that was when it was built."""
    rows = [("precision", "tower", "of linear FLOPs", "min cosine", "required", "calibrated on", "")]
    reports = bundle.report().get("precisions", {})
    for precision, contract in bundle.manifest.contracts.items():
        verdict = "" if contract.kept else "BELOW ITS CONTRACT"
        for tower, found in reports.get(precision, {}).get("towers", {}).items():
            measured = (percent(found["share"]), f"{found['score']['cosine']:.7f}", f"{contract.min_cosine:.7g}")
            rows.append((precision, tower, *measured, found["calibrated_on"], verdict))
    return list(rows)


def _plan_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    rows = [("tower", "precision", "compiler", "gpu", "profiles", "attention", "built on", "GPU memory, one thread")]
    for plan in bundle.manifest.plans:
        compiler, gpu = f"{plan.backend} {plan.version}", plan.compute_capability
        where = "no GPU" if plan.gpu is None else f"{plan.gpu}, driver {plan.driver}"
        attention = "not known" if plan.attention is None else "fused"
        shapes = (_batches(plan), attention, where, _memory(bundle, plan))
        rows.append((plan.tower, plan.precision, compiler, gpu, *shapes))
    return list(rows)


def _batches(plan: Plan) -> str:
    """The largest shape of each profile without the axes that never change: 1 x 16, 1 x 77, 8 x 16."""
    inputs = [max(profile.values(), key=lambda shapes: len(shapes.max)) for profile in plan.profiles]
    moving = [
        axis
        for axis in range(len(inputs[0].max))
        if len({size for s in inputs for size in (s.min[axis], s.max[axis])}) > 1
    ]
    return ", ".join("x".join(str(shapes.max[axis]) for axis in moving or [0]) for shapes in inputs)


def _memory(bundle: Bundle, plan: Plan) -> str:
    """What loading it takes; a plan built without a GPU cannot say how much its activations add."""
    memory = bundle.gpu_memory(plan)
    if memory.activations is None:
        return f"{size_text(memory.at_least)} and activations"
    return size_text(memory.at_least)


def _provenance_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    provenance = bundle.manifest.provenance
    rows = [("checkpoint", f"{provenance.name} ({provenance.format})")]
    rows += [(name, f"sha256 {digest}") for name, digest in provenance.files.items()]
    rows += [("stated", f"{name} = {value}") for name, value in provenance.options.items()]
    rows += [(name, version) for name, version in provenance.versions.items()]
    return list(rows)


def _file_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    return [(name, size_text(entry.size), entry.sha256) for name, entry in bundle.manifest.files.items()]
