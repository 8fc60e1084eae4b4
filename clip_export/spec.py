"""What a CLIP model means, apart from its weights: frozen dataclasses on the standard library alone.

A reader in `checkpoints/` fills a `ModelSpec` once; from then on it is carried in the bundle's manifest and nothing is
guessed again. `weight_shapes` gives the canonical weight names: they are the names of the torch towers' state dicts,
with the tower in front.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from clip_export.errors import SpecError

Tower = Literal["text", "image"]
Activation = Literal["quick_gelu", "gelu"]
Dialect = Literal["openai", "open_clip", "huggingface"]
Pooling = Literal["argmax", "first_end"]
ResizeMode = Literal["shortest", "longest", "squash"]
Transparency = Literal["drop", "white"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Shape = tuple[int, ...]
Family = Literal["clip", "sd1", "sd2", "sdxl", "sdxl_refiner", "sd3"]

TOWERS: tuple[Tower, ...] = ("text", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSpec:
    """A stack of pre-norm transformer blocks. `width` must be a multiple of `heads`."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require(min(self.width, self.layers, self.heads, self.mlp_width) > 0, "transformer sizes must be positive")
        _require(self.width % self.heads == 0, f"width {self.width} is not a multiple of {self.heads} heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """The text tower. `embedding_dim` is None where the checkpoint has no projection (Stable Diffusion's encoder)."""

    transformer: TransformerSpec
    vocab_size: int
    context_length: int
    embedding_dim: int | None
    causal: bool = True

    def __post_init__(self) -> None:
        _require(self.vocab_size > 0 and self.context_length > 1, "vocab_size and context_length must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """The image tower, a ViT with a class token. `image_size` and `patch_size` in pixels, both sides equal.

    An image size that is no multiple of the patch size loses the margin on the right and below, as the originals do.
    """

    transformer: TransformerSpec
    image_size: int
    patch_size: int
    embedding_dim: int | None

    def __post_init__(self) -> None:
        _require(0 < self.patch_size <= self.image_size, "patch_size must be between 1 and image_size")

    @property
    def tokens(self) -> int:
        """Patches plus the class token."""
        side = self.image_size // self.patch_size
        return side * side + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Whose tokenizer is matched, and the rules around it.

    `pooling` says which position is the end of text: `argmax` the first highest id (OpenAI, legacy Hugging Face
    configs), `first_end` the first `end_id`. They differ once ids above `end_id` exist.
    `truncate` is the dialect's default for text that does not fit: cut it as the original does, or raise.
    """

    dialect: Dialect
    context_length: int
    start_id: int
    end_id: int
    pad_id: int
    pooling: Pooling
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSpec:
    """Whose preprocessing is matched, and its constants.

    `resize_size` is the short side after `shortest`, the long side after `longest` (open_clip alone has it), or both
    sides after `squash`; `crop_size` is both sides of what the image tower takes, in pixels. `mean` and `std` are per
    RGB channel, on the 0..1 scale. `fill` is the level that `longest` pads with.
    `transparency` says what becomes of an alpha channel: `drop` it, or blend the image onto `white`. None takes the
    dialect's own rule, so a spec that was built always names one of the two.
    """

    dialect: Dialect
    resize_mode: ResizeMode
    resize_size: int
    crop_size: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: int = 0
    transparency: Transparency | None = None

    def __post_init__(self) -> None:
        huggingface = self.dialect == "huggingface"
        if self.transparency is None:
            object.__setattr__(self, "transparency", "white" if huggingface else "drop")
        _require(huggingface or self.transparency == "drop", f"the {self.dialect} dialect drops transparency")
        _require(self.resize_mode != "longest" or self.dialect == "open_clip", "only open_clip resizes the long side")
        _require(0 <= self.fill <= 255, f"fill must be between 0 and 255, found {self.fill}")
        _require(self.resize_size > 0 and self.crop_size > 0, "resize_size and crop_size must be positive")
        _require(all(s > 0 for s in self.std), f"std must be positive, found {self.std}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSpec:
    """What the text tower is to a diffusion model, for those that give Context.

    `family` is whose rules hold: which layer is taken, and whether the final LayerNorm is applied to it.
    `missing_blocks` is how many blocks at the end of that family's encoder the checkpoint does not have, as in Stable
    Diffusion 2 in diffusers' layout, which has 23 of 24: layers are counted from the end of the whole. `second` says
    that there is another encoder, whose hidden states are joined to these. `zero_negative` is what diffusers calls
    force_zeros_for_empty_prompt.
    """

    family: Family
    missing_blocks: int = 0
    second: bool = False
    zero_negative: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.missing_blocks < 8, f"missing_blocks must be from 0 to 7, found {self.missing_blocks}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One CLIP model. A tower that the checkpoint does not have is None, and what serves it is None with it.

    `logit_scale` is the logarithm of the factor on the cosine, as CLIP stores it; `logit_bias` is None for CLIP.
    `context` is there where the text graph gives Context: the hidden states of any layer, of all positions.
    """

    text: TextSpec | None
    image: ImageSpec | None
    tokenizer: TokenizerSpec | None
    preprocess: PreprocessSpec | None
    logit_scale: float | None = None
    logit_bias: float | None = None
    context: ContextSpec | None = None

    def __post_init__(self) -> None:
        _require(self.context is None or self.text is not None, "Context comes from a text tower, and there is none")
        _require(self.context is None or (self.text is not None and self.text.causal), "Context needs a causal tower")
        _require(self.text is not None or self.image is not None, "a model needs a text or an image tower")
        scale = self.logit_scale
        _require(scale is None or -50 < scale < 50, f"logit_scale is a logarithm, expected within 50, found {scale}")
        if self.text is not None and self.tokenizer is not None:
            lengths = self.text.context_length, self.tokenizer.context_length
            _require(
                lengths[0] == lengths[1], f"the text tower takes {lengths[0]} tokens, the tokenizer gives {lengths[1]}"
            )
        if self.image is not None and self.preprocess is not None:
            sizes = self.image.image_size, self.preprocess.crop_size
            _require(
                sizes[0] == sizes[1], f"the image tower takes {sizes[0]} pixels a side, preprocessing gives {sizes[1]}"
            )
        _require((self.text is None) == (self.tokenizer is None), "a text tower and a tokenizer go together")
        _require((self.image is None) == (self.preprocess is None), "an image tower and preprocessing go together")

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers that this model has, text first."""
        return tuple(tower for tower in TOWERS if getattr(self, tower) is not None)

    def select(self, towers: typing.Iterable[Tower]) -> ModelSpec:
        """The same model with only these towers. Raises SpecError for one that it does not have."""
        wanted = set(towers)
        missing = sorted(wanted - set(self.towers))
        _require(not missing, f"this checkpoint has no {' and no '.join(missing)} tower, only {', '.join(self.towers)}")
        return dataclasses.replace(
            self,
            text=self.text if "text" in wanted else None,
            tokenizer=self.tokenizer if "text" in wanted else None,
            context=self.context if "text" in wanted else None,
            image=self.image if "image" in wanted else None,
            preprocess=self.preprocess if "image" in wanted else None,
        )


def weight_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Canonical name -> shape of every weight that `spec` needs. Linear weights are [out, in], as in torch."""
    shapes: dict[str, Shape] = {}
    if spec.text is not None:
        shapes |= {f"text.{name}": shape for name, shape in _text_shapes(spec.text).items()}
    if spec.image is not None:
        shapes |= {f"image.{name}": shape for name, shape in _image_shapes(spec.image).items()}
    return shapes


def _text_shapes(text: TextSpec) -> dict[str, Shape]:
    width = text.transformer.width
    shapes: dict[str, Shape] = {
        "token_embedding.weight": (text.vocab_size, width),
        "positional_embedding": (text.context_length, width),
        **_block_shapes(text.transformer),
        "final_norm.weight": (width,),
        "final_norm.bias": (width,),
    }
    if text.embedding_dim is not None:
        shapes["projection.weight"] = (text.embedding_dim, width)
    return shapes


def _image_shapes(image: ImageSpec) -> dict[str, Shape]:
    width = image.transformer.width
    shapes: dict[str, Shape] = {
        "class_embedding": (width,),
        "patch_embedding.weight": (width, 3, image.patch_size, image.patch_size),
        "positional_embedding": (image.tokens, width),
        "pre_norm.weight": (width,),
        "pre_norm.bias": (width,),
        **_block_shapes(image.transformer),
        "post_norm.weight": (width,),
        "post_norm.bias": (width,),
    }
    if image.embedding_dim is not None:
        shapes["projection.weight"] = (image.embedding_dim, width)
    return shapes


def _block_shapes(transformer: TransformerSpec) -> dict[str, Shape]:
    width, mlp_width = transformer.width, transformer.mlp_width
    block: dict[str, Shape] = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attention.qkv.weight": (3 * width, width),  # rows: all of q, then all of k, then all of v
        "attention.qkv.bias": (3 * width,),
        "attention.out.weight": (width, width),
        "attention.out.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (mlp_width, width),
        "mlp.fc1.bias": (mlp_width,),
        "mlp.fc2.weight": (width, mlp_width),
        "mlp.fc2.bias": (width,),
    }
    return {f"blocks.{i}.{name}": shape for i in range(transformer.layers) for name, shape in block.items()}


T = TypeVar("T")


def to_dict(spec: object) -> dict[str, Any]:
    """A spec as plain JSON-ready dicts; the inverse of `from_dict`."""
    return dataclasses.asdict(spec)  # type: ignore[call-overload, no-any-return]


def from_dict(cls: type[T], data: object, *, where: str = "spec") -> T:
    """Build a spec dataclass from JSON data; unknown, missing and mistyped keys raise SpecError naming `where`."""
    _require(isinstance(data, dict), f"{where}: expected an object, found {type(data).__name__}")
    assert isinstance(data, dict)
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in data if key not in known)
    _require(not unknown, f"{where}: unknown key {', '.join(unknown)} (known: {', '.join(known)})")
    optional = {name for name, field in known.items() if field.default is not dataclasses.MISSING}
    missing = sorted(known.keys() - data.keys() - optional)
    _require(not missing, f"{where}: missing key {', '.join(missing)}")
    return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            _require(type(None) in args, f"{where}: must not be null")
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where=where)
    if origin is tuple:
        return _tuple(args, value, where)
    if origin is dict:
        return _dict(args, value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        _require(value in choices, f"{where}: {value!r} is not one of {', '.join(map(str, choices))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _require(exact, f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def _dict(args: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    _require(isinstance(value, dict), f"{where}: expected an object, found {type(value).__name__}")
    return {_scalar(args[0], key, where): _value(args[1], item, f"{where}.{key}") for key, item in value.items()}


def _tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """`tuple[X, ...]` of any length, or `tuple[X, Y, Z]` of exactly that many values."""
    _require(isinstance(value, (list, tuple)), f"{where}: expected a list, found {type(value).__name__}")
    hints = (args[0],) * len(value) if args[-1] is Ellipsis else args
    _require(len(value) == len(hints), f"{where}: expected {len(hints)} values")
    return tuple(_value(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)
