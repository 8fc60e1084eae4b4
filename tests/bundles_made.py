"""A small bundle without torch: true in everything that a bundle checks, with stand-ins for the graphs, which it never
opens. Imported by the crash driver too, so that nothing here may need pytest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from clip_export.backends.building import ShapeRange
from clip_export.bundle import Bundle, Graph, Manifest, Plan, Provenance, write_manifest
from clip_export.golden import Golden, ImageGolden, TextGolden
from clip_export.plans import plan_folder
from clip_export.spec import ImageSpec, ModelSpec, PreprocessSpec, TextSpec, TokenizerSpec, Tower, TransformerSpec

TRANSFORMER = TransformerSpec(width=64, layers=1, heads=1, mlp_width=128, activation="quick_gelu")

SPEC = ModelSpec(
    text=TextSpec(transformer=TRANSFORMER, vocab_size=100, context_length=8, embedding_dim=4),
    image=ImageSpec(transformer=TRANSFORMER, image_size=16, patch_size=8, embedding_dim=4),
    tokenizer=TokenizerSpec(
        dialect="openai", context_length=8, start_id=98, end_id=99, pad_id=0, pooling="argmax", truncate=False
    ),
    preprocess=PreprocessSpec(
        dialect="openai",
        resize_mode="shortest",
        resize_size=16,
        crop_size=16,
        interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    logit_scale=4.6052,
)

PROVENANCE = Provenance(
    format="huggingface",
    name="someone/a-clip",
    files={"model.safetensors": hashlib.sha256(b"weights").hexdigest()},
    versions={"numpy": "2.0.0", "clip-export": "0.1.0"},
    options={"towers": "text,image"},
)

TEXT_GRAPH = Graph(
    file="text.onnx", opset=23, inputs=("input_ids", "eot_index"), outputs=("embedding",), sequence_dynamic=True
)
IMAGE_GRAPH = Graph(file="image.onnx", opset=23, inputs=("pixels",), outputs=("embedding",))


def golden(n: int = 3) -> Golden:
    """`n` samples a tower that fit SPEC."""
    rng = np.random.default_rng(0)
    return Golden(
        text=TextGolden(
            texts=tuple(f"text {i} é" for i in range(n)),
            input_ids=rng.integers(0, 99, (n, 8), dtype=np.int32),
            eot_index=np.arange(n, dtype=np.int32),
            outputs={"embedding": rng.standard_normal((n, 4), dtype=np.float32)},
        ),
        image=ImageGolden(
            files=tuple(bytes([i]) * i for i in range(n)),
            pixels=rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8),
            outputs={"embedding": rng.standard_normal((n, 4), dtype=np.float32)},
        ),
    )


def fill(directory: Path, name: str = "small", spec: ModelSpec = SPEC) -> Manifest:
    """Write a whole bundle into an empty directory; text.onnx holds its name, so that mixtures are noticed."""
    (directory / "text.onnx").write_bytes(b"graph of " + name.encode())
    (directory / "image.onnx").write_bytes(bytes(range(256)) * 4)
    (directory / "tokenizer.json").write_text('{"model": "é"}', encoding="utf-8")
    (directory / "report.json").write_text('{"layers": 1}')
    golden().save(directory / "golden.safetensors")
    return write_manifest(
        directory,
        name=name,
        spec=spec,
        provenance=PROVENANCE,
        variants={"fp32": {"text": TEXT_GRAPH, "image": IMAGE_GRAPH}},
    )


GRAPHS: dict[Tower, Graph] = {"text": TEXT_GRAPH, "image": IMAGE_GRAPH}
PROFILES: dict[Tower, tuple[dict[str, ShapeRange], ...]] = {
    "text": (
        {
            "input_ids": ShapeRange(min=(1, 1), opt=(4, 8), max=(4, 8)),
            "eot_index": ShapeRange(min=(1,), opt=(4,), max=(4,)),
        },
        {
            "input_ids": ShapeRange(min=(5, 1), opt=(8, 8), max=(8, 8)),
            "eot_index": ShapeRange(min=(5,), opt=(8,), max=(8,)),
        },
    ),
    "image": ({"pixels": ShapeRange(min=(1, 3, 16, 16), opt=(4, 3, 16, 16), max=(8, 3, 16, 16))},),
}


def make_plan(tower: Tower = "text", *, folder: str | None = None, **changes: Any) -> Plan:
    """The entry of a plan of SPEC: TensorRT-RTX for sm_89, fp16, from a graph with a made-up digest."""
    fields: dict[str, Any] = {
        "tower": tower,
        "backend": "tensorrt-rtx",
        "version": "1.7.1.116",
        "compute_capability": "sm_89",
        "precision": "fp16",
        "graph": f"{tower}.fp16.onnx",
        "graph_sha256": hashlib.sha256(tower.encode()).hexdigest(),
        "profiles": PROFILES[tower],
        "outputs": ("embedding", "normalized"),
        "options": {"optimization_level": "3"},
        "seconds": 2.5,
        "peak_memory_mib": 812,
        "attention": "operator",
    } | changes
    if folder is None:
        key = {name: fields[name] for name in ("backend", "version", "compute_capability", "precision", "options")}
        shared = {"graphs": {tower: fields["graph_sha256"]}, "profiles": {tower: fields["profiles"]}}
        folder = plan_folder(**key, **shared)
    return Plan(**{"file": f"{folder}/{tower}.plan"} | fields)


def with_plans(directory: Path, plans: list[Plan] | None = None, *, known: Bundle | None = None) -> Manifest:
    """Add fp16 graphs and `plans` of them, one a tower by default, to what `fill` has written."""
    half = {tower: dataclasses.replace(graph, file=f"{tower}.fp16.onnx") for tower, graph in GRAPHS.items()}
    for graph in half.values():
        put(directory / graph.file, b"half of " + graph.file.encode())
    put(directory / "image.fp16.onnx.data", b"weights")
    if plans is None:
        digests = {tower: staged_digest(directory, graph.file) for tower, graph in half.items()}
        plans = [make_plan(tower, folder="plans/both", graph_sha256=digests[tower]) for tower in GRAPHS]
    for plan in plans:
        put(directory / plan.file, b"plan of " + plan.tower.encode())
        if plan.inspector is not None:
            put(directory / plan.inspector, b"{}")
    manifest = json.loads((directory / "manifest.json").read_bytes()) if known is None else {"name": known.name}
    return write_manifest(
        directory,
        name=manifest["name"],
        spec=SPEC,
        provenance=PROVENANCE,
        variants={"fp32": GRAPHS, "fp16": half},
        plans=plans,
        known=known,
    )


def put(path: Path, data: bytes) -> None:
    """A new file: what may be a link to one of an older bundle is not written through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def staged_digest(directory: Path, graph: str) -> str:
    """What Manifest.graph_sha256 promises, in other words: sha256sum GRAPH GRAPH.* | sha256sum."""
    paths = sorted(path for path in directory.iterdir() if path.name == graph or path.name.startswith(graph + "."))
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def plain(directory: Path) -> dict[str, Any]:
    """The manifest as plain data, without its digest."""
    data: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
    del data["sha256"]
    return data


def sign(text: str) -> bytes:
    """Put the right digest at the end of any JSON object: what an attacker can do as well as we can."""
    head = text.rstrip().removesuffix("}").rstrip().encode()
    return head + b',\n  "sha256": "%s"\n}\n' % hashlib.sha256(head).hexdigest().encode()


def rewrite(directory: Path, **changes: Any) -> None:
    """Change top-level keys of the manifest, with a right digest."""
    (directory / "manifest.json").write_bytes(sign(json.dumps(plain(directory) | changes, indent=2)))


def text_only() -> ModelSpec:
    """SPEC without its image tower."""
    return dataclasses.replace(SPEC, image=None, preprocess=None)
