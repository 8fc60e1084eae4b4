"""Context: the hidden states that a diffusion model attends to, and its file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from clip_export.errors import OutputError
from clip_export.output_file import staged_file, writing

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What a diffusion model is given for n prompts.

    `hidden_states`: float32 [n, context_length * chunks, dim], the encoders side by side along the last axis. `pooled`:
    float32 [n, dim], None where the family and the dialect have none. The same for negative prompts, None where there
    were none; all have the same number of chunks. `dialect` and `clip_skip` say how it was made, the latter in our
    spelling; `context_length` is that of one chunk, 77 in all of Stable Diffusion.
    """

    hidden_states: Floats
    pooled: Floats | None
    negative_hidden_states: Floats | None
    negative_pooled: Floats | None
    dialect: str
    clip_skip: str
    context_length: int = 77

    @property
    def chunks(self) -> int:
        """How many times the encoders' context the prompts take."""
        return int(self.hidden_states.shape[1]) // self.context_length

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` as safetensors, whole or not at all: prompt_embeds, pooled_prompt_embeds and their negatives.

        The names are those that diffusers' pipelines take. Raises OutputError where it cannot be written, and for
        another suffix.
        """
        require_suffix(path)
        arrays = {
            "prompt_embeds": self.hidden_states,
            "pooled_prompt_embeds": self.pooled,
            "negative_prompt_embeds": self.negative_hidden_states,
            "negative_pooled_prompt_embeds": self.negative_pooled,
        }
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        data = save(tensors, metadata={"dialect": self.dialect, "clip_skip": self.clip_skip})
        with staged_file(Path(path)) as file, writing(Path(path)):
            file.write(data)


def require_suffix(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where `path` is named like a file of another format: a Context is written as safetensors."""
    given = Path(path)
    if given.suffix.lower() != ".safetensors":
        found = f"{os.fsdecode(path)}: a Context is written as .safetensors, found the suffix {given.suffix!r}"
        raise OutputError(found, hint=f"name it {given.parent / (given.stem or 'context')}.safetensors")
