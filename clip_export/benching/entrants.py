"""Who takes part: the bundle's engines, plain ONNX Runtime, and the same model in torch and transformers.

An Entrant says what to open, in plain data, so that a fresh process can open it too. A Contestant is what was opened;
it turns a batch into work without arguments: from host to host, numpy arrays in and out, or on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from clip_export.backends import names as known_backends
from clip_export.benching.batches import Batch
from clip_export.bundle import Bundle
from clip_export.choice import FP32, Choice, choose
from clip_export.cosine import cosines
from clip_export.encoder import Encoder
from clip_export.errors import BackendError, BundleError, ClipExportError, InputError, MissingDependencyError
from clip_export.graph.files import missing
from clip_export.runtime import open_choice

Kind = Literal["bundle", "onnxruntime", "torch", "compile", "transformers"]
Where = Literal["host", "device"]
Work: TypeAlias = Callable[[], Any]

COMPARABLE: tuple[Kind, ...] = ("torch", "compile", "transformers", "onnxruntime")
NEED_CHECKPOINT: tuple[Kind, ...] = ("torch", "compile", "transformers")
TITLES: dict[Kind, str] = {
    "onnxruntime": "plain onnxruntime",
    "torch": "torch, eager",
    "compile": "torch, compiled",
    "transformers": "transformers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """What to open. `backend` and `precision` are the bundle's, None for what `load` would take."""

    kind: Kind
    bundle: str
    backend: str | None = None
    precision: str | None = None
    device: str | None = None
    checkpoint: str | None = None
    most: int = 64  # inputs at once

    @property
    def title(self) -> str:
        """What it is called until it is open, or where it cannot be opened."""
        if self.kind != "bundle":
            return TITLES[self.kind]
        return f"{self.backend or 'the bundle'}{'' if self.precision is None else f' {self.precision}'}"


class Contestant(Protocol):
    """Something that encodes. `precision` is that of its weights and most of its arithmetic."""

    name: str
    precision: str
    device: str

    def work(self, batch: Batch, where: Where) -> Work:
        """What is to be timed. Raises ClipExportError or RuntimeError where there is no such thing."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def open_entrant(entrant: Entrant) -> Contestant:
    """Open it. Raises whatever keeps it from taking part: a ClipExportError, or what torch raises."""
    bundle = Bundle.open(entrant.bundle, check_files=False)
    if entrant.kind == "bundle":
        return open_engines(bundle, entrant)
    if entrant.kind == "onnxruntime":
        return PlainOnnxRuntime(bundle, entrant.device or "cpu")
    from clip_export.benching import originals_timed

    return originals_timed.open_original(bundle, entrant)


def open_engines(bundle: Bundle, entrant: Entrant) -> Engines:
    """The bundle as an application opens it. Raises as `clip_export.load` does."""
    choice = choose(bundle, backend=entrant.backend, device=entrant.device, precision=entrant.precision)
    return Engines(bundle, choice, open_choice(bundle, choice, batch_size=entrant.most))


class Engines:
    """An opened bundle: ONNX Runtime or plans."""

    def __init__(self, bundle: Bundle, choice: Choice, encoder: Encoder) -> None:
        self.name = f"{choice.title}, {choice.precision}"
        self.precision, self.device = choice.precision, choice.device
        self.encoder = encoder
        self._bundle = bundle

    def work(self, batch: Batch, where: Where) -> Work:
        """Through the Encoder; on the device through the engine alone, which takes and leaves arrays there."""
        encoder, name = self.encoder, output_of(self._bundle, batch)
        if where == "device":
            return self._on_device(batch, name)
        if batch.tokens is not None:
            tokens = batch.tokens
            return lambda: encoder.token_outputs(tokens)[name]
        pixels = cast("npt.NDArray[np.uint8]", batch.feeds["pixels"])
        return lambda: encoder.pixel_outputs(pixels)[name]

    def _on_device(self, batch: Batch, name: str) -> Work:
        import torch

        engine = self.encoder._on_device.get(batch.tower)  # the only way in for token ids that are on the device
        if engine is None:
            raise BackendError(f"{self.name} leaves its results on the host")
        feeds = {key: torch.from_numpy(array).to(self.device) for key, array in batch.feeds.items()}
        return lambda: engine.run(feeds, outputs=(name,))[name]

    def close(self) -> None:
        """Close the engines."""
        self.encoder.close()


class PlainOnnxRuntime:
    """The fp32 graphs in a session with default options and nothing around it, as a script would write it."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        from clip_export.backends._ort_session import import_onnxruntime, provider_for

        library = import_onnxruntime()
        self.name, self.precision, self.device = f"{TITLES['onnxruntime']}, {device}, {FP32}", FP32, device
        self._bundle = bundle
        providers = [provider_for(device)]
        self._sessions = {
            tower: library.InferenceSession(str(bundle.graph_path(tower, FP32)), providers=providers)
            for tower in bundle.spec.towers
        }

    def work(self, batch: Batch, where: Where) -> Work:
        """`session.run`: from host to host alone."""
        if where == "device":
            raise BackendError(f"{self.name} is compared from host to host alone")
        session, names = self._sessions[batch.tower], [output_of(self._bundle, batch)]
        feeds = dict(batch.feeds)
        return lambda: session.run(names, feeds)[0]

    def close(self) -> None:
        """Free the sessions."""
        self._sessions = {}


def entrants(
    bundle: Bundle,
    *,
    backends: Sequence[str | None],
    precisions: Sequence[str | None],
    device: str | None,
    compare: Sequence[str],
    checkpoint: str | None,
    most: int,
) -> list[Entrant]:
    """Those asked for, the bundle's own first.

    Raises InputError for a name that is none, or a checkpoint that lacks; BackendError for a backend, BundleError for a
    precision that nobody knows, whatever machine this is.

    The demo's checkpoint is part of the package and need not be named.
    """
    unknown = sorted(set(compare) - set(COMPARABLE))
    if unknown:
        raise InputError(
            f"a bundle cannot be compared with {', '.join(map(repr, unknown))}",
            hint=f"choose among {', '.join(COMPARABLE)}",
        )
    _require_known(bundle, backends, precisions)
    if checkpoint is None and bundle.manifest.provenance.format == "demo":
        checkpoint = "demo"
    needing = [kind for kind in NEED_CHECKPOINT if kind in compare]
    if needing and checkpoint is None:
        built = bundle.manifest.provenance
        raise InputError(
            f"comparing with {', '.join(needing)} needs the checkpoint that the bundle was built from",
            hint=f"--checkpoint PATH, of {built.name} ({built.format})",
        )
    shared = {"bundle": str(bundle.path), "device": device, "most": most}
    own = [
        Entrant(kind="bundle", backend=backend, precision=precision, **shared)  # type: ignore[arg-type]
        for backend in backends
        for precision in precisions
    ]
    others = [Entrant(kind=kind, checkpoint=checkpoint, **shared) for kind in COMPARABLE if kind in compare]  # type: ignore[arg-type]
    return [*own, *others]


def _require_known(bundle: Bundle, backends: Sequence[str | None], precisions: Sequence[str | None]) -> None:
    for backend in backends:
        if backend is not None and backend not in known_backends():
            raise BackendError(f"there is no backend {backend!r}", hint=f"choose one of: {', '.join(known_backends())}")
    for precision in precisions:
        held = bundle.manifest.variants
        if (
            precision is not None and not {precision, f"{precision}all"} & held.keys()
        ):  # fp16 may be answered by fp16all
            message = f"{bundle.path} holds no {precision} graphs, only {', '.join(held)}"
            raise BundleError(message, hint="choose one of these")


def output_of(bundle: Bundle, batch: Batch) -> str:
    """The output that is compared: the embedding, where the tower has one."""
    outputs = bundle.graph(batch.tower).outputs
    return "embedding" if "embedding" in outputs else outputs[0]


def as_numpy(result: Any) -> npt.NDArray[np.float32]:
    """What `work` gave, float32, wherever it is."""
    if hasattr(result, "detach"):  # torch, which need not be installed
        result = result.detach().float().cpu().numpy()
    array: npt.NDArray[np.float32] = np.asarray(
        result if isinstance(result, np.ndarray) else result.numpy(), np.float32
    )
    return array


def least_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """That of the row furthest from what is expected; NaN where the shapes differ, as another model's do."""
    return float(cosines(found, expected).min()) if found.shape == expected.shape else float("nan")


def has_cuda_torch() -> bool:
    """Whether torch is here and sees a GPU: what timing on the device takes."""
    if missing("torch"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def reason(error: BaseException) -> str:
    """The first line of an error, and its hint; with its kind where it is none of ours."""
    if isinstance(error, ClipExportError):
        needs_more = isinstance(error, BackendError | MissingDependencyError) and error.hint is not None
        return f"{error.message}; {error.hint}" if needs_more else error.message
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
