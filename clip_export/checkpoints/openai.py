"""OpenAI's .pt files: the TorchScript archives that OpenAI released, and plain state dicts with the same names.

There is no config: the architecture is derived from the shapes as OpenAI's build_model does (clip/model.py), with 64
values a head. Three facts are not in the shapes:

- The activation. An archive names the class of every module, QuickGELU among them. A state dict that carries OpenAI's
  own buffers (input_resolution, context_length, vocab_size) came out of an archive. Any other may as well be LAION's
  GELU weights, which open_clip writes under the same names: there the user has to say.
- The statistics of pictures. All weights with QuickGELU (OpenAI, DFN, MetaCLIP) use CLIP's; some of LAION's with GELU
  do not (ViT-L/14 was trained with 0.5), so that GELU needs a statement about them too.
- The heads of image towers wider than 1024: open_clip's H, g and G have 80, 88 and 104 values a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_export.checkpoints import Checkpoint, Options
from clip_export.checkpoints._clip import MEAN, STD, clip_tokenizer
from clip_export.checkpoints._files import base_name, reject_lfs_pointer, source
from clip_export.checkpoints._openai_layout import recipes, reject_other_families
from clip_export.checkpoints._tensors import StoredTensor, read_tensors
from clip_export.checkpoints._torchscript import is_archive, read_archive
from clip_export.checkpoints._weights import bind, load_finite, scalar
from clip_export.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    UnknownCheckpointError,
    UnsupportedModelError,
    WeightsError,
)
from clip_export.spec import (
    Activation,
    Dialect,
    ImageSpec,
    ModelSpec,
    PreprocessSpec,
    TextSpec,
    TransformerSpec,
    weight_shapes,
)

EXPECTS = "a file (.pt, .pth, .bin, .ckpt or .safetensors) with a TorchScript archive or a state dict in OpenAI's names"

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_DIALECT: dict[bool, Dialect] = {False: "openai", True: "huggingface"}  # by whether Context is wanted: as its tools
_HEAD_WIDTH = 64
_WIDEST = 1024  # the widest image tower with 64 values a head
_FACTS = ("input_resolution", "context_length", "vocab_size")  # buffers of OpenAI's archives; no weights
_BESIDE = (
    "put its open_clip_config.json beside it and name it open_clip_pytorch_model.bin (or open_clip_model.safetensors)"
)

_LAYOUTS = {
    "cond_stage_model.": "Stable Diffusion's single file; build it with --context",
    "conditioner.embedders.": "Stable Diffusion XL's single file; build it with --context",
    "text_model.": "Hugging Face's; put its config.json beside it and name it pytorch_model.bin or model.safetensors",
    "vision_model.": "Hugging Face's; put its config.json beside it and name it pytorch_model.bin or model.safetensors",
}


@dataclass(frozen=True, slots=True)
class _State:
    """A state dict, the prefixes that its keys carry, and the activation where the file says which."""

    tensors: Mapping[str, StoredTensor]
    prefix: str
    text_prefix: str
    activation: Activation | None

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a weight that the architecture is derived from. Raises WeightsError without it."""
        key = self.prefix + name
        if key not in self.tensors:
            raise WeightsError(f"1 missing: {key}", hint="the file may hold only a part of a CLIP model")
        shape = self.tensors[key].shape
        if len(shape) != axes or min(shape) < 1:
            raise WeightsError(f"1 misshapen: {key} is {list(shape)}, expected {axes} axes")
        return shape

    def layers(self, stem: str) -> int:
        """How many blocks there are under `stem`."""
        pattern = re.compile(re.escape(f"{self.prefix}{stem}transformer.resblocks.") + r"(\d+)\.")
        return len({match[1] for key in self.tensors if (match := pattern.match(key))})


def claims(checkpoint: str | Path) -> bool:
    """A weights file that does not belong to a directory of another format."""
    if not isinstance(checkpoint, Path) or not checkpoint.is_file() or checkpoint.suffix.lower() not in _SUFFIXES:
        return False
    from clip_export.checkpoints import huggingface, open_clip

    return not huggingface.claims(checkpoint) and not open_clip.claims(checkpoint)


def read(checkpoint: str | Path, options: Options) -> Checkpoint:
    """Read a file that `claims` said yes to."""
    path = Path(checkpoint)
    state = _read_state(path)
    reject_other_families(state.tensors)
    activation = _activation(path, state, options)
    text, image = _text(state, activation), _image(state, activation)
    _check_facts(state, text, image)
    tokenizer, tokenizer_json = clip_tokenizer(text, options.tokenizer_dialect or _DIALECT[options.context], "argmax")
    spec = ModelSpec(
        text=text,
        image=image,
        tokenizer=tokenizer,
        preprocess=_preprocess(image, options),
        logit_scale=scalar(state.tensors, f"{state.prefix}logit_scale"),
    )
    used = {f"{state.prefix}{name}" for name in ("logit_scale", *_FACTS)}
    made_of = recipes(spec, prefix=state.prefix, text_prefix=state.text_prefix)
    weights = bind(state.tensors, made_of, weight_shapes(spec), used=used)
    name = base_name(path)
    return Checkpoint(
        spec=spec,
        weights=weights,
        tokenizer_json=tokenizer_json,
        source=source("openai", name, path.parent, [path]),
    )


def _read_state(path: Path) -> _State:
    reject_lfs_pointer(path)
    activation: Activation | None = None
    if is_archive(path):
        archive = read_archive(path)
        tensors, activation = archive.tensors, _activation_of(archive.classes)
    else:
        tensors = read_tensors([path])
    # Data-parallel training puts "module." before every key.
    prefix = "module." if tensors and all(key.startswith("module.") for key in tensors) else ""
    if f"{prefix}logit_scale" not in tensors or not any(key.startswith(f"{prefix}visual.") for key in tensors):
        raise _not_openai(path, tensors)
    if activation is None and all(f"{prefix}{fact}" in tensors for fact in _FACTS):
        activation = "quick_gelu"  # these buffers exist in OpenAI's archives alone, and all of those use it
    text_prefix = "text." if f"{prefix}text.text_projection" in tensors else ""
    return _State(tensors, prefix, text_prefix, activation)


def _not_openai(path: Path, tensors: Mapping[str, StoredTensor]) -> CheckpointError:
    keys = list(tensors)
    for part, layout in _LAYOUTS.items():
        found = next((key for key in keys if part in key), None)
        if found is not None:
            names, _, remedy = layout.partition("; ")
            return UnknownCheckpointError(f"{path.name}: the names are {names} (weight {found})", hint=remedy)
    shown = ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
    return UnknownCheckpointError(
        f"{path.name}: expected OpenAI's names, such as visual.conv1.weight and logit_scale; found {shown}"
    )


def _activation_of(classes: Mapping[str, str]) -> Activation | None:
    """The activation from the class of the modules called `gelu`, one in each block; None unless all agree."""
    found = {classes[name] for name in classes if name.endswith(".mlp.gelu")}
    if found == {"QuickGELU"}:
        return "quick_gelu"
    return "gelu" if found == {"GELU"} else None


def _activation(path: Path, state: _State, options: Options) -> Activation:
    activation = options.activation or state.activation
    if activation is None:
        raise AmbiguousCheckpointError(
            f"{path.name}: weights alone do not say whether the model uses QuickGELU or GELU, and the wrong one gives "
            "wrong embeddings without an error",
            hint="state --activation quick_gelu for OpenAI's, DFN's or MetaCLIP's weights, or --activation gelu "
            f"--preprocess-dialect openai for LAION's; or {_BESIDE}",
        )
    if activation == "gelu" and options.preprocess_dialect is None and options.wants("image"):
        raise AmbiguousCheckpointError(
            f"{path.name}: GELU weights were trained with different picture statistics (CLIP's, or 0.5), and the file "
            "does not say which",
            hint=f"state --preprocess-dialect openai if they are CLIP's; or {_BESIDE}",
        )
    return activation


def _text(state: _State, activation: Activation) -> TextSpec:
    stem = state.text_prefix
    context_length, _ = state.shape(f"{stem}positional_embedding", 2)
    vocab_size, width = state.shape(f"{stem}token_embedding.weight", 2)
    return TextSpec(
        transformer=_transformer(state, stem, width, activation),
        vocab_size=vocab_size,
        context_length=context_length,
        embedding_dim=state.shape(f"{stem}text_projection", 2)[1],
    )


def _image(state: _State, activation: Activation) -> ImageSpec:
    width, _, _, patch_size = state.shape("visual.conv1.weight", 4)
    if width > _WIDEST:
        raise AmbiguousCheckpointError(
            f"the image tower is {width} wide: OpenAI's widest is {_WIDEST}, and beyond it weights alone do not say "
            "how many heads there are",
            hint=_BESIDE,
        )
    positions, _ = state.shape("visual.positional_embedding", 2)
    side = round((positions - 1) ** 0.5)
    if side * side + 1 != positions:
        raise UnsupportedModelError(
            f"visual.positional_embedding has {positions} positions, expected a square of patches and a class token"
        )
    return ImageSpec(
        transformer=_transformer(state, "visual.", width, activation),
        image_size=side * patch_size,
        patch_size=patch_size,
        embedding_dim=state.shape("visual.proj", 2)[1],
    )


def _transformer(state: _State, stem: str, width: int, activation: Activation) -> TransformerSpec:
    if width % _HEAD_WIDTH:
        raise UnsupportedModelError(f"{stem}transformer is {width} wide, expected a multiple of {_HEAD_WIDTH}")
    return TransformerSpec(
        width=width,
        layers=state.layers(stem),
        heads=width // _HEAD_WIDTH,
        mlp_width=state.shape(f"{stem}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        activation=activation,
    )


def _check_facts(state: _State, text: TextSpec, image: ImageSpec) -> None:
    """Compare OpenAI's own buffers, where they are, with what the shapes say."""
    derived = dict(zip(_FACTS, (image.image_size, text.context_length, text.vocab_size), strict=True))
    for name, value in derived.items():
        tensor = state.tensors.get(state.prefix + name)
        if tensor is None:
            continue
        if tensor.shape not in ((), (1,)) or (stated := int(load_finite(name, tensor).item())) != value:
            found = stated if tensor.shape in ((), (1,)) else list(tensor.shape)
            raise CheckpointError(f"the buffer {name} says {found}, the shapes of the weights say {value}")


def _preprocess(image: ImageSpec, options: Options) -> PreprocessSpec:
    """CLIP's own: short side to the image size, centre crop, bicubic (clip/clip.py, _transform)."""
    return PreprocessSpec(
        dialect=options.preprocess_dialect or "openai",
        resize_mode="shortest",
        resize_size=image.image_size,
        crop_size=image.image_size,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
    )
