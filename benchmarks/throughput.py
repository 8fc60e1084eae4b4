"""The runtime against transformers (torch, eager), in one run: sentences and pictures to embeddings.

    python benchmarks/throughput.py [vit-b-32] [--json FILE]

Each round runs both once, in turn, so that a drift of the machine meets both; the ratio of each round is taken, and
medians are printed. `tower` starts from token ids or pixels; `end to end` from strings or decoded pictures. Text is
compared with transformers padded to 77 tokens, as CLIP was trained, and padded to the longest of its batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_checkpoint import ARCHITECTURES, make, oracles

import clip_export
from clip_export.encoder import Encoder
from clip_export.tokenizer import Tokens

NOUNS = ("dog", "cat", "house", "tree", "boat", "photo", "picture", "drawing")
WORDS = (*NOUNS, "a", "the", "small", "large", "red", "blue", "green", "wooden", "old", "of", "with", "on", "near")


@dataclass(frozen=True)
class Row:
    """One comparison. Throughputs in inputs per second, ours over theirs as a ratio."""

    what: str
    batch: int
    ours_per_s: float
    theirs_per_s: float
    ratio: float


def captions(count: int) -> list[str]:
    """Sentences of natural length: 10 words on average, about 12 tokens with start and end."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=int(n))) for n in rng.integers(5, 16, count)]


def pictures(count: int) -> list[Image.Image]:
    """Photograph-sized pictures with smooth content."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((640, 480), Image.Resampling.BICUBIC) for array in small]


def compare(what: str, batch: int, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Row:
    """Time both in turn after one warm-up each."""
    ours(), theirs()
    times = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    return Row(what, batch, batch / mine, batch / other, ratio)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def require_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """A comparison of speed means something only where both give the same embeddings."""
    expected = torch.nn.functional.normalize(theirs, dim=1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def image_rows(clip: Encoder, model: torch.nn.Module, processor: Callable[..., dict], rounds: int) -> list[Row]:
    """Image tower and pictures, at batch 1 and 16."""
    rows = []
    assert clip.spec.preprocess is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (clip.spec.preprocess.mean, clip.spec.preprocess.std))
    for batch in (1, 16):
        images = pictures(batch)
        pixels = clip.preprocess(images)
        values = (torch.from_numpy(pixels).float() / 255 - mean) / std

        def tower(values: torch.Tensor = values) -> torch.Tensor:
            return model.visual_projection(model.vision_model(pixel_values=values).pooler_output)

        def end_to_end(images: list[Image.Image] = images) -> torch.Tensor:
            return tower(processor(images, return_tensors="pt")["pixel_values"])

        require_same(clip.encode_pixels(pixels), tower())
        rows.append(compare("image tower", batch, lambda p=pixels: clip.encode_pixels(p), tower, rounds))
        rows.append(compare("picture to embedding", batch, lambda i=images: clip.encode_image(i), end_to_end, rounds))
    return rows


def text_rows(clip: Encoder, model: torch.nn.Module, tokenizer: Callable[..., dict], rounds: int) -> list[Row]:
    """Text tower and sentences, at batch 1, 32 and 256, against two ways of padding."""
    rows = []
    assert clip._tokenizer is not None
    for batch in (1, 32, 256):
        texts = captions(batch)
        tokens: Tokens = clip._tokenizer(texts)
        for padding in ("max_length", "longest"):
            options = {"padding": padding, "max_length": 77, "truncation": True, "return_tensors": "pt"}
            ids = tokenizer(texts, **options)["input_ids"]

            def tower(ids: torch.Tensor = ids) -> torch.Tensor:
                return model.text_projection(model.text_model(input_ids=ids).pooler_output)

            def end_to_end(texts: list[str] = texts, options: dict = options) -> torch.Tensor:
                return tower(tokenizer(texts, **options)["input_ids"])

            require_same(clip.encode_text(texts), end_to_end())
            name = f"padded to {'77' if padding == 'max_length' else 'longest'}"
            rows.append(compare(f"text tower, {name}", batch, lambda t=tokens: clip.token_outputs(t), tower, rounds))
            rows.append(
                compare(
                    f"sentence to embedding, {name}", batch, lambda t=texts: clip.encode_text(t), end_to_end, rounds
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", default="vit-b-32", choices=ARCHITECTURES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint, bundle = Path(folder, "checkpoint"), Path(folder, "bundle")
        checkpoint.mkdir()
        model = make(arguments.architecture, checkpoint)
        clip_export.build(checkpoint, bundle)
        transformers = oracles.transformers()
        tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoint)
        processor = transformers.CLIPImageProcessor.from_pretrained(checkpoint)
        with clip_export.load(bundle) as clip:
            rows = image_rows(clip, model, processor, arguments.rounds)
            rows += text_rows(clip, model, tokenizer, arguments.rounds)
    print(f"{arguments.architecture}, float32, {torch.get_num_threads()} threads, medians of {arguments.rounds} rounds")
    print(f"{'':38} {'batch':>5} {'runtime/s':>10} {'torch/s':>10} {'ratio':>6}")
    for row in rows:
        print(f"{row.what:38} {row.batch:5} {row.ours_per_s:10.1f} {row.theirs_per_s:10.1f} {row.ratio:5.2f}x")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
