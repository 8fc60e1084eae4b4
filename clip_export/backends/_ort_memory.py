"""When the memory of a GPU does not suffice: recognizing it, saying it, and running in smaller parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from clip_export.errors import DeviceError

Feeds: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Callable[[Feeds], dict[str, np.ndarray]]

# What the arena, CUDA, cuBLAS and cuDNN say: they share no error code that would reach Python.
_WORDS = ("failed to allocate memory", "out of memory", "alloc_failed", "allocation failed")


def says_out_of_memory(error: Exception) -> bool:
    """Whether a failure was for want of memory."""
    text = str(error).lower()
    return any(words in text for words in _WORDS)


def batch_size(feeds: Feeds) -> int | None:
    """The first axis that all of `feeds` have in common, or None."""
    sizes = {int(array.shape[0]) if len(array.shape) else None for array in feeds.values()}
    return sizes.pop() if len(sizes) == 1 else None


def described(feeds: Feeds) -> str:
    """Names, dtypes and shapes, for messages."""
    return ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())


def out_of_memory(feeds: Feeds, device: str, error: Exception) -> DeviceError:
    """The sentence for a batch that `device` has no room for."""
    batch = batch_size(feeds)
    smaller = f"use a smaller batch_size, at most {batch // 2}" if batch is not None and batch > 1 else None
    hint = "; or ".join(part for part in (smaller, "free memory that others hold: nvidia-smi shows who") if part)
    return DeviceError(f"not enough memory on {device} for {described(feeds)}: {error}", hint=hint)


def run_in_halves(run: Run, feeds: Feeds) -> dict[str, np.ndarray]:
    """`run(feeds)`; where that raises DeviceError, both halves of the batch one after the other, and theirs again.

    Every array of feeds and outputs has the batch on its first axis. What was done is said in one warning; a batch of
    one that does not fit raises.
    """
    try:
        return run(feeds)
    except DeviceError as error:
        batch = batch_size(feeds)
        if batch is None or batch < 2:
            raise
        half = batch // 2
        message = f"a batch of {batch} runs in two halves: {error.message}"
        warnings.warn(f"{message}; a batch_size of {half} avoids trying in vain", stacklevel=3)
    parts = [run_in_halves(run, {name: array[rows] for name, array in feeds.items()}) for rows in _halves(half)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _halves(half: int) -> tuple[slice, slice]:
    return slice(None, half), slice(half, None)
