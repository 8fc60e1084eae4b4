"""Write the sample pictures of examples/pictures: eight scenes that the demo checkpoint never saw.

    python examples/demo_pictures.py --out examples/pictures
    python examples/demo_pictures.py --out examples/pictures --check clip_export/demo

One scene for each colour, drawn from the held-out descriptions by the seed alone, whatever the model makes of them.
captions.txt has one caption a line, in the order of the sorted file names.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import torch
import torchvision_shim  # noqa: F401  (before transformers)
from demo_metrics import embed_ids, embed_images, tokenise
from PIL import Image
from scenes import COLOURS, COUNTS, SHAPES, Scene, all_scenes, caption, is_held_out, render
from transformers import CLIPModel, CLIPProcessor

PIXELS = 224


def sample_scenes(seed: int) -> list[Scene]:
    """One held-out scene for each colour; shapes and counts take turns."""
    rng = random.Random(f"pictures {seed}")
    pool = [scene for scene in all_scenes() if is_held_out(scene)]
    shapes, counts = itertools.cycle(SHAPES), itertools.cycle((1, 2, 3, 2))
    chosen = []
    for colour, shape, count in zip(rng.sample(list(COLOURS), len(COLOURS)), shapes, counts, strict=False):
        wanted = (count, shape, colour)
        chosen.append(rng.choice([s for s in pool if (s.count, s.shape, s.colour) == wanted]))
    return chosen


def file_name(number: int, scene: Scene) -> str:
    """For example "3-two-red-stars.png"."""
    noun = scene.shape if scene.count == 1 else SHAPES[scene.shape]
    return f"{number}-{COUNTS[scene.count]}-{scene.colour}-{noun}.png"


def write_pictures(directory: Path, seed: int) -> None:
    """Draw the scenes and write their captions."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"captions {seed}")
    lines = []
    for number, scene in enumerate(sample_scenes(seed), start=1):
        render(scene, seed, PIXELS).save(directory / file_name(number, scene), optimize=True)
        lines.append(caption(scene, rng))
    (directory / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def check(directory: Path, checkpoint: Path) -> bool:
    """Print what the checkpoint makes of the pictures; true when every match is right, both ways."""
    model = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(checkpoint)
    paths = sorted(directory.glob("*.png"))
    captions = (directory / "captions.txt").read_text(encoding="utf-8").splitlines()
    pixels = processor.image_processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    images = embed_images(model, pixels["pixel_values"])
    logits = model.logit_scale.exp() * images @ embed_ids(model, tokenise(processor.tokenizer, captions)).T
    for row, path in zip(logits.softmax(dim=1), paths, strict=True):
        print(f"{path.name:32} {row.max():6.1%}  {captions[int(row.argmax())]}")
    order = torch.arange(len(paths))
    return bool((logits.argmax(dim=1) == order).all() and (logits.argmax(dim=0) == order).all())


def main() -> None:
    """Read the flags, write the pictures, and check them if asked to."""
    parser = argparse.ArgumentParser(description="Write the sample pictures of examples/pictures.")
    parser.add_argument("--out", type=Path, default=Path("examples/pictures"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, metavar="DIR", help="match them with this checkpoint; fails on a miss")
    options = parser.parse_args()
    write_pictures(options.out, options.seed)
    if options.check and not check(options.out, options.check):
        raise SystemExit("not every picture found its caption")


if __name__ == "__main__":
    main()
