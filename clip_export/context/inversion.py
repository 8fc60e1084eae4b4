"""Files of textual inversion: vectors that stand for a word, learned for one kind of text encoder.

| file | holds |
|---|---|
| .safetensors with emb_params, or one tensor of any name | vectors for the one encoder of Stable Diffusion 1 or 2 |
| .safetensors or .pt with clip_l and clip_g | vectors for each encoder of SDXL |
| .pt, .bin with string_to_param, or a dict of one word to its vector | the same as the first, as trainers save it |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_export.context._torch_file import read_torch_file
from clip_export.context.result import Floats
from clip_export.context.units import Vector
from clip_export.errors import InputError
from clip_export.spec import Family

__all__ = ["for_encoder", "read_embeddings"]

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_LORA = re.compile(r"lora_(te|unet|down|up|[AB])|lora\.(up|down)|hada_w1|lokr_|\.alpha$")
_KEYS = ("clip_l", "clip_g")  # by the number of the encoder
_EXPECTED = "an embedding of textual inversion: one tensor, string_to_param, or clip_l and clip_g"


def read_embeddings(
    files: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]],
) -> dict[str, dict[str, Floats]]:
    """Name -> vectors by encoder: "" for a file that is for one encoder, else clip_l and clip_g; float32 [n, width].

    `files` are named by their stems where no names are given. Raises InputError for a file that holds something else,
    and for two of one stem: a prompt could mean but one of them.
    """
    if isinstance(files, (str, bytes, os.PathLike)):
        found = f"expected a list of embeddings or a mapping of names to them, found {os.fsdecode(files)!r}"
        raise InputError(found, hint="put it into a list: [file]")
    named = files if isinstance(files, Mapping) else _by_stem(files)
    for name, file in named.items():
        if not name.strip():
            raise InputError(f"the embedding {os.fspath(file)} has no name", hint="a name is what a prompt has of it")
    return {name: _read(Path(os.fspath(file))) for name, file in named.items()}


def _by_stem(files: Sequence[str | os.PathLike[str]]) -> dict[str, str | os.PathLike[str]]:
    named: dict[str, str | os.PathLike[str]] = {}
    for file in files:
        stem = Path(os.fspath(file)).stem
        if stem in named and Path(named[stem]) != Path(file):
            message = f"two embeddings are called {stem!r}: {os.fspath(named[stem])} and {os.fspath(file)}"
            raise InputError(message, hint="rename one, or name them: embeddings={name: file}")
        named[stem] = file
    return named


def for_encoder(
    embeddings: Mapping[str, Mapping[str, Floats]],
    number: int,
    *,
    family: Family,
    encoders: int,
    width: int,
    first_id: int,
    room: int,
) -> dict[str, list[Vector]]:
    """The vectors for one encoder of a model with `encoders`, by name. The refiner's one is SDXL's second.

    Raises InputError for an embedding of another width, or for another number of encoders.
    """
    found: dict[str, list[Vector]] = {}
    next_id = first_id
    for name, parts in embeddings.items():
        key = "" if "" in parts else _KEYS[1] if family == "sdxl_refiner" else _KEYS[number]
        if encoders > 1 and "" in parts:
            message = f"the embedding {name!r} is for one text encoder, and this model has {encoders}"
            raise InputError(message, hint="it was made for another kind of model; SDXL's hold clip_l and clip_g")
        if key not in parts:
            message = f"the embedding {name!r} has no {key}, only {', '.join(parts)}"
            raise InputError(message, hint="it was made for another kind of model")
        vectors = parts[key]
        if vectors.shape[1] != width:
            message = f"the embedding {name!r} is {vectors.shape[1]} wide, the text encoder {width}"
            raise InputError(
                message, hint="it was made for another kind of model: 768 is SD 1, 1024 is SD 2, 1280 bigG"
            )
        if len(vectors) > room:
            message = f"the embedding {name!r} has {len(vectors)} vectors, and {room} fit into a context"
            raise InputError(message, hint="take one with fewer vectors")
        found[name] = [Vector(row, next_id + place) for place, row in enumerate(vectors)]
        next_id += len(vectors)
    return found


def _read(path: Path) -> dict[str, Floats]:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}", hint="name the file of an embedding")
    held: Mapping[Any, Any] = _safetensors(path) if path.suffix.lower() == ".safetensors" else _pickle(path)
    if "string_to_param" in held:
        held = held["string_to_param"]
        if not isinstance(held, Mapping):
            raise _not_one(path, held)
    tensors = {str(key): value for key, value in held.items() if hasattr(value, "shape")}
    if any(map(_LORA.search, tensors)):
        raise _not_one(path, held)
    if set(_KEYS) <= tensors.keys():
        return {key: _vectors(path, tensors[key]) for key in _KEYS}
    if "emb_params" in tensors:
        return {"": _vectors(path, tensors["emb_params"])}
    if len(tensors) != 1:
        raise _not_one(path, held)
    return {"": _vectors(path, next(iter(tensors.values())))}


def _not_one(path: Path, held: object) -> InputError:
    keys = ", ".join(list(map(str, held))[:5]) if isinstance(held, Mapping) else type(held).__name__
    return InputError(f"{path.name}: expected {_EXPECTED}; found {keys or 'nothing'}", hint="a LoRA is no embedding")


def _vectors(path: Path, array: object) -> Floats:
    values = np.asarray(array, dtype=np.float32)
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or not values.size:
        raise InputError(f"{path.name}: expected vectors [n, width], found {list(values.shape)}", hint=_EXPECTED)
    if not np.isfinite(values).all():
        raise InputError(f"{path.name}: holds NaN or infinity", hint="its training has diverged; take another")
    return values


def _safetensors(path: Path) -> Mapping[str, object]:
    """Every tensor, bfloat16 widened: numpy has no such type, so the file is read as the bytes that it is made of."""
    from safetensors import SafetensorError, deserialize

    try:
        parts = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name} is no safetensors file: {error}", hint="fetch it again") from error
    return {name: _array(path, part["dtype"], part["shape"], bytes(part["data"])) for name, part in parts}


def _array(path: Path, dtype: str, shape: Sequence[int], data: bytes) -> object:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise InputError(f"{path.name}: expected floating point vectors, found {dtype}", hint=_EXPECTED)
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _pickle(path: Path) -> Mapping[object, object]:
    held = read_torch_file(path)
    if not isinstance(held, Mapping):
        raise _not_one(path, held)
    return held
