"""What comparing ranks takes: seconds and peak memory of N pictures against N captions, reference and engine.

    python benchmarks/retrieval.py [--pairs 100000] [--dim 512] [--noise 0.8] [--error 0.02] [--sigmoid] [--json FILE]

Embeddings are random. A caption's is its picture's with noise, an engine's the reference's with an error, both as a
share of its length: more noise gives ranks further down, where more candidates are nearly as near. With a noise of 0.8
the right answer is found first for few of 100,000. Markdown goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from clip_export.ranking import RECALL_AT, compare_ranks


def embeddings(pairs: int, dim: int, noise: float, error: float) -> list[np.ndarray]:
    """Images and texts of the reference, then of the engine: float32 [pairs, dim]."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((pairs, dim), np.float32)
    texts = images + noise / (1 - noise) * rng.standard_normal((pairs, dim), np.float32)
    found = [array + error * array.std() * rng.standard_normal((pairs, dim), np.float32) for array in (images, texts)]
    return [images, texts, *found]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One comparison, JSON-ready. Memory is that of this process at its highest, the embeddings included."""
    arrays = embeddings(options.pairs, options.dim, options.noise, options.error)
    before = _peak_bytes()
    start = time.perf_counter()
    ranks = compare_ranks(
        *arrays,
        captions=range(options.pairs),
        pictures=range(options.pairs),
        scale=100.0,
        bias=-10.0 if options.sigmoid else None,
    )
    seconds = time.perf_counter() - start
    return {
        "pairs": options.pairs,
        "dim": options.dim,
        "noise": options.noise,
        "error": options.error,
        "loss": "sigmoid" if options.sigmoid else "softmax",
        "seconds": seconds,
        "embeddings_bytes": sum(array.nbytes for array in arrays),
        "peak_bytes_before": before,
        "peak_bytes": _peak_bytes(),
        "whole_matrix_bytes": options.pairs**2 * 4,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "ranks": ranks.to_dict(),
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    recall = result["ranks"]["recall"]
    rows = [
        ("pairs x dim", f"{result['pairs']:,} x {result['dim']}"),
        ("seconds, reference and engine", f"{result['seconds']:.1f}"),
        ("peak memory", f"{result['peak_bytes'] / 1e9:.2f} GB"),
        ("of which embeddings", f"{result['embeddings_bytes'] / 1e9:.2f} GB"),
        ("one whole matrix in float32 would be", f"{result['whole_matrix_bytes'] / 1e9:.2f} GB"),
        *((f"R@{k}, reference and engine", _both(recall[str(k)])) for k in RECALL_AT),
        ("agreement", f"{result['ranks']['agreement']['image_to_text']:.4f}"),
        ("loss, reference and engine", "{reference:.6f}, {engine:.6f}".format(**result["ranks"]["loss"])),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _both(recall: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{recall[name]['image_to_text']:.4f}" for name in ("reference", "engine"))


def _peak_bytes() -> int:
    """The most memory that this process has had, as Linux counts it: in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="Seconds and memory of comparing ranks.")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--noise", type=float, default=0.8)
    parser.add_argument("--error", type=float, default=0.02)
    parser.add_argument("--sigmoid", action="store_true", help="SigLIP's loss, in place of CLIP's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    result = measure(options)
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
