"""Who takes part: torch in three forms, and every engine that this machine builds and runs.

Each turns a Case into work without arguments, on the device (tensors there, results there) or from host to host (numpy
arrays in and out). What cannot take part says why, and the rest goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from _gpu_checkpoint import Case

import clip_export
from clip_export.encoder import Encoder
from clip_export.spec import ModelSpec, Tower
from clip_export.tokenizer import Tokens

Where = Literal["device", "host"]
Work = Callable[[], Any]


class Contestant(Protocol):
    """Something that encodes. `precision` is that of its weights and most of its arithmetic."""

    name: str
    precision: str

    def work(self, case: Case, where: Where) -> Work:
        """What is to be timed; raises LeftOut with the reason where there is no such thing."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class LeftOut(Exception):  # noqa: N818 (it is no error: the benchmark goes on without)
    """Why a contestant does not take part."""


@dataclass
class Found:
    """The contestants that came about, the reason of each that did not, and what `verify` said of the engines."""

    contestants: list[Contestant] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)

    def attempt(self, name: str, make: Callable[[], Contestant]) -> None:
        """Add what `make` gives, or the reason why it gives nothing."""
        try:
            self.contestants.append(make())
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is a line of the report
            self.left_out[name] = reason(error)


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind where it is none of ours."""
    lines = str(error).strip().splitlines() or [""]
    ours = isinstance(error, clip_export.ClipExportError | LeftOut)
    return lines[0] if ours else f"{type(error).__name__}: {lines[0]}"


class TorchTowers:
    """Our towers, which are what the graphs were traced from."""

    def __init__(self, name: str, towers: dict[Tower, torch.nn.Module], device: str, precision: str) -> None:
        self.name, self.precision = name, precision
        self._towers, self._device = towers, device

    def work(self, case: Case, where: Where) -> Work:
        """The tower alone; from host to host with the copies of a plain `.to(device)` and `.cpu()`."""
        tower, device = self._towers[case.tower], self._device
        if where == "device":
            tensors = [torch.from_numpy(array).to(device) for array in case.inputs.values()]
            return lambda: tower(*tensors)[0]

        def copied() -> np.ndarray:
            tensors = [torch.from_numpy(array).to(device) for array in case.inputs.values()]
            return as_numpy(tower(*tensors)[0])

        return copied

    def close(self) -> None:
        """Free the weights."""
        self._towers = {}


class Transformers:
    """transformers' CLIPModel: what most people run. Its pixels are normalized floats, made beforehand."""

    def __init__(self, name: str, checkpoint: Path, spec: ModelSpec, device: str, dtype: torch.dtype) -> None:
        from random_checkpoint import oracles

        self.name, self.precision = name, "fp16" if dtype == torch.float16 else "fp32"
        library = oracles.transformers()
        self._model = library.CLIPModel.from_pretrained(checkpoint).eval().to(device, dtype)
        self._device, self._dtype, self._spec = device, dtype, spec

    def work(self, case: Case, where: Where) -> Work:
        """On the device from pixels in its dtype, from host to host from the float32 that its processor gives."""
        model = self._model
        if case.tower == "image":
            values = self._normalized(case.inputs["pixels"])

            def tower(values: torch.Tensor) -> torch.Tensor:
                values = values.to(self._device, self._dtype)
                return model.visual_projection(model.vision_model(pixel_values=values).pooler_output)
        else:
            values = torch.from_numpy(case.inputs["input_ids"]).long()

            def tower(values: torch.Tensor) -> torch.Tensor:
                return model.text_projection(model.text_model(input_ids=values.to(self._device)).pooler_output)

        if where == "host":
            return lambda: as_numpy(tower(values))
        there = values.to(self._device, self._dtype) if case.tower == "image" else values.to(self._device)
        return lambda: tower(there)

    def _normalized(self, pixels: np.ndarray) -> torch.Tensor:
        preprocess = self._spec.preprocess
        assert preprocess is not None
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        return (torch.from_numpy(pixels).float() / 255 - mean) / std

    def close(self) -> None:
        """Free the weights."""
        self._model = None


class Engines:
    """An opened bundle: ONNX Runtime or a plan."""

    def __init__(self, name: str, encoder: Encoder, precision: str) -> None:
        self.name, self.precision = name, precision
        self._encoder = encoder

    def work(self, case: Case, where: Where) -> Work:
        """The engine as an application uses it; its results on the device are DeviceArrays."""
        encoder = self._encoder
        if where == "host":
            if case.tower == "image":
                return lambda: encoder.pixel_outputs(case.inputs["pixels"])["embedding"]
            tokens = Tokens(**case.inputs)
            return lambda: encoder.token_outputs(tokens)["embedding"]
        engine = encoder._on_device.get(case.tower)  # the only way in for token ids that are on the device already
        if engine is None:
            raise LeftOut("its results are on the host")
        feeds = {name: torch.from_numpy(array).cuda() for name, array in case.inputs.items()}
        return lambda: engine.run(feeds, outputs=("embedding",))["embedding"]

    def close(self) -> None:
        """Close the engines."""
        self._encoder.close()


def as_numpy(result: Any) -> np.ndarray:
    """An embedding, float32 [batch, embedding_dim], wherever it is."""
    if isinstance(result, torch.Tensor):
        return result.detach().float().cpu().numpy()
    return np.asarray(result if isinstance(result, np.ndarray) else result.numpy(), dtype=np.float32)


def torch_towers(checkpoint: Path, device: str, dtype: torch.dtype) -> dict[Tower, torch.nn.Module]:
    """Both towers with the weights of `checkpoint`, giving their embeddings."""
    from clip_export.checkpoints import read
    from clip_export.towers import make_tower

    source = read(checkpoint)
    towers = {}
    for tower in source.spec.towers:
        module = make_tower(source.spec, tower, source.weights, ("embedding",)).to(device, dtype)
        if tower == "image":  # it computes (pixels - 128) / 128 in float32, which a half convolution does not take
            module.patch_embedding.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
        towers[tower] = module
    return towers


def find_torch(found: Found, checkpoint: Path, spec: ModelSpec, *, device: str, compile_mode: str | None) -> None:
    """Add transformers, our towers and our towers compiled: fp16 on a GPU, fp32 on a CPU."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    precision = "fp16" if dtype == torch.float16 else "fp32"
    name = f"transformers, eager {precision}"
    found.attempt(name, lambda: Transformers(name, checkpoint, spec, device, dtype))
    eager = f"torch towers, eager {precision}"
    found.attempt(eager, lambda: TorchTowers(eager, torch_towers(checkpoint, device, dtype), device, precision))
    compiled = f"torch towers, compiled {precision}"

    def make_compiled() -> Contestant:
        # One graph for each shape, as a service that knows its batches would have it: more than dynamo's limit of 8.
        torch._dynamo.config.recompile_limit = 64
        options: dict[str, Any] = {"mode": compile_mode} if compile_mode else {"backend": "eager"}
        towers = torch_towers(checkpoint, device, dtype)
        made = {tower: torch.compile(module, dynamic=False, **options) for tower, module in towers.items()}
        return TorchTowers(compiled, made, device, precision)

    found.attempt(compiled, make_compiled)


@dataclass(frozen=True)
class Attempt:
    """One engine to try: `engine` compiles a plan for `gpu`, or None runs the graphs."""

    name: str
    backend: str
    precision: str
    engine: str | None = None
    gpus: tuple[str, ...] = ()


ATTEMPTS = (
    Attempt("onnxruntime fp32", "onnxruntime", "fp32"),
    Attempt("onnxruntime fp16", "onnxruntime", "fp16"),
    Attempt("tensorrt fp16", "tensorrt", "fp16", "tensorrt"),
    Attempt("tensorrt-rtx fp16", "tensorrt-rtx", "fp16", "tensorrt-rtx"),
    Attempt("tensorrt-rtx fp16, built for sm_80", "tensorrt-rtx", "fp16", "tensorrt-rtx", ("sm_80",)),
)


def find_engines(found: Found, bundle: Path, batches: tuple[int, ...], *, device: str) -> Iterator[str]:
    """Build, verify and open each of ATTEMPTS, in a copy of the bundle of its own; yields names before their turn."""
    for attempt in ATTEMPTS:
        yield attempt.name
        found.attempt(attempt.name, lambda a=attempt: _open(found, a, bundle, batches, device))


def _open(found: Found, attempt: Attempt, bundle: Path, batches: tuple[int, ...], device: str) -> Contestant:
    place = _built(attempt, bundle, batches)
    where = {"device": None if attempt.engine else device, "backend": attempt.backend, "precision": attempt.precision}
    found.verified[attempt.name] = clip_export.verify(place, **where, hostile=False).to_dict()
    encoder = clip_export.load(place, batch_size=max(batches), check_files=False, **where)
    return Engines(attempt.name, encoder, attempt.precision)


def _built(attempt: Attempt, bundle: Path, batches: tuple[int, ...]) -> Path:
    """The bundle with what `attempt` needs: variants go into the bundle itself, plans each into a copy."""
    from clip_export.compilation import PlanOptions
    from clip_export.extension import extend

    if attempt.precision != "fp32" and attempt.precision not in clip_export.Bundle.open(bundle).manifest.variants:
        extend(bundle, precision=attempt.precision)
    if attempt.engine is None:
        return bundle
    place = bundle.with_name(f"{bundle.name}-{'-'.join([attempt.engine, *attempt.gpus])}")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bundle, place)
    options = PlanOptions(batches=batches)
    extend(place, precision=attempt.precision, engine=attempt.engine, gpus=attempt.gpus, options=options)
    return place
