"""The originals that a bundle can be compared with: its checkpoint in torch, transformers' CLIP, open_clip's.

Each has what `against.Reference` asks for. The libraries are no dependencies: they are looked up by name where somebody
asks for them, and nowhere else, so that import-linter's rule "The oracles are for tests" stays true of every import.

A reference is opened only if it is the model of the bundle: the fields of its spec are compared first.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from clip_export import checkpoints
from clip_export.bundle import Bundle
from clip_export.choice import FP32
from clip_export.encoder import Encoder, Floats
from clip_export.errors import CheckpointError, MissingDependencyError
from clip_export.images import ImageInput, open_image
from clip_export.pipeline import reference
from clip_export.spec import Activation, Dialect, Tower, to_dict
from clip_export.verification import CONTRACTS, golden_outputs, golden_rows

__all__ = ["OpenClip", "TorchTowers", "Transformers", "stated_options"]

Ints = npt.NDArray[np.integer]
Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

_BATCH = 32
_SHOWN = 8  # names that one error lists
_DISTRIBUTIONS = {"transformers": "transformers", "open_clip": "open-clip-torch", "torch": "torch"}


def stated_options(bundle: Bundle, towers: tuple[Tower, ...] | None = None) -> checkpoints.Options:
    """What was stated when `bundle` was built, to read its checkpoint by; its own towers, or those asked for."""
    stated = bundle.manifest.provenance.options
    return checkpoints.Options(
        activation=cast(Activation | None, stated.get("activation")),
        tokenizer_dialect=cast(Dialect | None, stated.get("tokenizer_dialect")),
        preprocess_dialect=cast(Dialect | None, stated.get("preprocess_dialect")),
        towers=bundle.spec.towers if towers is None else towers,
    )


class TorchTowers:
    """The checkpoint in float32 torch."""

    notes: tuple[str, ...] = ()

    def __init__(self, checkpoint: str, bundle: Bundle) -> None:
        options = replace(stated_options(bundle), context=bundle.spec.context is not None)
        source = checkpoints.read(checkpoint, options)  # weights are read when the towers are made, so this is quick
        self.name = source.source.name
        self.version = f"torch {metadata.version('torch')}"
        self.facts = _flat(to_dict(source.spec.select(bundle.spec.towers)))
        _require_same_model(bundle, f"{self.name} ({source.source.format})", self.facts)
        changed = _changed(bundle.manifest.provenance.files, source.source.sha256)
        if changed:
            self.notes = (f"not the files that the bundle was built from: {', '.join(changed)}",)
        self._encoder = reference(checkpoint, options)
        if changed:
            _require_same_outputs(bundle, self._encoder, self.name, changed)

    def ids(self, texts: Sequence[str]) -> Ints:
        return self._encoder.tokenize(texts, truncate=True)

    def pixels(self, images: Sequence[ImageInput]) -> Pixels:
        return self._encoder.preprocess(images)

    def embed_text(self, texts: Sequence[str]) -> Floats:
        return self._encoder.encode_text(texts, truncate=True, normalize=False)

    def embed_image(self, images: Sequence[ImageInput]) -> Floats:
        return self._encoder.encode_image(images, normalize=False)


class Transformers:
    """transformers, from a local directory; nothing is fetched."""

    name = "transformers"
    notes: tuple[str, ...] = ()

    def __init__(self, directory: str, bundle: Bundle) -> None:
        library = _library("transformers", "AutoConfig", "CLIPTokenizer", "CLIPImageProcessor", "CLIPModel")
        self.version = metadata.version("transformers")
        if not Path(directory).is_dir():
            raise CheckpointError(f"transformers:{directory} is no directory", hint="download the model first")
        local = {"local_files_only": True}
        with _reading(f"transformers:{directory}"):
            config = library.AutoConfig.from_pretrained(directory, **local)
        if config.model_type != "clip":
            raise CheckpointError(
                f"transformers:{directory} is a {config.model_type}, expected a clip with both towers",
                hint="compare with the checkpoint itself: --against DIRECTORY",
            )
        self.facts = _transformers_facts(config)
        _require_same_model(bundle, f"transformers:{directory}", self.facts)
        with _reading(f"transformers:{directory}"):
            # float32 is asked for: by default transformers 5 takes the type of the file.
            model, loading = library.CLIPModel.from_pretrained(
                directory, **local, output_loading_info=True, dtype="float32"
            )
            self._tokenizer = library.CLIPTokenizer.from_pretrained(directory, **local)
            # The one on PIL is the original; the one on torchvision differs by up to 2 levels.
            processor = getattr(library, "CLIPImageProcessorPil", None) or library.CLIPImageProcessor
            self._processor = processor.from_pretrained(directory, **local)
        if loading["missing_keys"]:
            found = ", ".join(sorted(loading["missing_keys"])[:_SHOWN])
            raise CheckpointError(f"transformers:{directory} has no weights for {found}", hint="download it again")
        self._model = model.eval()
        self._context = config.text_config.max_position_embeddings

    def ids(self, texts: Sequence[str]) -> Ints:
        return np.array(self._tokens(texts, "np")["input_ids"])

    def pixels(self, images: Sequence[ImageInput]) -> Pixels:
        plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        rows = [self._processor(images=open_image(image), **plain)["pixel_values"][0] for image in images]
        return np.stack(rows).astype(np.uint8)

    def embed_text(self, texts: Sequence[str]) -> Floats:
        def run(part: Sequence[str]) -> Any:
            pooled = self._model.text_model(**self._tokens(part, "pt")).pooler_output
            return self._model.text_projection(pooled)

        return _batched(run, texts)

    def embed_image(self, images: Sequence[ImageInput]) -> Floats:
        def run(part: Sequence[ImageInput]) -> Any:
            torch = importlib.import_module("torch")
            options = {"return_tensors": "pt"}
            pixels = [self._processor(images=open_image(image), **options)["pixel_values"] for image in part]
            pooled = self._model.vision_model(pixel_values=torch.cat(pixels)).pooler_output
            return self._model.visual_projection(pooled)

        return _batched(run, images)

    def _tokens(self, texts: Sequence[str], kind: str) -> Any:
        options = {"padding": "max_length", "truncation": True, "max_length": self._context, "return_tensors": kind}
        return self._tokenizer(list(texts), **options)


class OpenClip:
    """open_clip, in float32 on the CPU."""

    name = "open_clip"
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, bundle: Bundle) -> None:
        library = _library("open_clip", "get_tokenizer")
        self.version = metadata.version("open-clip-torch")
        whole = Path(name).is_dir()
        model_name, _, weights = (f"local-dir:{name}", "", "") if whole else name.partition("@")
        with _reading(f"open_clip:{name}"):
            # Without the last word it goes on with random weights where it finds none.
            model, _, self._transform = library.create_model_and_transforms(
                model_name, pretrained=weights or None, precision="fp32", device="cpu", require_pretrained=True
            )
            self._tokenizer = library.get_tokenizer(model_name)
        self.facts = _open_clip_facts(model, f"open_clip:{name}")
        _require_same_model(bundle, f"open_clip:{name}", self.facts)
        self._model = model.eval()

    def ids(self, texts: Sequence[str]) -> Ints:
        return cast(Ints, self._tokenizer(list(texts)).numpy())

    def pixels(self, images: Sequence[ImageInput]) -> Pixels:
        config = self._model.visual.preprocess_cfg
        mean, std = (np.array(config[key], np.float64)[:, None, None] for key in ("mean", "std"))
        rows = [self._transform(open_image(image)).numpy() * std + mean for image in images]
        levels: Pixels = np.rint(255 * np.stack(rows)).astype(np.uint8)
        return levels

    def embed_text(self, texts: Sequence[str]) -> Floats:
        return _batched(lambda part: self._model.encode_text(self._tokenizer(list(part))), texts)

    def embed_image(self, images: Sequence[ImageInput]) -> Floats:
        def run(part: Sequence[ImageInput]) -> Any:
            torch = importlib.import_module("torch")
            return self._model.encode_image(torch.stack([self._transform(open_image(image)) for image in part]))

        return _batched(run, images)


def _library(module: str, *names: str) -> Any:
    """`module`, which no file here imports, with `names` in it.

    Raises MissingDependencyError where it, or torch, is not installed or cannot be imported.
    """
    lacking = [_DISTRIBUTIONS[name] for name in (module, "torch") if importlib.util.find_spec(name) is None]
    if lacking:
        message = f"comparing with {module} needs {' and '.join(lacking)}, not installed here"
        raise MissingDependencyError(message, hint=f"pip install {' '.join(lacking)}")
    try:
        library = importlib.import_module(module)
        for name in names:
            getattr(library, name)  # transformers imports what is behind a name when it is first asked for
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        cause = error.__cause__ or error
        message = f"{module} is installed but cannot be imported: {cause}"
        raise MissingDependencyError(
            message, hint=f"see what python -c 'from {module} import {names[-1]}' says"
        ) from error
    return library


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What a library raises over files that it cannot read becomes a CheckpointError that names them."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        message = f"{name} cannot be opened: {first or type(error).__name__}"
        raise CheckpointError(message, hint="check its files, and that the library itself opens it") from error


def _batched(run: Callable[[Sequence[T]], Any], items: Sequence[T]) -> Floats:
    """What `run` gives for every batch of `items`, float32 [n, features]."""
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        parts = [run(items[start : start + _BATCH]).float().numpy() for start in range(0, len(items), _BATCH)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def _require_same_model(bundle: Bundle, name: str, facts: Mapping[str, object]) -> None:
    """Raise CheckpointError, listing them, for `facts` of another model than that of `bundle`.

    Only what both know is compared: a bundle may have one tower, a library may not say everything.
    """
    held = _flat(to_dict(bundle.spec))
    differing = [
        f"{field} {value!r} instead of {held[field]!r}"
        for field, value in facts.items()
        if field in held and not _same(value, held[field])
    ]
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        built = bundle.manifest.provenance
        raise CheckpointError(
            f"{name} is not the model of bundle {bundle.name}: {', '.join(differing[:_SHOWN])}{more}",
            hint=f"the bundle was built from {built.name} ({built.format})",
        )


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)  # stored as float32 by one and as a double by the other
    return one == other


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested dicts as one, with dotted names; a tower that is None has no fields."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def _require_same_outputs(bundle: Bundle, encoder: Encoder, name: str, changed: Sequence[str]) -> None:
    """Raise CheckpointError where a checkpoint of other files gives other embeddings for the golden samples too."""
    golden = bundle.golden()
    rows = golden_rows(golden_outputs(encoder, golden), golden, precision=FP32, engine=name, required=CONTRACTS[FP32])
    worst = min(rows, key=lambda row: np.nan_to_num(row.min_cosine, nan=-1.0))
    if not worst.passed:
        raise CheckpointError(
            f"{name} is not the checkpoint that {bundle.name} was built from: {', '.join(changed)} differ, "
            f"and so do its {worst.tower} outputs, min cosine {worst.min_cosine:.6f} over golden samples",
            hint="compare with the checkpoint itself, or build a bundle of this one",
        )


def _changed(built: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The files of the build that are others here, or not here."""
    return sorted(name for name, digest in built.items() if here.get(name) != digest)


def _transformers_facts(config: Any) -> dict[str, object]:
    """The fields of a ModelSpec that a CLIPConfig holds."""
    text, image = config.text_config, config.vision_config
    return {
        "text.vocab_size": text.vocab_size,
        "text.context_length": text.max_position_embeddings,
        "text.embedding_dim": config.projection_dim,
        "image.image_size": image.image_size,
        "image.patch_size": image.patch_size,
        "image.embedding_dim": config.projection_dim,
        **_transformers_tower("text", text),
        **_transformers_tower("image", image),
    }


def _transformers_tower(tower: str, config: Any) -> dict[str, object]:
    fields = {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "activation": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }
    return {f"{tower}.transformer.{name}": value for name, value in fields.items()}


def _open_clip_facts(model: Any, name: str) -> dict[str, object]:
    """The fields of a ModelSpec that the modules of open_clip's CLIP or CustomTextCLIP show."""
    text, image = getattr(model, "text", model), model.visual
    if not hasattr(text, "token_embedding") or not hasattr(image, "conv1") or not hasattr(image, "transformer"):
        found = f"{type(text).__name__} and {type(image).__name__}"
        raise CheckpointError(f"{name} is a {found}, expected CLIP's transformers", hint="no bundle is built from it")
    return {
        "text.vocab_size": text.token_embedding.num_embeddings,
        "text.context_length": text.positional_embedding.shape[0],
        "text.embedding_dim": text.text_projection.shape[1],
        "image.image_size": image.image_size[0],
        "image.patch_size": image.patch_size[0],
        "image.embedding_dim": image.proj.shape[1],
        "logit_scale": float(model.logit_scale.detach()),
        **_open_clip_tower("text", text.transformer),
        **_open_clip_tower("image", image.transformer),
    }


def _open_clip_tower(tower: str, transformer: Any) -> dict[str, object]:
    block = transformer.resblocks[0]
    name = type(block.mlp.gelu).__name__
    fields = {
        "width": transformer.width,
        "layers": len(transformer.resblocks),
        "heads": block.attn.num_heads,
        "mlp_width": block.mlp.c_fc.out_features,
        "activation": {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(name, name),
        "layer_norm_eps": block.ln_1.eps,
    }
    return {f"{tower}.transformer.{name}": value for name, value in fields.items()}
