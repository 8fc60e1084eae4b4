"""manifest.json: what a bundle says about itself, as frozen dataclasses, and as bytes. No file is opened here.

The rules are explained in docs/bundle-format.md. In short: ASCII JSON without duplicate keys, NaN or numbers beyond
64 bits; keys in declared order, maps sorted; and as the last key `sha256`, the digest of every byte before it, so that
a changed manifest is noticed just as a changed graph is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from clip_export.errors import BundleIntegrityError, BundleSchemaError, InputError, SpecError
from clip_export.plans import NORMALIZED, Plan
from clip_export.spec import ModelSpec, Tower, from_dict
from clip_export.strict_json import MAX_MESSAGE, REBUILD, json_object, printable

__all__ = [
    "GOLDEN",
    "MANIFEST",
    "REBUILD",
    "REPORT",
    "SCHEMA_VERSION",
    "SECOND",
    "TOKENIZER",
    "Contract",
    "FileEntry",
    "Graph",
    "Manifest",
    "Plan",
    "Provenance",
    "manifest_bytes",
    "parse_manifest",
]

SCHEMA_VERSION = 4  # what is written; 1 had no plans, 2 no contracts, 3 no Context, and all are still read

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GOLDEN = "golden.safetensors"
REPORT = "report.json"
SECOND = "text_2"  # the folder with the bundle of a second text encoder

# Lower case, so that a bundle survives a disk that ignores case; a first letter or digit, so that neither `..` nor a
# hidden file can be named; no colon, backslash or space, so that a path means the same on every system.
_PATH = re.compile(r"[a-z0-9][a-z0-9._+-]{0,127}(/[a-z0-9][a-z0-9._+-]{0,127}){0,7}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TAIL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')
_TAIL_BYTES = len(b',\n  "sha256": ""\n}\n') + 64
_MAX_PLANS = 256
_MAX_MISSED = 16  # a build knows of three: the cosine of each tower, and R@1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file as it was written. `size` in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        _require(_SHA256.fullmatch(self.sha256) is not None, f"{self.sha256!r} is not a sha256 in lower-case hex")
        _require(self.size >= 0, f"a file cannot have {self.size} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX file. External data, where it has any, is a further file of the bundle that the graph itself names.

    `inputs` and `outputs` are tensor names in the graph's order. `sequence_dynamic`: the sequence axis may be trimmed
    to the longest text of a batch (causal text towers only); otherwise it is always the full context.
    """

    file: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sequence_dynamic: bool = False

    def __post_init__(self) -> None:
        _require(self.opset > 0, f"{self.file}: opset must be positive, found {self.opset}")
        for kind, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            distinct = len(names) > 0 and all(names) and len(set(names)) == len(names)
            _require(distinct, f"{self.file}: {kind} must be distinct names, found {list(names)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a bundle comes from: enough to build it again, nothing about the machine that built it.

    `format` is the checkpoint format, `name` what it is called (a hub id or a file name), `files` its files with their
    sha256, `versions` those of clip-export and the libraries that numbers depend on, `options` what the user stated.
    """

    format: str
    name: str
    files: dict[str, str]
    versions: dict[str, str]
    options: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.name.isprintable(), f"provenance.name must be printable, found {self.name!r}")
        for path in (self.name, *self.files):
            absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
            _require(not absolute, f"provenance must not name a place on one machine, found {path!r}")
        for name, digest in self.files.items():
            _require(_SHA256.fullmatch(digest) is not None, f"provenance.files.{name}: {digest!r} is not a sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a quantized precision was held to when it was made, and what of that it missed.

    `min_cosine` is the least cosine to the fp32 reference, over golden samples and held-out inputs; `max_recall_drop`
    the most points by which R@1 on pairs may fall, None where that was not required. `missed` says in words, a sentence
    for each, what was not kept: empty unless somebody said to publish it all the same.
    """

    min_cosine: float
    max_recall_drop: float | None = None
    missed: tuple[str, ...] = dataclasses.field(default_factory=tuple)  # a factory: the key has to be in the file

    def __post_init__(self) -> None:
        _require(-1 <= self.min_cosine <= 1, f"a contract cannot ask for a cosine of {self.min_cosine}")
        drop = self.max_recall_drop
        _require(drop is None or 0 <= drop <= 100, f"a contract cannot allow R@1 to drop by {drop} points")
        _require(len(self.missed) <= _MAX_MISSED, f"missed: at most {_MAX_MISSED}, found {len(self.missed)}")
        for words in self.missed:
            readable = words.isprintable() and words.strip() != "" and len(words) <= MAX_MESSAGE
            _require(readable, f"missed: expected 1 to {MAX_MESSAGE} printable characters, found {words!r}")

    @property
    def kept(self) -> bool:
        """Whether everything was kept when it was made."""
        return not self.missed


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of manifest.json, save its own digest.

    `variants` is precision -> tower -> graph; `contracts` is precision -> contract for those that were built to one of
    their own; `plans` are engines compiled from these graphs; `files` is path -> entry for every file beside the
    manifest. Raises SpecError where they contradict each other or the spec.
    """

    schema_version: int
    name: str
    spec: ModelSpec
    provenance: Provenance
    variants: dict[str, dict[Tower, Graph]]
    contracts: dict[str, Contract] = dataclasses.field(default_factory=dict)
    plans: tuple[Plan, ...] = ()
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        _require(self.name.isprintable() and self.name != "", f"name must be printable, found {self.name!r}")
        for path in self.files:
            allowed = _PATH.fullmatch(path) is not None and path != MANIFEST
            _require(allowed, f"files: {path!r} is not a path that a bundle may hold")
        needed = {GOLDEN, REPORT} | ({TOKENIZER} if self.spec.text is not None else set())
        if self.spec.context is not None and self.spec.context.second:
            needed.add(f"{SECOND}/{MANIFEST}")
        needed |= {graph.file for graphs in self.variants.values() for graph in graphs.values()}
        missing = sorted(needed - self.files.keys())
        _require(not missing, f"files: {', '.join(map(repr, missing))} should be listed and is not")
        self._check_variants()
        self._check_plans()

    def graph_sha256(self, graph: str) -> str:
        """What stands for the file `graph` and its external data, which are the files named `graph`.*, together.

        It is the sha256 of one line for each, sorted by name: what `sha256sum GRAPH GRAPH.* | sha256sum` prints.
        """
        names = sorted(name for name in self.files if is_graph_file(name, graph))
        lines = "".join(f"{self.files[name].sha256}  {name}\n" for name in names)
        return hashlib.sha256(lines.encode("ascii")).hexdigest()

    def _check_variants(self) -> None:
        covered = {tower for graphs in self.variants.values() for tower in graphs}
        same = covered == set(self.spec.towers)
        _require(same, f"variants hold {_names(covered)}, the spec has {_names(self.spec.towers)}")
        unknown = sorted(self.contracts.keys() - self.variants.keys())
        _require(not unknown, f"contracts: {', '.join(map(repr, unknown))} is none of the variants")
        causal = self.spec.text is not None and self.spec.text.causal
        for precision, graphs in self.variants.items():
            _require(re.fullmatch("[a-z0-9]+", precision) is not None, f"variants: {precision!r} is not a precision")
            _require(len(graphs) > 0, f"variants.{precision}: holds no graph")
            for tower, graph in graphs.items():
                trimmable = tower == "text" and causal
                message = f"{graph.file}: only a causal text tower may have a dynamic sequence"
                _require(trimmable or not graph.sequence_dynamic, message)

    def _check_plans(self) -> None:
        _require(len(self.plans) <= _MAX_PLANS, f"plans: at most {_MAX_PLANS}, found {len(self.plans)}")
        repeated = [file for file, count in Counter(plan.file for plan in self.plans).items() if count > 1]
        _require(not repeated, f"plans: {', '.join(map(repr, repeated))} is listed twice")
        for plan in self.plans:
            for path in (plan.file, plan.inspector):
                listed = path is None or path in self.files
                _require(listed, f"files: {path!r} should be listed and is not")
            held = plan.tower in self.variants.get(plan.precision, {})
            _require(held, f"{plan.file}: variants hold no {plan.precision} {plan.tower} graph")
            of_tower = [towers[plan.tower] for towers in self.variants.values() if plan.tower in towers]
            graphs = {graph.file: graph for graph in of_tower}
            _require(plan.graph in graphs, f"{plan.file}: {plan.graph!r} is no {plan.tower} graph of the variants")
            _check_names(plan, graphs[plan.graph])


def _check_names(plan: Plan, graph: Graph) -> None:
    found = sorted(plan.profiles[0])
    _require(found == sorted(graph.inputs), f"{plan.file}: profiles name {found}, the graph takes {list(graph.inputs)}")
    gives = (graph.outputs, (*graph.outputs, NORMALIZED))
    message = f"{plan.file}: outputs are {list(plan.outputs)}, those of the graph are {list(graph.outputs)}"
    _require(plan.outputs in gives, message)


def is_graph_file(name: str, graph: str) -> bool:
    """Whether the file `name` is `graph`, or its external data."""
    return name == graph or name.startswith(f"{graph}.")


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one way to write `manifest`: the same manifest gives the same bytes, on every machine, of this schema."""
    manifest = dataclasses.replace(manifest, schema_version=SCHEMA_VERSION)
    text = json.dumps(_plain(manifest), indent=2, ensure_ascii=True, allow_nan=False)
    head = text.removesuffix("\n}").encode("ascii")
    return head + f',\n  "sha256": "{hashlib.sha256(head).hexdigest()}"\n}}\n'.encode("ascii")


def parse_manifest(data: bytes) -> Manifest:
    """The inverse of `manifest_bytes`, for bytes that nobody vouches for, of this schema or an older one.

    Raises BundleSchemaError for what is no manifest of this schema, BundleIntegrityError if it was changed since.
    """
    plain = json_object(data, where=MANIFEST)
    _check_schema_version(plain.get("schema_version"))
    _check_digest(data)
    del plain["sha256"]
    try:
        _check_keys(plain)
        plain.setdefault("contracts", {})
        return from_dict(Manifest, plain, where=MANIFEST)
    except (SpecError, InputError) as error:  # the second is of a ShapeRange that is none
        raise BundleSchemaError(printable(str(error)), hint=REBUILD) from error


_SINCE = {"plans": 2, "contracts": 3}  # key -> the schema that brought it
_CONTEXT_SINCE = 4


def _check_keys(plain: Mapping[str, Any]) -> None:
    """A schema has all of its keys and none of a later one: a manifest that mixes them was written by nobody."""
    version = plain["schema_version"]
    for key, since in _SINCE.items():
        _require(key in plain or version < since, f"{MANIFEST}: missing key {key}")
        _require(key not in plain or version >= since, f"{MANIFEST}: unknown key {key}, which schema {version} has not")
    spec = plain.get("spec")
    if isinstance(spec, dict):
        held = "context" in spec
        _require(held or version < _CONTEXT_SINCE, f"{MANIFEST}: missing key spec.context")
        unknown = f"{MANIFEST}: unknown key spec.context, which schema {version} has not"
        _require(not held or version >= _CONTEXT_SINCE, unknown)


def _check_schema_version(found: object) -> None:
    if type(found) is not int or found < 1:
        message = f"{MANIFEST}: expected a schema_version of 1 or more, found {found!r}"
        raise BundleSchemaError(printable(message), hint="this is not the manifest of a bundle")
    if found > SCHEMA_VERSION:
        message = f"schema {found} was written by a newer clip-export; this one reads up to {SCHEMA_VERSION}"
        raise BundleSchemaError(message, hint="update clip-export: pull its repository, and install from it again")


def _check_digest(data: bytes) -> None:
    tail = _TAIL.search(data[-_TAIL_BYTES:])
    if tail is None:
        raise BundleSchemaError(f'{MANIFEST}: expected it to end with its own "sha256"', hint=REBUILD)
    found = hashlib.sha256(data[:-_TAIL_BYTES]).hexdigest()
    if found != tail[1].decode("ascii"):
        message = f"{MANIFEST} was changed after it was written: expected sha256 {tail[1].decode()}, found {found}"
        raise BundleIntegrityError(message, hint=REBUILD)


def _plain(value: Any) -> Any:
    """JSON-ready data: fields as declared, since people read them in that order, and maps sorted."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _names(towers: Iterable[str]) -> str:
    return " and ".join(sorted(towers)) or "no tower"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)
