"""A bundle on disk: a directory with a manifest.json that vouches for every other file in it.

Reading trusts nothing: `Bundle.open` checks the manifest, that the directory holds the listed files and no others,
their sizes and their sha256, before anything else looks inside. Writing happens in a directory from `publish.staged`,
where `write_manifest` is the last step. The format, and the reason for each rule: docs/bundle-format.md.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_export.bundle_files import check_sha256, check_size, few, is_runtime_cache, listing, make_entry, read, reading
from clip_export.errors import BundleError, BundleIntegrityError, BundleNotFoundError, BundleSchemaError, SpecError
from clip_export.golden import Golden
from clip_export.manifest import (
    GOLDEN,
    MANIFEST,
    REBUILD,
    REPORT,
    SCHEMA_VERSION,
    SECOND,
    TOKENIZER,
    Contract,
    FileEntry,
    Graph,
    Manifest,
    Provenance,
    is_graph_file,
    manifest_bytes,
    parse_manifest,
)
from clip_export.plan_selection import Machine, Selection, select
from clip_export.plans import GpuMemory, Plan, gpu_memory_bytes
from clip_export.spec import ModelSpec, Tower
from clip_export.strict_json import json_object

__all__ = [
    "MAX_MANIFEST_BYTES",
    "SCHEMA_VERSION",
    "Bundle",
    "FileEntry",
    "Graph",
    "Manifest",
    "Plan",
    "Provenance",
    "hidden_beside",
    "replace_refusal",
    "write_manifest",
]

# A manifest is a few kilobytes; one of many megabytes is a mistake or an attack, and is not read into memory.
MAX_MANIFEST_BYTES = 4 * 2**20

# A bundle that is replaced while it is opened is opened again: the two renames take less than a millisecond.
_ATTEMPTS = 5
_PAUSE = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. `path` is absolute; a directory that is moved later has to be opened again."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check_files: bool = True) -> Bundle:
        """Open the bundle at `path` and check it.

        `check_files=False` skips hashing, the only slow part; that every file is there and has its size is checked
        always. Raises BundleNotFoundError, BundleSchemaError or BundleIntegrityError, naming the file.
        """
        directory = Path(os.fsdecode(path)).absolute()
        for _ in range(_ATTEMPTS):
            before = _identity(directory)
            try:
                return cls._open(directory, check_files=check_files)
            except BundleError:
                if before == _identity(directory):
                    raise
            time.sleep(_PAUSE)  # it was replaced or extended while it was read: what is there now is another
        return cls._open(directory, check_files=check_files)

    @classmethod
    def _open(cls, directory: Path, *, check_files: bool) -> Bundle:
        manifest = parse_manifest(_read_manifest(directory))
        _check_listing(directory, manifest)
        for name, entry in manifest.files.items():
            check_size(directory, name, entry)
        if check_files:
            for name, entry in manifest.files.items():
                check_sha256(directory, name, entry)
        return cls(directory, manifest)

    @property
    def name(self) -> str:
        """The name that it was built under; the directory may be called otherwise by now."""
        return self.manifest.name

    @property
    def spec(self) -> ModelSpec:
        """What the model means."""
        return self.manifest.spec

    @property
    def second(self) -> Bundle | None:
        """The bundle of the second text encoder of a model that has two. This one's manifest vouches for its files."""
        context = self.spec.context
        return Bundle.open(self.path / SECOND, check_files=False) if context is not None and context.second else None

    def graph(self, tower: Tower, precision: str = "fp32") -> Graph:
        """The description of one graph. Raises BundleError, listing what there is."""
        graphs = self.manifest.variants.get(precision, {})
        if tower not in graphs:
            held = [f"{other} {t}" for other, towers in self.manifest.variants.items() for t in towers]
            message = f"{self.path} holds no {precision} {tower} graph, only {', '.join(held)}"
            raise BundleError(message, hint="choose one of these, or build the bundle again with what is missing")
        return graphs[tower]

    def graph_path(self, tower: Tower, precision: str = "fp32") -> Path:
        """Where the ONNX file of one tower lies. Raises BundleError, listing what there is."""
        return self.path / self.graph(tower, precision).file

    def graph_sha256(self, tower: Tower, precision: str = "fp32") -> str:
        """The digest of one graph and its external data, from the manifest. Raises BundleError as `graph` does."""
        return self.manifest.graph_sha256(self.graph(tower, precision).file)

    def plan_path(self, plan: Plan) -> Path:
        """Where a plan lies. What its engine keeps for itself is beside it, in names that begin with `.runtime`."""
        return self.path / plan.file

    def select_plans(
        self, machine: Machine, *, precision: str | None = None, towers: Sequence[Tower] | None = None
    ) -> Selection:
        """The plans that fit `machine`, of one precision for `towers` (all by default), and why each other does not."""
        graphs = {graph.file for held in self.manifest.variants.values() for graph in held.values()}
        return select(
            self.manifest.plans,
            machine,
            towers=self.spec.towers if towers is None else towers,
            graphs={file: self.manifest.graph_sha256(file) for file in graphs},
            sizes={name: entry.size for name, entry in self.manifest.files.items()},
            precision=precision,
        )

    def gpu_memory(self, plan: Plan) -> GpuMemory:
        """What running `plan` takes on the GPU, as far as the manifest tells."""
        files = self.manifest.files
        graph_bytes = sum(entry.size for name, entry in files.items() if is_graph_file(name, plan.graph))
        return gpu_memory_bytes(plan, files[plan.file].size, self.spec, graph_bytes=graph_bytes)

    def golden(self) -> Golden:
        """The golden samples. Raises BundleIntegrityError if they cannot be those of this spec."""
        golden = Golden.load(self.path / GOLDEN)
        tokenizer, preprocess = self.spec.tokenizer, self.spec.preprocess
        expected = (tokenizer and tokenizer.context_length, preprocess and preprocess.crop_size)
        found = (golden.text and golden.text.input_ids.shape[1], golden.image and golden.image.pixels.shape[2])
        if found != expected:
            message = f"{GOLDEN}: expected context length and crop size {expected}, found {found}"
            raise BundleIntegrityError(message, hint=REBUILD)
        for tower, sample in (("text", golden.text), ("image", golden.image)):
            graphs = [graphs[tower] for graphs in self.manifest.variants.values() if tower in graphs]
            if sample is not None and any(set(graph.outputs) != sample.outputs.keys() for graph in graphs):
                message = f"{GOLDEN}: {tower} outputs are {', '.join(sample.outputs)}, not those of the graph"
                raise BundleIntegrityError(message, hint=REBUILD)
        return golden

    def tokenizer_json(self) -> str:
        """The text of tokenizer.json. Raises BundleError for a bundle without a text tower."""
        if self.spec.text is None:
            raise BundleError(f"{self.path} has no text tower, and so no tokenizer")
        try:
            return read(self.path, TOKENIZER).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleIntegrityError(f"{TOKENIZER} is not UTF-8: {error}", hint=REBUILD) from error

    def report(self) -> dict[str, Any]:
        """What the build measured on its own export, from report.json."""
        return json_object(read(self.path, REPORT), where=REPORT)


def _identity(directory: Path) -> int | None:
    """The inode of the directory, None while there is none: between the two renames of a publication."""
    try:
        return directory.stat().st_ino
    except (OSError, ValueError):
        return None


def write_manifest(
    directory: Path,
    *,
    name: str,
    spec: ModelSpec,
    provenance: Provenance,
    variants: Mapping[str, Mapping[Tower, Graph]],
    contracts: Mapping[str, Contract] | None = None,
    plans: Iterable[Plan] = (),
    known: Bundle | None = None,
) -> Manifest:
    """Hash every file in `directory` and write its manifest.json: the last step of a build.

    `known` is the checked bundle that `directory` extends: of its files, those that are hard links to it are not
    hashed again. The same files and arguments give the same bytes. Raises BundleSchemaError where files, spec, variants
    and plans do not fit together, BundleIntegrityError for anything that is not a regular file.
    """
    names = sorted(name for name in listing(directory) if name != MANIFEST and not is_runtime_cache(name))
    try:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            spec=spec,
            provenance=provenance,
            variants={precision: dict(graphs) for precision, graphs in variants.items()},
            contracts=dict(contracts or {}),
            plans=tuple(sorted(plans, key=lambda plan: plan.file)),
            files=_entries(directory, names, known),
        )
    except SpecError as error:
        raise BundleSchemaError(f"the files of bundle {name!r} do not make one: {error.message}") from error
    (directory / MANIFEST).write_bytes(manifest_bytes(manifest))
    return manifest


def _entries(directory: Path, names: Iterable[str], known: Bundle | None) -> dict[str, FileEntry]:
    if known is None:
        return {name: make_entry(directory, name) for name in names}
    entries = known.manifest.files
    return {name: make_entry(directory, name, original=known.path, known=entries.get(name)) for name in names}


def replace_refusal(directory: Path) -> str | None:
    """Why a build may not replace `directory`, or None if it is a bundle, in whatever state, and nothing besides.

    A manifest of some other program, or one file of the user's among ours, hidden or not, is a reason; the caches that
    running plans keep are none.
    """
    try:
        plain = json_object(_read_manifest(directory), where=MANIFEST)
    except BundleError as error:
        return f"it is not a bundle: {error.message}"
    files = plain.get("files")
    if not isinstance(files, dict) or not {"schema_version", "spec", "variants"} <= plain.keys():
        return f"it is not a bundle: its {MANIFEST} is that of another program"
    unlisted = set(listing(directory)) - files.keys() - {MANIFEST}
    strangers = sorted(name for name in unlisted if not is_runtime_cache(name))
    return f"it holds {few(strangers)}, which the bundle does not list" if strangers else None


def hidden_beside(target: Path, kind: str) -> list[Path]:
    """The directories `.NAME.<kind>-<8 hex digits>` that `publish` keeps beside `target` while it works, sorted."""
    pattern = re.compile(re.escape(f".{target.name}.{kind}-") + "[0-9a-f]{8}")
    try:
        return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the path
        raise _not_found(directory) from error
    except OSError as error:
        raise BundleError(f"cannot read {directory}: {error.strerror}") from error
    if not regular:
        raise BundleIntegrityError(f"{MANIFEST} in {directory} is not a regular file", hint=REBUILD)
    with reading(MANIFEST), path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        message = f"{MANIFEST} has more than {MAX_MANIFEST_BYTES // 2**20} MiB: that is no manifest"
        raise BundleSchemaError(message, hint=REBUILD)
    return data


def _not_found(directory: Path) -> BundleNotFoundError:
    for old in [] if "\0" in str(directory) else hidden_beside(directory, "replaced"):
        message = f"{directory} was being replaced when the build was stopped; the bundle that was there is {old}"
        return BundleNotFoundError(message, hint="build again, or move it back")
    if directory.is_dir():
        what = f"is not a bundle: it has no {MANIFEST}"
    else:
        what = "is a file, not the directory of a bundle" if directory.is_file() else "does not exist"
    return BundleNotFoundError(f"{directory} {what}", hint="make one with: clip-export build CHECKPOINT -o BUNDLE")


def _check_listing(directory: Path, manifest: Manifest) -> None:
    with reading(directory.name):
        found = set(listing(directory, hidden=False)) - {MANIFEST}
        links = [name for name in sorted(found) if (directory / name).is_symlink()]
    if links:
        message = f"{few(links)} in {directory} is a symbolic link; a bundle holds its files itself"
        raise BundleIntegrityError(message, hint="copy the bundle with its links followed: cp -rL")
    missing = sorted(manifest.files.keys() - found)
    if missing:
        raise BundleIntegrityError(f"{few(missing)} is missing from {directory}", hint=REBUILD)
    strangers = sorted(found - manifest.files.keys())
    if strangers:
        message = f"{few(strangers)} in {directory} is not listed in its {MANIFEST}"
        raise BundleIntegrityError(message, hint="move it out of the bundle")
