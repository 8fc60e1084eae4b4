"""The checkpoint's towers in fp32 torch, looked at in the same places as the graphs: forward hooks on modules.

A checkpoint of another shape is refused. One of the same shape that says something else (an activation, a crop, a
dialect) is what `explain` is for: the walk goes on and shows where it tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_export import checkpoints
from clip_export.bundle import Bundle
from clip_export.errors import AmbiguousCheckpointError, CheckpointError
from clip_export.explaining.layers import POSITIONS
from clip_export.explaining.stages import Place
from clip_export.originals import stated_options
from clip_export.spec import ModelSpec, Tower, to_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Original", "open_original"]

# What makes it another model: with these equal, the graph of one can be compared with the weights of the other.
_SHAPE = frozenset(
    {"width", "layers", "heads", "mlp_width", "vocab_size", "context_length", "image_size", "patch_size"}
    | {"embedding_dim", "crop_size"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """One tower of a checkpoint. `differs` are the fields in which its spec is not the bundle's, each in words."""

    name: str
    checkpoint: checkpoints.Checkpoint
    module: nn.Module
    differs: tuple[str, ...]

    def values(self, places: Sequence[Place], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the tower holds in `places`, float32 by layer, on `feeds`."""
        import torch

        found: dict[str, np.ndarray] = {}
        with ExitStack() as hooks, torch.inference_mode():
            for place in places:
                module = self.module.get_submodule(place.module)
                keep = _keeper(found, place.layer)
                hook: Any = (
                    module.register_forward_pre_hook(lambda _, given, keep=keep: keep(given[0]))
                    if place.before
                    else module.register_forward_hook(lambda _, __, result, keep=keep: keep(result))
                )
                hooks.callback(hook.remove)
            self.module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values()))
        return found

    def weights(self, module: str) -> dict[str, np.ndarray]:
        """The numbers of `module`, float32 by role, as `layers.weights` has them."""
        if module == "positional_embedding":
            parameters = dict(self.module.named_parameters(recurse=False))
            return {role: parameters[name].numpy() for role, name in POSITIONS.items() if name in parameters}
        state = self.module.get_submodule(module).state_dict()
        return {name: tensor.numpy() for name, tensor in state.items() if name in ("weight", "bias")}


def open_original(checkpoint: str, bundle: Bundle, tower: Tower) -> Original:
    """The `tower` of `checkpoint`, which gives what the graph in `bundle` gives.

    Raises CheckpointError, naming the fields, where it is of another shape than the bundle's, and as
    `checkpoints.read` does.
    """
    from clip_export.towers import make_tower

    source = _read(checkpoint, bundle, tower)
    name, built = f"{source.source.name} ({source.source.format})", bundle.manifest.provenance
    hint = f"the bundle was built from {built.name} ({built.format})"
    if tower not in source.spec.towers:
        raise CheckpointError(f"{name} has no {tower} tower", hint=hint)
    mine, theirs = (_facts(spec, tower) for spec in (bundle.spec, source.spec))
    others = {
        field: f"{field} {theirs.get(field)!r} instead of {mine.get(field)!r}"
        for field in sorted({*mine, *theirs})
        if theirs.get(field) != mine.get(field)
    }
    shapes = [words for field, words in others.items() if field.rpartition(".")[2] in _SHAPE]
    if shapes:
        raise CheckpointError(f"{name} is not the model of bundle {bundle.name}: {', '.join(shapes)}", hint=hint)
    module = make_tower(source.spec, tower, source.weights, bundle.graph(tower).outputs)
    return Original(name=name, checkpoint=source, module=module, differs=tuple(others.values()))


def _keeper(found: dict[str, np.ndarray], layer: str) -> Callable[[Tensor], None]:
    def keep(tensor: Tensor) -> None:
        found[layer] = tensor.detach().numpy()

    return keep


def _read(checkpoint: str, bundle: Bundle, tower: Tower) -> checkpoints.Checkpoint:
    """The checkpoint as it is; only where it leaves something open, as it was stated at the build.

    So what was stated wrongly is found, and not repeated.
    """
    try:
        return checkpoints.read(checkpoint, checkpoints.Options(towers=(tower,)))
    except AmbiguousCheckpointError:
        return checkpoints.read(checkpoint, stated_options(bundle, (tower,)))


def _facts(spec: ModelSpec, tower: Tower) -> dict[str, object]:
    """The fields of one tower and of what serves it, by dotted names."""
    tree = to_dict(spec)
    parts = (tower, "tokenizer" if tower == "text" else "preprocess")
    return {name: value for part in parts for name, value in _flat(tree[part], f"{part}.")}


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
