"""The Hugging Face Hub: ids, and the few files of a repository that a reader needs."""

from __future__ import annotations

import errno
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from clip_export.checkpoints._files import INDEX, find_weights
from clip_export.errors import CheckpointError, MissingDependencyError

# org/name as the hub allows it; a name that ends like a file is a path that does not exist, not a repository.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = re.compile(r".*\.(pt|pth|bin|ckpt|safetensors|onnx|json|zip)", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")  # the name of a snapshot's folder in the cache
_TIMEOUT_S = 5

# Failures of this machine, on which neither the name nor the network has a bearing.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def is_id(name: str) -> bool:
    """True for a string that is written like a repository of the hub."""
    return bool(_ID.fullmatch(name)) and not _FILE.fullmatch(name)


def download(name: str, *, small: Iterable[str], weights: Sequence[str]) -> Path:
    """The local snapshot of a repository: its `small` files, and those under the first of `weights` that it has.

    All are of one commit, even if the repository changes meanwhile. What is in the hub's cache is not downloaded again,
    and is enough without a network. Raises CheckpointError, in one sentence, whatever goes wrong on the way.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependencyError(
            f"{name} is read from the Hugging Face Hub, which needs huggingface_hub, not installed here",
            hint="pip install 'clip-export[export]', or download the files and name their directory",
        )
    directory = _snapshot(name, list(small), None)
    revision = directory.name if _COMMIT.fullmatch(directory.name) else None
    for candidate in weights:
        # One at a time: repositories often hold the same weights in several formats.
        directory = _snapshot(name, [candidate, candidate + INDEX, _shards(candidate)], revision)
        if _has(directory, candidate):
            break
    return directory


def _has(directory: Path, weights: str) -> bool:
    return bool(find_weights(directory, [weights]))


def _shards(weights: str) -> str:
    """model.safetensors -> model-*-of-*.safetensors"""
    stem, _, suffix = weights.rpartition(".")
    return f"{stem}-*-of-*.{suffix}"


def _snapshot(name: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=_TIMEOUT_S))
    except Exception as error:  # its HTTP library has changed twice; whatever it raises, the way out is the same
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise _not_stored(name, error) from error
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name} is no local path, and the Hugging Face Hub did not give it: "
            f"{type(error).__name__}, {reason[0] if reason else 'no reason given'}",
            hint="check the name and the network; or download the files elsewhere and name their directory: "
            f"hf download {name} --local-dir DIRECTORY",
        ) from error


def _not_stored(name: str, error: OSError) -> CheckpointError:
    where = f" ({error.filename})" if error.filename else ""
    return CheckpointError(
        f"{name} cannot be stored in the Hugging Face Hub's cache: {error.strerror}{where}",
        hint="make room or give access there, or set HF_HOME to a directory on another disk",
    )
