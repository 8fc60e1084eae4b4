"""Time per prompt: a bundle's Context on ONNX Runtime against diffusers' encode_prompt in torch, in one run.

    python benchmarks/context.py [sd1|sd2|sdxl] [--rounds N] [--threads N] [--small] [--json FILE]

Weights are random, at the real sizes of the architecture. Each round encodes one prompt with one negative prompt by
both, in turn, so that a drift of the machine meets both; medians and the ratio of the two in each round are printed, as
is the largest difference of what they give. Every dialect is timed too, since weights and chunks are rows of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import diffusion_made

import clip_export

PROMPT = "a photo of a red fox in the snow, golden hour, 35mm film, highly detailed"
WEIGHTED = {
    "diffusers": PROMPT,
    "comfyui": PROMPT.replace("red fox", "(red fox:1.3)"),
    "a1111": PROMPT.replace("red fox", "(red fox:1.3)"),
    "compel": PROMPT.replace("red fox", "(red fox)0.7"),
}
NEGATIVE = "blurry, low quality"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of both; all cores by default")
    parser.add_argument("--small", action="store_true", help="the small encoders of the tests")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as work:
        pipe = diffusion_made.pipeline(Path(work), asked.family, full=not asked.small)
        folder = diffusion_made.write_folder(pipe, Path(work) / asked.family)
        bundle = clip_export.build(folder, Path(work) / "bundle", context=True)
        with clip_export.load(bundle, backend="onnxruntime", threads=asked.threads, check_files=False) as clip:
            found = measured(clip, pipe, asked.rounds)
    found |= {"family": asked.family, "small": asked.small, "threads": torch.get_num_threads()}
    for key, value in found.items():
        print(f"{key:28} {value:.4g}" if isinstance(value, float) else f"{key:28} {value}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measured(clip: clip_export.Encoder, pipe: object, rounds: int) -> dict[str, float]:
    """Milliseconds of a prompt with its negative one, ours and theirs, and how ours compares."""

    def theirs() -> list[np.ndarray]:
        with torch.no_grad():
            arrays = pipe.encode_prompt(  # type: ignore[attr-defined]
                [PROMPT],
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=[NEGATIVE],
            )
        return [array.numpy() for array in arrays]

    def ours(dialect: str = "diffusers") -> clip_export.Context:
        return clip.context([WEIGHTED[dialect]], negative=[NEGATIVE], dialect=dialect)

    expected, context = theirs(), ours()
    both = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    found = {
        "ours_ms": 1000 * statistics.median(first for first, _ in both),
        "diffusers_ms": 1000 * statistics.median(second for _, second in both),
        "diffusers_over_ours": statistics.median(second / first for first, second in both),
        "largest_difference": float(np.abs(context.hidden_states - expected[0]).max()),
    }
    for dialect in ("comfyui", "a1111", "compel"):
        times = [(seconds(lambda dialect=dialect: ours(dialect)), seconds(ours)) for _ in range(max(3, rounds // 3))]
        found[f"{dialect}_weighted_over_plain"] = statistics.median(first / second for first, second in times)
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
