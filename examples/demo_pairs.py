"""Draw the pairs that come with the package: scenes that the demo checkpoint never saw, as a WebDataset.

    python examples/demo_pairs.py --out clip_export/demo/pairs.tar

They differ in count, colour, shape or background, whatever their size and position: so each caption is right for one
picture. The bytes of the JPEG files depend on the version of its codec, which is why the package carries them.
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
from pathlib import Path

from scenes import Scene, all_scenes, caption, is_held_out, render

PIXELS = 128  # twice the side that the demo checkpoint sees: its preprocessing has something to resize
COUNT = 128


def demo_pairs(count: int = COUNT, seed: int = 0) -> list[tuple[Scene, str]]:
    """`count` different held-out scenes, each with its caption. The same for the same seed."""
    rng = random.Random(f"pairs {seed}")
    scenes = [scene for scene in all_scenes() if is_held_out(scene)]
    rng.shuffle(scenes)
    different = {(scene.count, scene.colour, scene.shape, scene.background): scene for scene in scenes}
    return [(scene, caption(scene, rng)) for scene in list(different.values())[:count]]


def write_pairs(path: Path, count: int = COUNT, seed: int = 0) -> None:
    """Draw them and write the archive, the same for the same codec: no times, no owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (scene, text) in enumerate(demo_pairs(count, seed)):
            picture = io.BytesIO()
            render(scene, seed, PIXELS, oversample=2).save(picture, "JPEG", quality=92)
            label = f"{scene.colour} {scene.shape}"
            for suffix, data in (("jpg", picture.getvalue()), ("txt", text.encode()), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def main() -> None:
    """Read the flags and write the archive."""
    parser = argparse.ArgumentParser(description="Draw the demo pairs that come with the package.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    write_pairs(parser.parse_args().out)


if __name__ == "__main__":
    main()
