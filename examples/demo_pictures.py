"""Write the sample pictures of examples/pictures: eight scenes that the demo checkpoint never saw.

    python examples/demo_pictures.py --out examples/pictures
    python examples/demo_pictures.py --out examples/pictures --check clip_export/demo
    python examples/demo_pictures.py --calibration 256 --out DIRECTORY

One scene for each colour, drawn from the held-out descriptions by the seed alone, whatever the model makes of them.
captions.txt has one caption a line, in the order of the sorted file names.

With --calibration, as many different held-out scenes as asked for instead, small, with captions.jsonl beside them: a
folder of pairs, such as a user has to calibrate 8-bit engines on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from PIL import Image
from scenes import COLOURS, COUNTS, SHAPES, Scene, all_scenes, caption, is_held_out, render

PICTURES = Path("examples/pictures")
PIXELS = 224
CALIBRATION_PIXELS = 128  # twice the side that the demo checkpoint sees: its preprocessing has something to resize


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


def calibration_scenes(count: int, seed: int) -> list[Scene]:
    """`count` different held-out scenes. Raises ValueError where there are fewer."""
    pool = [scene for scene in all_scenes() if is_held_out(scene)]
    if not 1 <= count <= len(pool):
        raise ValueError(f"{count} scenes, expected 1 to {len(pool)}: so many are held out from training")
    return random.Random(f"calibration {seed}").sample(pool, count)


def write_calibration(directory: Path, count: int, seed: int) -> None:
    """Draw `count` scenes as 0000.png and on, and write captions.jsonl: a file and its caption a line."""
    scenes = calibration_scenes(count, seed)
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"calibration captions {seed}")
    lines = []
    for number, scene in enumerate(scenes):
        name = f"{number:04}.png"
        render(scene, seed, CALIBRATION_PIXELS, oversample=2).save(directory / name)
        lines.append(json.dumps({"file": name, "caption": caption(scene, rng)}) + "\n")
    (directory / "captions.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def check(directory: Path, checkpoint: Path) -> bool:
    """Print what the checkpoint makes of the pictures; true when every match is right, both ways."""
    # Here, since writing pictures needs none of them, and they take seconds to import.
    import torch
    import torchvision_shim  # noqa: F401  (before transformers)
    from demo_metrics import embed_ids, embed_images, tokenise
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(checkpoint)
    paths = sorted(directory.glob("*.png"))
    captions = (directory / "captions.txt").read_text(encoding="utf-8").splitlines()
    pixels = processor.image_processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    with torch.no_grad():
        images = embed_images(model, pixels["pixel_values"])
        logits = model.logit_scale.exp() * images @ embed_ids(model, tokenise(processor.tokenizer, captions)).T
    for row, path in zip(logits.softmax(dim=1), paths, strict=True):
        print(f"{path.name:32} {row.max():6.1%}  {captions[int(row.argmax())]}")
    order = torch.arange(len(paths))
    return bool((logits.argmax(dim=1) == order).all() and (logits.argmax(dim=0) == order).all())


def main() -> None:
    """Read the flags, write the pictures, and check them if asked to."""
    parser = argparse.ArgumentParser(description="Write the sample pictures of examples/pictures.")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write, by default {PICTURES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, metavar="DIR", help="match them with this checkpoint; fails on a miss")
    parser.add_argument(
        "--calibration", type=int, metavar="COUNT", help="write this many pairs for calibration instead"
    )
    options = parser.parse_args()
    if options.calibration is not None:
        if options.out is None or options.check:
            parser.error("--calibration needs --out, and does not go with --check")
        try:
            write_calibration(options.out, options.calibration, options.seed)
        except ValueError as error:
            parser.error(str(error))
        return
    out = options.out or PICTURES
    write_pictures(out, options.seed)
    if options.check and not check(out, options.check):
        raise SystemExit("not every picture found its caption")


if __name__ == "__main__":
    main()
