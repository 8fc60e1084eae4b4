"""The C++ runtime beside Python: tokens and resizes a second on one core, start-up, sizes.

    python benchmarks/cpp.py [BUILD]      # a Release build of cpp/, by default build

Both sides take turns in every round; figures are medians, ratios are what to trust on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
from cpp_made import Cpp  # noqa: E402

from clip_export.bundle import Bundle  # noqa: E402
from clip_export.preprocess import Preprocessor  # noqa: E402
from clip_export.spec import PreprocessSpec, TokenizerSpec  # noqa: E402
from clip_export.tokenizer import Tokenizer, clip_tokenizer_json  # noqa: E402

ROUNDS = 7
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "red",
    "circle",
    "and",
    "two",
    "black",
    "squares",
    "on",
    "an",
    "old",
    "wooden",
    "table",
    "near",
    "window",
    "light",
    "bicycle",
    "mountain",
]


def seconds(work: Callable[[], object]) -> float:
    """Processor time of this process for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(title: str, count: int, python: Callable[[], object], cpp: Callable[[], object]) -> None:
    """One line: both rates, and the median of the rounds' ratios."""
    rounds = [(seconds(python), seconds(cpp)) for _ in range(ROUNDS + 1)][1:]
    slow, fast = (statistics.median(values) for values in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    print(f"{title:<44} {count / slow:>10,.0f} {count / fast:>10,.0f} {ratio:>7.1f} x")


def tokens(cpp: Cpp) -> None:
    """Captions a second, plain ones and such as need cleaning."""
    draw = np.random.default_rng(0)
    plain = [" ".join(draw.choice(WORDS, 9)) for _ in range(4000)]
    web = [f"{text} — “café” &amp; more" if row % 3 == 0 else text for row, text in enumerate(plain)]
    spec = TokenizerSpec(
        dialect="openai", context_length=77, start_id=49406, end_id=49407, pad_id=0, pooling="argmax", truncate=True
    )
    json = clip_tokenizer_json("openai")
    python, ours = Tokenizer(spec, json), cpp.tokenizer(spec, json)
    for title, texts in (("captions a second, plain", plain), ("captions a second, one in three cleaned", web)):
        compare(title, len(texts), lambda texts=texts: python(texts), lambda texts=texts: ours(texts))


def resizes(cpp: Cpp) -> None:
    """Decoded images a second, to 224."""
    spec = PreprocessSpec(
        dialect="openai",
        resize_mode="shortest",
        resize_size=224,
        crop_size=224,
        interpolation="bicubic",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    python, ours = Preprocessor(spec), cpp.preprocessor(spec)
    for width, height, count in ((640, 427, 40), (4000, 3000, 2)):
        draw = np.random.default_rng(1)
        images = [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
        compare(
            f"images a second, {width} x {height}",
            count,
            lambda images=images: python(images, threads=1),
            lambda images=images: ours(images),
        )


def start_up(folder: Path) -> None:
    """From nothing to the first embedding of the demo, and the size of what does it."""
    bundle = ROOT / "engines" / "demo"
    if not (bundle / "manifest.json").exists():
        print("no engines/demo: clip-export build demo -o engines/demo")
        return
    Bundle.open(bundle)
    program = f"import clip_export; clip_export.load({str(bundle)!r}).encode_text(['a red circle'])"
    commands = {
        "C++": [str(folder / "clip_embed"), str(bundle), "--text", "a red circle"],
        "Python": [sys.executable, "-c", program],
    }
    for name, command in commands.items():
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            taken.append(time.perf_counter() - start)
        print(f"first embedding from {name}: {statistics.median(taken):.2f} s")
    for name in ("clip_embed", "libclip_export_c.so"):
        print(f"{name}: {(folder / name).stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", nargs="?", default=ROOT / "build", type=Path)
    folder = parser.parse_args().build
    cpp = Cpp(folder)
    print(f"{'one core':<44} {'Python':>10} {'C++':>10}   ratio")
    tokens(cpp)
    resizes(cpp)
    start_up(folder)


if __name__ == "__main__":
    main()
