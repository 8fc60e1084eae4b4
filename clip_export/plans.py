"""Plans in a bundle: what the manifest says of each compiled engine, the key that names its folder, its memory.

Pure data: nothing here opens a file or knows a compiler. Which plan fits a machine: plan_selection.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_export.backends.building import PORTABLE, AttentionProof, PlanBackend, Profile, ShapeRange
from clip_export.errors import SpecError
from clip_export.spec import ModelSpec, Tower

__all__ = [
    "AMPERE_PLUS",
    "NORMALIZED",
    "SAME_COMPUTE_CAPABILITY",
    "GpuMemory",
    "Plan",
    "gpu_memory_bytes",
    "plan_folder",
]

NORMALIZED = "normalized"  # the output that a plan may have beyond its graph's: the embedding at length 1, float32
AMPERE_PLUS = "ampere_plus"
SAME_COMPUTE_CAPABILITY = "same_compute_capability"

# Far beyond any real plan, and small enough that arithmetic on a hostile one stays harmless.
MAX_PROFILES = 64
MAX_AXES = 8  # nvinfer1::Dims::MAX_DIMS
MAX_AXIS = 2**31 - 1
MAX_ELEMENTS = 2**40  # of one input
MAX_BYTES = 2**48
MAX_SECONDS = 10**9
MAX_TEXT = 128  # characters

_VERSION = re.compile(r"[0-9][0-9A-Za-z.+_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPUTE_CAPABILITY = re.compile(rf"sm_[1-9][0-9]{{1,2}}|{PORTABLE}")

# What a plan may have been compiled with, and how each is written. An option that is not set is absent: two ways to
# say the same would be two folders for one plan. An unknown one may decide where a plan runs, so it is an error.
_OPTIONS = {
    "attention": re.compile("operator|primitive"),
    "hardware_compatibility": re.compile(f"{AMPERE_PLUS}|{SAME_COMPUTE_CAPABILITY}"),
    "optimization_level": re.compile("[0-5]"),
    "refit": re.compile("true"),
    "strip_weights": re.compile("true"),
    "tf32": re.compile("true"),
    "version_compatible": re.compile("true"),
    "workspace_mib": re.compile("[1-9][0-9]{0,8}"),
}

# uint8 pixels, int32 ids: graph/export.py. Every output is float32.
_INPUT_ITEM_BYTES = {"pixels": 1, "input_ids": 4, "eot_index": 4}
_OUTPUT_ITEM_BYTES = 4
_SETS = 2  # of buffers in each running thread: one is filled while the other is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One compiled engine of one tower. `file` is plans/<plan_folder>/<tower>.plan; paths are as in the manifest.

    `version` is that of the compiler, `compute_capability` as in "sm_89" or "portable". `graph` is the file it was
    compiled from, `graph_sha256` that of the graph and its external data (Manifest.graph_sha256). `outputs` are those
    of the graph, and NORMALIZED last where the plan normalizes the embedding itself. `options` are those that differ
    from the compiler's own, and `attention`, the form that the compiled graph had.

    What its build found out: `seconds`, `peak_memory_mib` of the building process, `attention` (how it is known to be
    fused, or None). Where a GPU was at hand: its name, `driver` and `cuda` versions, `activation_bytes` that a context
    needs for each profile, and `inspector`, the file with EngineInspector's JSON.
    """

    file: str
    tower: Tower
    backend: PlanBackend
    version: str
    compute_capability: str
    precision: str
    graph: str
    graph_sha256: str
    profiles: tuple[dict[str, ShapeRange], ...]
    outputs: tuple[str, ...]
    options: dict[str, str]
    seconds: float
    peak_memory_mib: int
    attention: AttentionProof | None = None
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    activation_bytes: tuple[int, ...] | None = None
    inspector: str | None = None

    def __post_init__(self) -> None:
        folder, _, name = self.file.rpartition("/")
        placed = folder.startswith("plans/") and folder.count("/") == 1 and name == f"{self.tower}.plan"
        _require(placed, f"{self.file!r} is not the place of a plan: expected plans/FOLDER/{self.tower}.plan")
        beside = self.inspector is None or (self.inspector.rpartition("/")[0], self.inspector[-5:]) == (folder, ".json")
        _require(beside, f"{self.file}: expected the JSON of its inspector beside it, found {self.inspector!r}")
        for name, pattern in (
            ("version", _VERSION),
            ("compute_capability", _COMPUTE_CAPABILITY),
            ("graph_sha256", _SHA256),
        ):
            value = getattr(self, name)
            _require(pattern.fullmatch(value) is not None, f"{self.file}: {value[:MAX_TEXT]!r} is not a {name}")
        for name in ("gpu", "driver", "cuda"):
            text = getattr(self, name) or ""
            _require(text.isprintable() and len(text) <= MAX_TEXT, f"{self.file}: {name} must be short and printable")
        self._check_options()
        self._check_profiles()
        self._check_findings()

    def _check_options(self) -> None:
        for name, value in self.options.items():
            _require(name in _OPTIONS, f"{self.file}: unknown option {name} (known: {', '.join(_OPTIONS)})")
            allowed = _OPTIONS[name].fullmatch(value) is not None
            _require(allowed, f"{self.file}: option {name} cannot be {value[:MAX_TEXT]!r}")

    def _check_profiles(self) -> None:
        count = len(self.profiles)
        _require(1 <= count <= MAX_PROFILES, f"{self.file}: expected 1 to {MAX_PROFILES} profiles, found {count}")
        for profile in self.profiles:
            same = profile.keys() == self.profiles[0].keys() and len(profile) > 0
            _require(same, f"{self.file}: every profile needs the same inputs, found {sorted(profile)}")
            for name, shapes in profile.items():
                _require(1 <= len(shapes.max) <= MAX_AXES, f"{self.file}: {name} has {len(shapes.max)} axes")
                small = max(shapes.max) <= MAX_AXIS and math.prod(shapes.max) <= MAX_ELEMENTS
                _require(small, f"{self.file}: {name} cannot be as large as {list(shapes.max)}")

    def _check_findings(self) -> None:
        _require(0 <= self.seconds <= MAX_SECONDS, f"{self.file}: building cannot take {self.seconds} seconds")
        memory = self.peak_memory_mib * 2**20
        _require(0 <= memory <= MAX_BYTES, f"{self.file}: building cannot take {self.peak_memory_mib} MiB")
        activations = self.activation_bytes
        if activations is not None:
            found = f"{self.file}: expected activation_bytes for each of {len(self.profiles)} profiles"
            _require(len(activations) == len(self.profiles), f"{found}, found {len(activations)}")
            _require(all(0 <= size <= MAX_BYTES for size in activations), f"{found}, found {list(activations)}")

    @property
    def needs_graph(self) -> bool:
        """Whether it was compiled without weights, so that running it takes those of its graph."""
        return "strip_weights" in self.options

    @property
    def folder(self) -> str:
        """The directory of the bundle that it shares with the plans built with it."""
        return self.file.rpartition("/")[0]


def plan_folder(
    *,
    backend: PlanBackend,
    version: str,
    compute_capability: str,
    precision: str,
    graphs: Mapping[Tower, str],
    profiles: Mapping[Tower, Sequence[Profile]],
    options: Mapping[str, str],
) -> str:
    """`plans/<backend>-<version>-<sm>-<precision>-<8 hex digits>`: where plans of this key belong, in every bundle.

    The digits are the start of the sha256 of canonical JSON (keys sorted, no spaces) of `graphs`, tower ->
    graph_sha256, `profiles` and `options`. So the same work is found again, and other work never lands on it.
    """
    key = {
        "graphs": dict(graphs),
        "options": dict(options),
        "profiles": {tower: [_plain(profile) for profile in several] for tower, several in profiles.items()},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()
    name = f"{backend}-{version}-{compute_capability}-{precision}-{digest[:8]}".lower()
    return "plans/" + re.sub(r"[^a-z0-9._+-]", "-", name)


def _plain(profile: Profile) -> dict[str, list[list[int]]]:
    return {name: [list(shapes.min), list(shapes.opt), list(shapes.max)] for name, shapes in profile.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Bytes of GPU memory that one engine of a plan needs.

    `weights` once; `buffers` and `activations` for each thread that runs at the same time. `activations` is None where
    no GPU was there to say.
    """

    weights: int
    buffers: int
    activations: int | None

    @property
    def at_least(self) -> int:
        """What one thread needs, as far as it is known."""
        return self.weights + self.buffers + (self.activations or 0)


def gpu_memory_bytes(plan: Plan, file_bytes: int, spec: ModelSpec, *, graph_bytes: int = 0) -> GpuMemory:
    """What `plan` needs on the GPU: weights, buffers for its largest profile, and activations of that context.

    `file_bytes` is the size of the plan, which is weights but for a percent or two; `graph_bytes` is that of its graph
    with external data, counted for a plan without weights. The CUDA context itself (some 100 MB) is not included.
    """
    return GpuMemory(
        weights=file_bytes + (graph_bytes if plan.needs_graph else 0),
        buffers=_SETS * max(_buffer_bytes(plan, profile, spec) for profile in plan.profiles),
        activations=None if plan.activation_bytes is None else max(plan.activation_bytes),
    )


def _buffer_bytes(plan: Plan, profile: Profile, spec: ModelSpec) -> int:
    inputs = sum(math.prod(shapes.max) * _INPUT_ITEM_BYTES.get(name, 4) for name, shapes in profile.items())
    tower = spec.text if plan.tower == "text" else spec.image
    if tower is None:
        return inputs
    width = tower.transformer.width
    tokens = spec.image.tokens if plan.tower == "image" and spec.image is not None else _tokens(profile)
    dim = tower.embedding_dim or width
    row = {"embedding": dim, NORMALIZED: dim, "pooled": width}
    row |= dict.fromkeys(("hidden_states", "raw_states"), tokens * width)
    batch = max(shapes.max[0] for shapes in profile.values())
    return inputs + batch * sum(row.get(name, width) for name in plan.outputs) * _OUTPUT_ITEM_BYTES


def _tokens(profile: Profile) -> int:
    return max((shapes.max[1] for shapes in profile.values() if len(shapes.max) > 1), default=1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)
