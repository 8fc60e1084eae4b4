"""Texts and images in, embeddings out, over any two engines that take and give arrays.

The compiled engines of a bundle and the torch towers of the reference run behind this same class, so that comparing
them compares the engines and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from clip_export.backends.device_array import is_device_array
from clip_export.context import Context, encode_context, read_embeddings
from clip_export.context.inversion import for_encoder
from clip_export.context.units import Unit
from clip_export.errors import ImageError, InputError
from clip_export.plans import NORMALIZED
from clip_export.preprocess import ImageInput, Preprocessor, as_list
from clip_export.spec import ModelSpec, Tower
from clip_export.tokenizer import Tokenizer, Tokens, clip_tokenizer_json

if TYPE_CHECKING:
    from clip_export.backends.device_array import DeviceArray

Floats: TypeAlias = npt.NDArray[np.float32]
Run: TypeAlias = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

DEFAULT_BATCH_SIZE = 32
CLIP_END_ID = 49407  # of CLIP's own vocabulary


@dataclass(frozen=True, slots=True)
class OnDevice:
    """How a tower runs without its results leaving the GPU: `run(feeds, outputs=names)`, for any of `outputs`."""

    run: Callable[..., Mapping[str, DeviceArray]]
    outputs: tuple[str, ...]


class Encoder:
    """Both towers of one CLIP model, or one of them. Safe to share by threads.

    `run_text` takes input_ids int32 [batch, sequence] and eot_index int32 [batch]; `run_image` takes pixels uint8
    [batch, 3, height, width]. `trim` says that a text batch may be cut after its longest end token, which changes
    nothing for a causal tower and saves most of the work on captions; `trim_step` that the length left is a multiple of
    it, so that an engine which prepares for each shape meets few of them. `on_device` are the towers whose engines can
    leave embeddings on a GPU. `engine` says what runs it, as in "onnxruntime, cpu". `trim_embeddings` is `trim` for
    those alone who ask for nothing but embeddings; `second` the other text encoder of a model that has two.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        run_text: Run | None = None,
        run_image: Run | None = None,
        on_device: Mapping[Tower, OnDevice] | None = None,
        tokenizer: Tokenizer | None = None,
        preprocessor: Preprocessor | None = None,
        trim: bool = False,
        trim_embeddings: bool = False,
        trim_step: int = 1,
        batch_size: int = DEFAULT_BATCH_SIZE,
        close: Callable[[], None] | None = None,
        engine: str = "",
        second: Encoder | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"expected a batch size of at least 1, found {batch_size!r}", hint="32 is the default")
        self.spec = spec
        self.batch_size = batch_size
        self.engine = engine
        self._run: dict[Tower, Run | None] = {"text": run_text, "image": run_image}
        self._on_device = on_device or {}
        self._tokenizer = tokenizer
        self._preprocessor = preprocessor
        self.second = second
        self._open_clip: Tokenizer | None = None
        self._trim = trim
        self._trim_embeddings = trim or trim_embeddings
        self._trim_step = trim_step
        self._close = close

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers that this encoder runs."""
        return tuple(tower for tower, run in self._run.items() if run is not None)

    def tokenize(self, texts: Sequence[str], *, truncate: bool | None = None) -> npt.NDArray[np.int32]:
        """Token ids, int32 [n, context_length], padded as the dialect pads. Raises TextError."""
        input_ids: npt.NDArray[np.int32] = self._tokens(texts, truncate).input_ids
        return input_ids

    def preprocess(self, images: Sequence[ImageInput]) -> npt.NDArray[np.uint8]:
        """The pixels before normalization, uint8 [n, 3, height, width], RGB. Raises ImageError."""
        if self._preprocessor is None:
            raise _no_tower("image")
        return self._preprocessor(images)

    @overload
    def encode_text(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool | None = None,
        device_output: Literal[False] = False,
    ) -> Floats: ...

    @overload
    def encode_text(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool | None = None,
        device_output: Literal[True],
    ) -> DeviceArray: ...

    def encode_text(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool | None = None,
        device_output: bool = False,
    ) -> Floats | DeviceArray:
        """Embeddings of `texts`, float32 [n, embedding_dim], each of length 1 unless `normalize` is False.

        `truncate` cuts what is longer than the context as the original does; None is the dialect's default.
        `device_output` leaves them on the GPU: a DeviceArray, for DLPack. Raises TextError naming the text, InputError
        where the bundle was built without embeddings or where no engine of a GPU runs it.
        """
        tokens = self._tokens(texts, truncate)
        if not device_output:
            return self._embedding("text", self.token_outputs(tokens, only="embedding"), normalize)
        length = self._length(tokens, slice(None), self._trim_embeddings)
        feeds = {"input_ids": np.ascontiguousarray(tokens.input_ids[:, :length]), "eot_index": tokens.eot_index}
        return self._left_on_device("text", feeds, normalize)

    @overload
    def encode_image(
        self, images: Sequence[ImageInput], *, normalize: bool = True, device_output: Literal[False] = False
    ) -> Floats: ...

    @overload
    def encode_image(
        self, images: Sequence[ImageInput], *, normalize: bool = True, device_output: Literal[True]
    ) -> DeviceArray: ...

    def encode_image(
        self, images: Sequence[ImageInput], *, normalize: bool = True, device_output: bool = False
    ) -> Floats | DeviceArray:
        """Embeddings of `images`, float32 [n, embedding_dim], each of length 1 unless `normalize` is False.

        An image is a path, the bytes of an image file, a PIL image, or a uint8 array [height, width, 3].
        `device_output` leaves them on the GPU: a DeviceArray, for DLPack. Raises ImageError naming the image,
        InputError where the bundle was built without embeddings or where no engine of a GPU runs it.
        """
        if device_output:
            return self._left_on_device("image", {"pixels": self.preprocess(images)}, normalize)
        return self._embedding("image", self.image_outputs(images), normalize)

    @overload
    def encode_pixels(
        self, pixels: Any, *, normalize: bool = True, device_output: Literal[False] = False
    ) -> Floats: ...

    @overload
    def encode_pixels(self, pixels: Any, *, normalize: bool = True, device_output: Literal[True]) -> DeviceArray: ...

    def encode_pixels(
        self, pixels: Any, *, normalize: bool = True, device_output: bool = False
    ) -> Floats | DeviceArray:
        """Like `encode_image`, from what `preprocess` gives: uint8 [n, 3, height, width].

        They may lie on the GPU already, in an array of any library that has DLPack or __cuda_array_interface__.
        """
        there = is_device_array(pixels)
        if not there and not device_output:
            return self._embedding("image", self.pixel_outputs(pixels), normalize)
        feeds = {"pixels": pixels if there else self._checked_pixels(pixels)}
        if device_output:
            return self._left_on_device("image", feeds, normalize)
        embedding = self._left_on_device("image", feeds, False).numpy()
        return _normalized(embedding) if normalize else embedding

    def similarity(self, images: Sequence[ImageInput], texts: Sequence[str]) -> Floats:
        """exp(logit_scale) * cosine (+ logit_bias), float32 [n_images, n_texts]: CLIP's logits per image."""
        cosine = self.encode_image(images) @ self.encode_text(texts).T
        return cosine * np.float32(self.logit_factor) + np.float32(self.spec.logit_bias or 0.0)

    @property
    def logit_factor(self) -> float:
        """exp(logit_scale), the factor on the cosine. Raises InputError where the checkpoint had none."""
        if self.spec.logit_scale is None:
            raise InputError(
                "this bundle has no logit scale: its checkpoint held a single tower",
                hint="multiply the embeddings of encode_text and encode_image yourself",
            )
        return math.exp(self.spec.logit_scale)

    def text_outputs(self, texts: Sequence[str], *, truncate: bool | None = None) -> dict[str, Floats]:
        """Everything that the text graph gives, by output name, in the order of `texts`.

        embedding [n, embedding_dim] and pooled [n, width] as they leave the tower, not normalized; hidden_states
        [n, context_length, width], always all positions.
        """
        return self.token_outputs(self._tokens(texts, truncate))

    def token_outputs(
        self, tokens: Tokens, *, only: str | None = None, more: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Floats]:
        """Like `text_outputs`, from token ids. `only` is the one output that is wanted, of those that trimming leaves
        as they are; `more` are inputs [n, ...] of a graph that takes more than ids, which is then given whole rows."""
        run, further = self._runner("text"), more or {}
        trim = not further and (self._trim if only is None else self._trim_embeddings)

        def outputs(rows: np.ndarray, length: int) -> Mapping[str, np.ndarray]:
            ids = {"input_ids": _block(tokens.input_ids, rows, length), "eot_index": tokens.eot_index[rows]}
            found = run({**ids, **{name: array[rows] for name, array in further.items()}})
            if only is None:
                return found
            if only not in found:
                raise _no_embedding("text", found)
            return {only: found[only]}

        batches = ((rows, outputs(rows, length)) for rows, length in self._text_batches(tokens, trim))
        return self._collect("text", len(tokens.input_ids), batches)

    def context(
        self,
        prompts: Sequence[str],
        *,
        negative: Sequence[str | None] | None = None,
        clip_skip: str | None = None,
        dialect: str = "diffusers",
        embeddings: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]] = (),
    ) -> Context:
        """What a diffusion model is given for `prompts`, as `dialect` has it: diffusers, comfyui, a1111 or compel.

        `negative` are as many prompts, None for one that is not given; `clip_skip` is last, penultimate, last-2, or a
        tool's own number with its name (comfyui:-2, diffusers:1, a1111:2), by default what the model was trained with;
        `embeddings` are files of textual inversion, named by their stems or by the keys of a mapping.

        Raises InputError, which names it, for what cannot be read or is not there, and where the bundle was built
        without --context.
        """
        given = read_embeddings(embeddings) if embeddings else {}
        encoders = [self] if self.second is None else [self, self.second]
        units = [encoder.as_unit(number, len(encoders), given) for number, encoder in enumerate(encoders)]
        runs = [encoder.run_rows for encoder in encoders]
        return encode_context(units, runs, prompts, negative=negative, clip_skip=clip_skip, dialect=dialect)

    def as_unit(self, number: int, encoders: int, embeddings: Mapping[str, Mapping[str, Floats]]) -> Unit:
        """This encoder as a dialect of prompts sees it. Raises InputError where it gives no Context."""
        spec = self.spec
        if spec.context is None or spec.text is None or spec.tokenizer is None or self._tokenizer is None:
            hint = "build it again with: clip-export build CHECKPOINT --context"
            raise InputError("this bundle gives embeddings, and no Context", hint=hint)
        sizes = {
            "encoders": encoders,
            "width": spec.text.transformer.width,
            "first_id": spec.text.vocab_size,
            "room": spec.text.context_length - 2,
        }
        return Unit(
            number=number,
            text=spec.text,
            tokenizer=spec.tokenizer,
            context=spec.context,
            ids=self._tokenizer.ids,
            a1111_ids=self._a1111_tokenizer(number).ids,
            word=self._tokenizer.word,
            embeddings=for_encoder(embeddings, number, family=spec.context.family, **sizes),
        )

    def run_rows(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The text graph on rows of its five inputs, in batches; every output of every position."""
        more = {name: feeds[name] for name in ("layer", "attention_mask", "inputs_embeds")}
        return self.token_outputs(Tokens(feeds["input_ids"], feeds["eot_index"]), more=more)

    def _a1111_tokenizer(self, number: int) -> Tokenizer:
        """AUTOMATIC1111 has open_clip's tokenizer before OpenCLIP's encoders, where others have Hugging Face's."""
        assert self._tokenizer is not None and self.spec.context is not None
        family, spec = self.spec.context.family, self._tokenizer.spec
        openclip = family in ("sd2", "sdxl_refiner") or (family == "sdxl" and number == 1)
        if not openclip or spec.dialect == "open_clip" or spec.end_id != CLIP_END_ID:
            return self._tokenizer
        if self._open_clip is None:
            own = dataclasses.replace(spec, dialect="open_clip", truncate=True)
            self._open_clip = Tokenizer(own, clip_tokenizer_json("open_clip"))
        return self._open_clip

    def image_outputs(self, images: Sequence[ImageInput]) -> dict[str, Floats]:
        """Everything that the image graph gives, by output name.

        embedding [n, embedding_dim] and pooled [n, width] as they leave the tower, not normalized; hidden_states
        [n, 1 + patches, width].
        """
        run, preprocessor = self._runner("image"), self._preprocessor
        assert preprocessor is not None
        items = as_list(images)
        batches = (
            (rows, run({"pixels": preprocessor(items[rows], first_index=rows.start)}))
            for rows in self._chunks(len(items))
        )
        return self._collect("image", len(items), batches)

    def pixel_outputs(self, pixels: npt.NDArray[np.uint8]) -> dict[str, Floats]:
        """Like `image_outputs`, from pixels uint8 [n, 3, height, width]. Raises ImageError for any other array."""
        run, pixels = self._runner("image"), self._checked_pixels(pixels)
        batches = ((rows, run({"pixels": pixels[rows]})) for rows in self._chunks(len(pixels)))
        return self._collect("image", len(pixels), batches)

    def _checked_pixels(self, pixels: Any) -> npt.NDArray[np.uint8]:
        self._runner("image")
        assert self.spec.preprocess is not None
        expected = (3, self.spec.preprocess.crop_size, self.spec.preprocess.crop_size)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
            found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise ImageError(
                f"expected pixels uint8 [n, {', '.join(map(str, expected))}], found {found}",
                hint="preprocess(images) makes them",
            )
        return pixels

    def close(self) -> None:
        """Free the engines. An encoder that is closed raises BackendError when it is used."""
        if self._close is not None:
            self._close()
        if self.second is not None:
            self.second.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tokens(self, texts: Sequence[str], truncate: bool | None) -> Tokens:
        if self._tokenizer is None:
            raise _no_tower("text")
        return self._tokenizer(texts, truncate=truncate)

    def _chunks(self, count: int) -> Iterator[slice]:
        return (slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size))

    def _text_batches(self, tokens: Tokens, trim: bool) -> Iterator[tuple[np.ndarray, int]]:
        """(rows, sequence length) of each batch: texts of like length together, so that little is padded."""
        order = np.argsort(tokens.eot_index, kind="stable") if trim else np.arange(len(tokens.eot_index))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield rows, self._length(tokens, rows, trim)

    def _length(self, tokens: Tokens, rows: np.ndarray | slice, trim: bool) -> int:
        """How much of the context the engine gets for `rows`."""
        context_length = tokens.input_ids.shape[1]
        if not trim:
            return int(context_length)
        longest = int(tokens.eot_index[rows].max(initial=0)) + 1
        return int(min(context_length, -(-longest // self._trim_step) * self._trim_step))

    def _collect(
        self, tower: Tower, count: int, batches: Iterator[tuple[np.ndarray | slice, Mapping[str, np.ndarray]]]
    ) -> dict[str, Floats]:
        """Put the outputs of batches back in the order given."""
        results: dict[str, Floats] = {}
        for rows, outputs in batches:
            for name, array in outputs.items():
                if name not in results:
                    results[name] = np.empty((count, *array.shape[1:]), dtype=np.float32)
                results[name][rows] = array
        return results if count else self._empty(tower)

    def _empty(self, tower: Tower) -> dict[str, Floats]:
        tower_spec = self.spec.text if tower == "text" else self.spec.image
        assert tower_spec is not None
        dim = tower_spec.embedding_dim
        return {} if dim is None else {"embedding": np.empty((0, dim), dtype=np.float32)}

    def _embedding(self, tower: Tower, outputs: Mapping[str, Floats], normalize: bool) -> Floats:
        if "embedding" not in outputs:
            raise _no_embedding(tower, outputs)
        embedding = outputs["embedding"]
        return _normalized(embedding) if normalize else embedding

    def _left_on_device(self, tower: Tower, feeds: Mapping[str, Any], normalize: bool) -> DeviceArray:
        self._runner(tower)
        engine, name = self._on_device.get(tower), NORMALIZED if normalize else "embedding"
        if engine is None:
            raise InputError(
                f"the engine of the {tower} tower runs on the CPU and can neither take nor leave arrays on a GPU",
                hint="load the bundle with backend tensorrt or tensorrt-rtx, or onnxruntime on device cuda:0",
            )
        if name not in engine.outputs:
            found = f"the {tower} engine can leave {', '.join(engine.outputs)} on the GPU, and not {name!r}"
            hint = "pass normalize=False" if "embedding" in engine.outputs else "build with --outputs embedding"
            raise InputError(found, hint=hint)
        if any(array.shape[0] == 0 for array in feeds.values() if isinstance(array, np.ndarray)):
            raise InputError(f"expected at least one {tower} for device_output, found none")
        return engine.run(feeds, outputs=(name,))[name]

    def _runner(self, tower: Tower) -> Run:
        run = self._run[tower]
        if run is None:
            raise _no_tower(tower)
        return run


def _block(input_ids: npt.NDArray[np.int32], rows: np.ndarray, length: int) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(input_ids[rows, :length])


def _normalized(embedding: Floats) -> Floats:
    """Rows divided by their length; the sum of squares in float64, so that no range is lost."""
    length = np.sqrt(np.square(embedding, dtype=np.float64).sum(axis=1, keepdims=True))
    normalized: Floats = (embedding / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
    return normalized


def _no_embedding(tower: Tower, outputs: Mapping[str, object]) -> InputError:
    return InputError(
        f"the {tower} graph gives {', '.join(outputs) or 'nothing'}, and no embedding",
        hint=f"call {tower}_outputs(), or build the bundle again with --outputs embedding",
    )


def _no_tower(tower: Tower) -> InputError:
    return InputError(f"this bundle has no {tower} tower", hint=f"build it again with --towers {tower}")
