"""From a checkpoint's names to canonical ones, with every weight accounted for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_export.checkpoints._tensors import FLOATING, StoredTensor
from clip_export.errors import CheckpointError, WeightsError
from clip_export.spec import Shape

if TYPE_CHECKING:
    import torch

_LISTED = 10


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a canonical weight is made: the checkpoint's tensors `keys`, joined along the first axis or transposed."""

    keys: tuple[str, ...]
    transposed: bool = False

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape that each of `keys` must have for the canonical weight to have `shape`."""
        if self.transposed:
            return shape[::-1]
        return (shape[0] // len(self.keys), *shape[1:])


class Weights(Mapping[str, "torch.Tensor"]):
    """Canonical name -> tensor in its stored dtype, read when asked for and not kept."""

    def __init__(self, stored: Mapping[str, StoredTensor], recipes: Mapping[str, Recipe]) -> None:
        self._stored = stored
        self._recipes = recipes

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        recipe = self._recipes[name]
        tensors = [load_finite(key, self._stored[key]) for key in recipe.keys]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined.t().contiguous() if recipe.transposed else joined

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)


def bind(
    stored: Mapping[str, StoredTensor],
    recipes: Mapping[str, Recipe],
    shapes: Mapping[str, Shape],
    *,
    used: Collection[str] = (),
    ignored: Callable[[str], bool] = lambda key: False,
) -> Weights:
    """Make the weights `shapes` from what is `stored`, after checking that the two fit without a rest.

    `used` are keys that were read otherwise (logit_scale), `ignored` says which carry no information.
    Raises WeightsError that lists missing, unexpected, misshapen and non-floating weights by their stored names.
    """
    wanted = {key: recipes[name].stored_shape(shape) for name, shape in shapes.items() for key in recipes[name].keys}
    there = {key: tensor for key, tensor in stored.items() if key in wanted}
    unexpected = [key for key in stored if key not in wanted and key not in used and not ignored(key)]
    problems = {
        "missing": [key for key in wanted if key not in stored],
        "unexpected": unexpected,
        "misshapen": [
            f"{k} is {_shape(t.shape)}, not {_shape(wanted[k])}" for k, t in there.items() if t.shape != wanted[k]
        ],
        "not floating point": [f"{key} is {t.dtype}" for key, t in there.items() if not _is_floating(t)],
        "in 8 bits": [f"{key} is {t.dtype}" for key, t in there.items() if _in_eight_bits(t)],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {_capped(names)}" for kind, names in problems.items() if names)
        alone = [kind for kind, names in problems.items() if names] == ["in 8 bits"]
        raise WeightsError(
            f"the weights are not those of the model that the checkpoint describes: {listed}",
            hint="take the checkpoint in fp16, bf16 or fp32"
            if alone
            else "weights and config may be of different models, or the model has parts that are not supported",
        )
    return Weights(stored, {name: recipes[name] for name in shapes})


def _in_eight_bits(tensor: StoredTensor) -> bool:
    """One of the floating point types that some keep a UNet in: float8_e4m3fn, F8_E5M2."""
    return tensor.dtype.lower().startswith(("float8", "f8_"))


def _is_floating(tensor: StoredTensor) -> bool:
    return tensor.dtype in FLOATING or _in_eight_bits(tensor)


def scalar(stored: Mapping[str, StoredTensor], key: str) -> float:
    """A weight of one element, such as logit_scale, which some checkpoints store as [1]. Raises WeightsError."""
    if key not in stored:
        raise WeightsError(f"1 missing: {key}", hint="the file may hold only a part of the model")
    if stored[key].shape not in ((), (1,)):
        raise WeightsError(f"1 misshapen: {key} is {_shape(stored[key].shape)}, expected a single number")
    return float(load_finite(key, stored[key]).item())


def load_finite(key: str, tensor: StoredTensor) -> torch.Tensor:
    """The values of a tensor. Raises WeightsError if any is NaN or infinite: no embedding would be a number."""
    import torch

    values = tensor.load()
    if tuple(values.shape) != tensor.shape:
        raise CheckpointError(
            f"{key} has changed while it was read: {_shape(values.shape)}, not {_shape(tensor.shape)}"
        )
    if values.numel() and values.is_floating_point():
        # aminmax passes NaN on and allocates nothing; isfinite() is 10 times slower and needs a mask of the same size.
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise WeightsError(
                f"weight {key} holds NaN or infinite values, expected finite numbers",
                hint="the checkpoint is damaged, or its training has diverged",
            )
    return values


def _shape(shape: Shape | torch.Size) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _capped(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
