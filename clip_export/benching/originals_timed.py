"""The same model in torch, to be timed: our towers eager and compiled, and transformers' CLIPModel.

fp32 on a CPU, fp16 on a GPU, as each is used there. The towers are what the graphs were traced from; nothing stands
between them and the batch. transformers comes through originals.py, which looks it up by name and holds it to the
bundle's spec.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from clip_export import checkpoints
from clip_export.benching.batches import Batch
from clip_export.benching.entrants import TITLES, Contestant, Entrant, Where, Work, output_of
from clip_export.bundle import Bundle
from clip_export.errors import BackendError, CheckpointError, MissingDependencyError
from clip_export.graph.files import missing
from clip_export.originals import Transformers, stated_options
from clip_export.spec import Tower

if TYPE_CHECKING:
    import torch

    Modules = dict[Tower, torch.nn.Module]

_DEMO = Path(__file__).parents[1] / "demo"


def open_original(bundle: Bundle, entrant: Entrant) -> Contestant:
    """Open an entrant of kind torch, compile or transformers.

    Raises MissingDependencyError where a library is not installed, CheckpointError for another model's checkpoint.
    """
    assert entrant.checkpoint is not None
    if missing("torch"):
        raise MissingDependencyError("torch is not installed here", hint="pip install 'clip-export[export]'")
    device = entrant.device or "cpu"
    if entrant.kind == "transformers":
        return TransformersModel(bundle, entrant.checkpoint, device)
    return Towers(bundle, entrant.checkpoint, device, compiled=entrant.kind == "compile")


class Towers:
    """Our towers with the weights of the checkpoint, eager or compiled for each shape that they meet."""

    def __init__(self, bundle: Bundle, checkpoint: str, device: str, *, compiled: bool) -> None:
        dtype, self.precision = _dtype(device)
        self.device = device
        self.name = f"{TITLES['compile' if compiled else 'torch']}, {device}, {self.precision}"
        self._bundle = bundle
        self._towers = _towers(bundle, checkpoint, device, dtype)
        if compiled:
            self._towers = _compiled(self._towers, device)

    def work(self, batch: Batch, where: Where) -> Work:
        """The tower alone; from host to host with the copies of a plain `.to(device)` and `.cpu()`."""
        import torch

        tower, device, feeds = self._towers[batch.tower], self.device, list(batch.feeds.values())
        place = self._bundle.graph(batch.tower).outputs.index(output_of(self._bundle, batch))
        there = [torch.from_numpy(array).to(device) for array in feeds]

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return cast("torch.Tensor", tower(*there)[place])

        def copied() -> np.ndarray:
            with torch.inference_mode():
                return _to_host(tower(*(torch.from_numpy(array).to(device) for array in feeds))[place])

        return run if where == "device" else copied

    def close(self) -> None:
        """Free the weights."""
        self._towers = {}


class TransformersModel:
    """transformers' CLIPModel: what most people run. Its pixels are normalized floats, made beforehand."""

    def __init__(self, bundle: Bundle, checkpoint: str, device: str) -> None:
        dtype, self.precision = _dtype(device)
        original = Transformers(str(_DEMO) if checkpoint == "demo" else checkpoint, bundle)
        self.device, self.name = device, f"transformers {original.version}, {device}, {self.precision}"
        self._bundle, self._dtype = bundle, dtype
        self._model: Any = original._model.to(device, dtype)

    def work(self, batch: Batch, where: Where) -> Work:
        """On the device from pixels in its dtype, from host to host from the float32 that its processor gives."""
        import torch

        if output_of(self._bundle, batch) != "embedding":
            raise BackendError("the bundle gives no embedding to compare")
        values = self._normalized(batch) if batch.tower == "image" else _ids(batch)
        there = self._there(batch.tower, values)

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return self._embedding(batch.tower, there)

        def copied() -> np.ndarray:
            with torch.inference_mode():
                return _to_host(self._embedding(batch.tower, self._there(batch.tower, values)))

        return run if where == "device" else copied

    def _embedding(self, tower: Tower, values: torch.Tensor) -> torch.Tensor:
        model = self._model
        if tower == "image":
            pooled = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)
        else:
            pooled = model.text_projection(model.text_model(input_ids=values).pooler_output)
        return cast("torch.Tensor", pooled)

    def _there(self, tower: Tower, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, self._dtype) if tower == "image" else values.to(self.device)

    def _normalized(self, batch: Batch) -> torch.Tensor:
        import torch

        preprocess = self._bundle.spec.preprocess
        assert preprocess is not None
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
        return (torch.from_numpy(batch.feeds["pixels"]).float() / 255 - mean) / std

    def close(self) -> None:
        """Free the weights."""
        self._model = None


def _towers(bundle: Bundle, checkpoint: str, device: str, dtype: torch.dtype) -> Modules:
    """Both towers with the weights of `checkpoint`, which has to be that of `bundle`."""
    from clip_export.towers import make_tower

    source = checkpoints.read(checkpoint, stated_options(bundle))
    if source.spec.select(bundle.spec.towers) != bundle.spec:
        built = bundle.manifest.provenance
        raise CheckpointError(
            f"{source.source.name} is not the model of bundle {bundle.name}",
            hint=f"the bundle was built from {built.name} ({built.format})",
        )
    made: Modules = {}
    for tower in bundle.spec.towers:
        module = make_tower(source.spec, tower, source.weights, bundle.graph(tower).outputs).to(device, dtype)
        if tower == "image":  # it computes (pixels - 128) / 128 in float32, which a half convolution does not take
            patches = cast("torch.nn.Module", module.patch_embedding)
            patches.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
        made[tower] = module
    return made


def _compiled(towers: Modules, device: str) -> Modules:
    import torch

    # One graph for each shape, as a service that knows its batches would have it: more than dynamo's limit of 8.
    torch._dynamo.config.recompile_limit = 64
    mode = "default" if device == "cpu" else "reduce-overhead"  # CUDA graphs
    return {
        tower: cast("torch.nn.Module", torch.compile(module, dynamic=False, mode=mode))
        for tower, module in towers.items()
    }


def _dtype(device: str) -> tuple[torch.dtype, str]:
    import torch

    return (torch.float32, "fp32") if device == "cpu" else (torch.float16, "fp16")


def _ids(batch: Batch) -> torch.Tensor:
    import torch

    return torch.from_numpy(batch.feeds["input_ids"]).long()


def _to_host(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array
