"""Checkpoints: what users have, read into one canonical form.

    demo                               the small CLIP inside the package
    a directory                        Hugging Face or open_clip
    a file                             OpenAI's .pt, or a state dict with its config beside it
    org/name, hf-hub:org/name          the Hugging Face Hub, in Hugging Face's layout or in open_clip's

One module per format, and its file name is the registry: a module `claims` what it can read and `read`s it. Adding a
format is adding a file (docs/checkpoints.md). Whatever the format, the result is a `ModelSpec` in which nothing is left
open and weights under the names of `spec.weight_shapes`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from clip_export.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    MissingDependencyError,
    SpecError,
    UnknownCheckpointError,
)
from clip_export.spec import Activation, Dialect, ModelSpec, Tower

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Options", "Source", "formats", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may state about a checkpoint. None means: read it from the checkpoint, or raise if it is not there.

    Stating `preprocess_dialect` also states that pictures are resized and normalized with CLIP's own constants where
    the checkpoint does not say how. `towers` are those that are wanted, None for all: what serves only others need not
    be known. A reader may return more towers than are wanted. `context`: the text encoders of a diffusion model, or the
    text tower of a CLIP, are to give Context.
    """

    activation: Activation | None = None
    tokenizer_dialect: Dialect | None = None
    preprocess_dialect: Dialect | None = None
    towers: tuple[Tower, ...] | None = None
    context: bool = False

    def wants(self, tower: Tower) -> bool:
        """Whether what serves `tower` has to be known."""
        return self.towers is None or tower in self.towers


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a checkpoint came from, without the paths of the machine it was read on.

    `format` is the reader's name; `name` is the hub id, the base name of the path, or "demo"; `sha256` maps every file
    that was read, relative to the checkpoint, to its hash.
    """

    format: str
    name: str
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in canonical form.

    `weights` maps each name of `spec.weight_shapes(spec)` to a tensor of that shape in the dtype it is stored in. It is
    lazy: a tensor is read when it is asked for and not kept, so that one weight at a time is in memory. Asking may
    raise WeightsError (NaN or infinite values) and CheckpointError (the file has changed).
    `tokenizer_json` is the tokenizer in the format of the tokenizers library; None without a text tower. `second` is
    the other text encoder of a model that has two.
    """

    spec: ModelSpec
    weights: Mapping[str, torch.Tensor]
    tokenizer_json: str | None
    source: Source
    second: Checkpoint | None = None


class Format(Protocol):
    """What a module of this package offers. `EXPECTS` says in one line what it looks for."""

    EXPECTS: str

    def claims(self, checkpoint: str | Path) -> bool:
        """True if this reader takes `checkpoint`: a Path that exists, or a string that is no path."""

    def read(self, checkpoint: str | Path, options: Options) -> Checkpoint:
        """Read what `claims` said yes to."""


def formats() -> list[str]:
    """The names of all readers: the public modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def read(checkpoint: str | os.PathLike[str], options: Options | None = None) -> Checkpoint:
    """Read a checkpoint: "demo", a directory, a file, or a hub id.

    Raises UnknownCheckpointError if no reader takes it, UnsupportedModelError for another architecture,
    AmbiguousCheckpointError where an option has to decide, UnsafeCheckpointError for a file that would run code,
    WeightsError for weights that do not fit, and CheckpointError for anything else that is wrong with it.
    """
    candidate, options = _candidate(checkpoint), options or Options()
    from clip_export.checkpoints import stable_diffusion

    single = options.context and stable_diffusion.is_single_file(candidate)
    reader: Format = cast(Format, stable_diffusion) if single else _reader(candidate)
    _require_packages("torch", "safetensors")
    try:
        return _read(reader, candidate, options)
    except SpecError as error:
        message = f"{candidate}: the checkpoint describes a model that cannot be: {error.message}"
        raise CheckpointError(message, hint="check its config against the model that it came from") from error


def _read(reader: Format, candidate: str | Path, options: Options) -> Checkpoint:
    from clip_export.checkpoints import stable_diffusion

    of_clip = options.context and reader.EXPECTS != stable_diffusion.EXPECTS
    if of_clip and options.towers is None:
        options = replace(options, towers=("text",))  # what only pictures need does not have to be known
    found = reader.read(candidate, options)
    return stable_diffusion.of_clip(found) if of_clip else found


def _candidate(checkpoint: str | os.PathLike[str]) -> str | Path:
    """A Path if it exists or could only be a path, else the string: the name of the demo, or a hub id."""
    if checkpoint == "demo":
        return "demo"
    try:
        path = Path(os.fspath(checkpoint)).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a name that no file can have, ~nobody
        raise CheckpointError(f"{os.fspath(checkpoint)!r} cannot be opened: {error}") from error
    return path if exists or not isinstance(checkpoint, str) else checkpoint


def _reader(candidate: str | Path) -> Format:
    try:
        claimants = [name for name in formats() if _format(name).claims(candidate)]
    except OSError as error:
        raise CheckpointError(f"{candidate} cannot be opened: {error.strerror}") from error
    if len(claimants) > 1:
        raise AmbiguousCheckpointError(
            f"{candidate} holds more than one checkpoint, expected one: {', '.join(claimants)}",
            hint="name the weights file of the one that you mean, such as model.safetensors for huggingface or "
            "open_clip_model.safetensors for open_clip",
        )
    if not claimants:
        raise _unknown(candidate)
    return _format(claimants[0])


@functools.cache
def _format(name: str) -> Format:
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def _unknown(candidate: str | Path) -> UnknownCheckpointError:
    looked_for = "\n".join(f"  {name}: {_format(name).EXPECTS}" for name in formats())
    expected = f"expected one of\n{looked_for}"
    if isinstance(candidate, str) or not candidate.exists():
        return UnknownCheckpointError(
            f"{str(candidate)!r} is no file or directory here, and not written like a hub id; {expected}",
            hint="check the path; a hub id is written org/name, or hf-hub:org/name for open_clip",
        )
    if candidate.is_file():
        return UnknownCheckpointError(
            f"{candidate.name} is not a checkpoint that is known here; {expected}",
            hint="name the weights file, or the directory that holds it with its config",
        )
    return UnknownCheckpointError(
        f"no checkpoint in directory {candidate}: {_contents(candidate)}; {expected}",
        hint="name the directory that holds config and weights, such as the text_encoder folder of a Stable Diffusion "
        "pipeline; a download may also have been interrupted",
    )


def _contents(directory: Path) -> str:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"directory {directory} cannot be listed: {error.strerror}") from error
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"found {', '.join(names[:10])}{more}" if names else "it is empty"


def _require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"reading a checkpoint needs {' and '.join(missing)}, not installed here",
            hint="pip install 'clip-export[export]'",
        )
