"""Preprocessing against the originals: are the pixels equal, how far apart are the dialects, and how fast is it.

    python benchmarks/preprocess.py parity     # the tables of docs/preprocess.md on exactness
    python benchmarks/preprocess.py speed      # images per second, all contestants interleaved in one run

It needs the dev extra. Tables are Markdown, on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import oracles
import pictures
from preprocess_oracles import DIALECTS, ORIGINAL_ERRORS, make_spec, original

from clip_export.errors import ImageError
from clip_export.preprocess import Preprocessor, preprocess_versions
from clip_export.spec import Dialect

SIZES = (
    (1, 1),
    (2, 3),
    (1, 120),
    (120, 1),
    (31, 97),
    (97, 31),
    (223, 225),
    (224, 224),
    (227, 224),
    (224, 229),
    (640, 427),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Preprocessing against the originals: exactness and speed.")
    parser.add_argument("table", choices=("parity", "speed"))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of every contestant (default: 7)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(", ".join(f"{name} {version}" for name, version in preprocess_versions().items()), end="\n\n")
    if arguments.table == "parity":
        print_parity()
    else:
        print_speed(arguments.rounds)


def print_parity() -> None:
    rows("pictures", "number", *(f"{dialect}: max difference, levels" for dialect in DIALECTS))
    with tempfile.TemporaryDirectory() as directory:
        for name, group in picture_groups(pictures.write_files(Path(directory))):
            row(name, len(group), *(compare(dialect, group) for dialect in DIALECTS))
    print()
    rows(
        "transformers' fast processor against its PIL one",
        "number",
        "max difference, levels",
        "mean difference, levels",
    )
    for name, group in fast_groups():
        row(
            name,
            len(group),
            *statistics_of([fast(image) - original(make_spec("huggingface"))(image) for image in group]),
        )
    print()
    rows("openai against huggingface, to 224", "max difference, levels", "mean difference, levels")
    for name, image in dialect_pictures():
        ours = [original(make_spec(dialect))(image).astype(float) for dialect in ("openai", "huggingface")]
        row(name, *statistics_of([ours[0] - ours[1]]))


def statistics_of(differences: Sequence[np.ndarray]) -> tuple[str, str]:
    size = np.abs(np.stack(differences))
    return f"{size.max():.0f}", f"{size.mean():.4f}"


def dialect_pictures() -> Iterable[tuple[str, Image.Image]]:
    """Pictures whose margin is even, so that only the order of conversion tells, and one whose margin is odd."""
    for mode in ("RGB", "L", "CMYK", "P", "P transparent", "LA", "RGBA"):
        yield f"{mode}, 600 x 400", pictures.picture(mode, 600, 400)
    yield "RGB, 640 x 427: the crop is one pixel aside", Image.open(pictures.PHOTOGRAPHS["china"])


def picture_groups(files: dict[str, Path]) -> Iterable[tuple[str, list[Image.Image]]]:
    yield f"photographs ({len(pictures.PHOTOGRAPHS)})", [Image.open(path) for path in pictures.PHOTOGRAPHS.values()]
    yield f"file formats ({len(files)})", [Image.open(path) for path in files.values()]
    yield "12 megapixels", [pictures.picture("RGB", 4000, 3000), pictures.picture("RGB", 2999, 4001)]
    for mode in pictures.MODES:
        yield f"mode {mode}", [pictures.picture(mode, *size) for size in SIZES]


def compare(dialect: Dialect, group: Sequence[Image.Image]) -> str:
    """The largest difference in levels. A picture that only one of the two refuses ends the run."""
    spec, taken, worst = make_spec(dialect), 0, 0
    for image in group:
        found = Preprocessor(spec).attempt([image])[0]
        try:
            expected = original(spec)(image.copy())
        except ORIGINAL_ERRORS:
            assert isinstance(found, ImageError), f"{image.mode} {image.size}"
            continue
        assert not isinstance(found, ImageError), f"{image.mode} {image.size}: {found}"
        taken += 1
        worst = max(worst, int(np.abs(found.astype(int) - expected).max()))
    refused = len(group) - taken
    return ", ".join([*([str(worst)] if taken else []), *([f"{refused} refused by both"] if refused else [])])


def fast_groups() -> Iterable[tuple[str, list[Image.Image]]]:
    photographs = [Image.open(path).convert("RGB") for path in pictures.PHOTOGRAPHS.values()]
    yield "photographs as they are, to 224", photographs
    yield "photographs at 100 pixels, enlarged to 224", [p.resize((150, 100)) for p in photographs]
    yield "12 megapixels, to 224", [pictures.picture("RGB", 4000, 3000), pictures.picture("RGB", 2999, 4001)]


def fast(image: Image.Image) -> np.ndarray:
    processor = oracles.transformers().CLIPImageProcessor(do_rescale=False, do_normalize=False)
    return processor(images=image, return_tensors="pt")["pixel_values"][0].numpy().astype(float)


def print_speed(rounds: int) -> None:
    import torch

    torch.set_num_threads(1)  # more of them spin while they wait, and a busy machine charges that to the originals
    rows("pictures", "contestant", "images/s", "ratio", "CPU ms an image", "ratio")
    with tempfile.TemporaryDirectory() as directory:
        for name, paths in workloads(Path(directory)):
            times = measure(contestants(), paths, rounds)
            for dialect in ("openai", "huggingface"):
                mine = {key: time for key, time in times.items() if key.startswith(dialect)}
                base, cpu_base = next(iter(mine.values()))
                for key, (seconds, cpu) in mine.items():
                    rate, cpu_ms = len(paths) / seconds, 1000 * cpu / len(paths)
                    row(name, key, f"{rate:.1f}", f"{base / seconds:.2f} x", f"{cpu_ms:.2f}", f"{cpu / cpu_base:.2f} x")


def workloads(directory: Path) -> Iterable[tuple[str, list[Path]]]:
    small = [path for path in pictures.PHOTOGRAPHS.values() if path.suffix == ".jpg"]
    yield f"{4 * len(small)} JPEG files, 640 x 427 to 1411 x 1411", small * 4
    large = directory / "large.jpg"
    Image.open(pictures.PHOTOGRAPHS["china"]).resize((4000, 3000)).save(large, quality=90)
    yield "4 JPEG files, 4000 x 3000", [large] * 4
    lossless = [path for path in pictures.PHOTOGRAPHS.values() if path.suffix == ".png"]
    yield f"{2 * len(lossless)} PNG files, 384 x 191 to 741 x 500", lossless * 2


def contestants() -> dict[str, Callable[[list[Path]], object]]:
    """As users call them, from paths to a batch: normalized by the originals, uint8 by ours (the graph normalizes)."""
    import torch

    transform = oracles.openai_clip().clip._transform(224)
    transformers = oracles.transformers()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pil, torchvision = CLIPImageProcessorPil(), transformers.CLIPImageProcessor()
    openai, huggingface = Preprocessor(make_spec("openai")), Preprocessor(make_spec("huggingface"))

    def opened(paths: list[Path]) -> list[Image.Image]:
        return [Image.open(path) for path in paths]

    return {
        "openai: clip's torchvision transform on PIL": lambda p: torch.stack([transform(i) for i in opened(p)]),
        "openai: clip-export, 1 thread": lambda p: openai(p, threads=1),
        "openai: clip-export, a thread per CPU": openai,
        "huggingface: transformers, PIL": lambda p: pil(images=opened(p), return_tensors="pt"),
        "huggingface: transformers, fast": lambda p: torchvision(images=opened(p), return_tensors="pt"),
        "huggingface: clip-export, 1 thread": lambda p: huggingface(p, threads=1),
        "huggingface: clip-export, a thread per CPU": huggingface,
    }


def measure(
    contestants: dict[str, Callable[[list[Path]], object]], paths: list[Path], rounds: int
) -> dict[str, tuple[float, float]]:
    """(seconds, CPU seconds) of each, medians. Contestants take turns, so that a busy machine hits them alike.

    CPU time counts all threads of this process and nothing else: it is what remains comparable on a shared machine.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run(paths)
            if turn:  # the first turn warms caches and loads lazily imported code
                times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}


def rows(*header: str) -> None:
    row(*header)
    row(*["---"] * len(header))


def row(*cells: object) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


if __name__ == "__main__":
    main()
