"""The runtime cache of TensorRT-RTX: kernels that were compiled for this GPU, kept in a file for the next start."""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any


class RuntimeCache:
    """A runtime cache and its file. What the file holds is taken over where it is of this GPU, driver and version.

    `runtime_cache` is for a runtime config; it has to outlive that and its contexts.
    """

    def __init__(self, runtime_config: Any, path: Path) -> None:
        runtime_cache = runtime_config.create_runtime_cache()
        self.runtime_cache = runtime_cache
        self._path = path
        self._saved = b""
        with suppress(OSError):  # there is none yet, or it cannot be read: kernels are compiled again
            blob = path.read_bytes()
            if blob and runtime_cache.deserialize(blob):
                self._saved = blob

    def save(self) -> None:
        """Write it, if it has grown. A file that cannot be written costs time at the next start: one warning."""
        runtime_cache = self.runtime_cache
        memory = runtime_cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if not blob or blob == self._saved:
            return
        try:
            _replace(self._path, blob)
        except OSError as error:
            message = f"the kernels compiled for this GPU could not be kept in {self._path}: {error.strerror or error}"
            warnings.warn(f"{message}; they are compiled again at the next start", RuntimeWarning, stacklevel=4)
        self._saved = blob


def _replace(path: Path, blob: bytes) -> None:
    """Write beside `path` and rename, so that another process that starts now reads all or nothing."""
    number, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(blob)
        Path(beside).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(beside).unlink()
        raise


__all__ = ["RuntimeCache"]
