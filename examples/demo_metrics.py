"""What the demo checkpoint is held to: retrieval and zero-shot naming, on scenes that training never saw.

Recall is counted among groups of 64 scenes with 64 different descriptions; a hit needs the one right caption (or
picture) on top. Zero-shot picks among all 48 (colour, shape) classes by averaged prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision_shim  # noqa: F401  (before transformers)
from scenes import COLOURS, SHAPES, Scene, all_scenes, caption, class_prompts, is_held_out, render
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

GROUP = 64  # scenes in a retrieval group
PIXELS = 224  # side of the pictures the figures are taken on; the model's own processor brings them to its size
CLASSES = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class HeldOut:
    """Groups of held-out scenes: pictures as the checkpoint's processor gives them, captions, class numbers."""

    def __init__(self, processor: CLIPProcessor, groups: int, seed: int) -> None:
        """Draw `groups` * 64 held-out scenes, their renderings and their wordings from `seed`."""
        rng = random.Random(f"held out {seed}")
        pool = [scene for scene in all_scenes() if is_held_out(scene)]
        scenes = [scene for _ in range(groups) for scene in rng.sample(pool, GROUP)]
        self.captions = [caption(scene, rng) for scene in scenes]
        self.classes = torch.tensor([CLASSES.index((scene.colour, scene.shape)) for scene in scenes])
        self.pixels = picture_batch(processor, scenes, seed)


def picture_batch(processor: CLIPProcessor, scenes: Sequence[Scene], seed: int) -> Tensor:
    """Render scenes and preprocess them as a user's pictures would be: float32 (N, 3, side, side)."""
    batches = []
    for start in range(0, len(scenes), GROUP):
        pictures = [render(scene, 1_000_000 * (seed + 1) + start + i, PIXELS) for i, scene in
                    enumerate(scenes[start : start + GROUP])]  # fmt: skip
        batches.append(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
    return torch.cat(batches)


def in_batches(embed: Callable, inputs: Sequence, size: int = 256) -> Tensor:
    """Apply `embed` to slices of the inputs and stack the rows."""
    return torch.cat([embed(inputs[start : start + size]) for start in range(0, len(inputs), size)])


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit image embeddings (N, D) of pixels (N, 3, side, side)."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return normalize(model.visual_projection(pooled), dim=-1)


def embed_ids(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit text embeddings (N, D) of token ids (N, T); rows may end early, padded with the end token.

    Without a mask: attention is causal, and the row is read at its first end token, so padding changes nothing.
    """
    pooled = model.text_model(input_ids=ids).pooler_output
    return normalize(model.text_projection(pooled), dim=-1)


def tokenise(tokenizer: Callable, texts: Sequence[str]) -> Tensor:
    """Token ids (N, T), where T is the longest text's length and never above the context of 77."""
    return tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")["input_ids"]


def class_embeddings(model: CLIPModel, tokenizer: Callable) -> Tensor:
    """One unit embedding (48, D) for each class: the mean of its prompts' embeddings."""
    prompts = [class_prompts(colour, shape) for colour, shape in CLASSES]
    flat = in_batches(lambda texts: embed_ids(model, tokenise(tokenizer, texts)), [p for ps in prompts for p in ps])
    return normalize(flat.reshape(len(prompts), len(prompts[0]), -1).mean(dim=1), dim=-1)


@torch.no_grad()
def measure(model: CLIPModel, tokenizer: Callable, held_out: HeldOut) -> dict[str, float]:
    """The three figures, in percent."""
    model.eval()
    images = in_batches(lambda pixels: embed_images(model, pixels), held_out.pixels)
    texts = in_batches(lambda some: embed_ids(model, tokenise(tokenizer, some)), held_out.captions)
    similarity = images.reshape(-1, GROUP, images.shape[1]) @ texts.reshape(-1, GROUP, texts.shape[1]).mT
    diagonal = torch.arange(GROUP)
    guesses = (images @ class_embeddings(model, tokenizer).T).argmax(dim=1)
    hits = {
        "image_to_text_r1": similarity.argmax(dim=2) == diagonal,
        "text_to_image_r1": similarity.argmax(dim=1) == diagonal,
        "zero_shot": guesses == held_out.classes,
    }
    return {name: round(100 * hit.double().mean().item(), 2) for name, hit in hits.items()}


def evaluate(directory: Path, groups: int = 20, seed: int = 0) -> dict[str, float]:
    """The figures of a saved checkpoint, its half-precision weights widened to float32 for the arithmetic."""
    model = CLIPModel.from_pretrained(directory, dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(directory)
    return measure(model, processor.tokenizer, HeldOut(processor, groups, seed))
