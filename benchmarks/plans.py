"""What building plans costs and how close their graphs are: seconds, sizes and peak memory, on a machine without a GPU.

python benchmarks/plans.py vit-b-32 --gpu sm_86 --gpu sm_120 [--work DIRECTORY]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import random_checkpoint

import clip_export
from clip_export.bundle import Bundle

GPUS = ("sm_75", "sm_86", "sm_89", "sm_120")


def bundle_of(name: str, work: Path) -> Path:
    """The fp32 bundle of a checkpoint with random weights, or of the demo; one that is there already is taken."""
    path = work / name
    if not path.exists():
        checkpoint = work / f"{name}-checkpoint"
        if name != "demo":
            random_checkpoint.make(name, checkpoint)
        clip_export.build("demo" if name == "demo" else checkpoint, path)
    return path


def print_plans(bundle: Bundle) -> None:
    print("\n| tower | gpu | precision | profiles | s | MB | peak MiB | attention |\n|---|---|---|---|---|---|---|---|")
    for plan in bundle.manifest.plans:
        size = bundle.manifest.files[plan.file].size / 1e6
        cells = (plan.tower, plan.compute_capability, plan.precision, len(plan.profiles), f"{plan.seconds:.1f}")
        print("|", " | ".join(map(str, (*cells, f"{size:.1f}", plan.peak_memory_mib, plan.attention))), "|")


def print_agreement(bundle: Bundle) -> None:
    print("\n| precision | tower | engine | min cosine | required | parts kept fp32 |\n|---|---|---|---|---|---|")
    precisions = bundle.report().get("precisions", {})
    for row in clip_export.verify(bundle, hostile=False).rows:
        made = precisions.get(row.precision, {}).get("towers", {}).get(row.tower, {})
        kept = len(made.get("kept", ())) + len(made.get("refined", ()))
        cells = (row.precision, row.tower, row.engine, f"{row.min_cosine:.7f}", row.required_cosine, kept)
        print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("demo", *random_checkpoint.ARCHITECTURES))
    parser.add_argument("--gpu", action="append", help="sm_NN or portable; may be repeated")
    parser.add_argument("--precision", action="append", help="fp16, bf16; may be repeated")
    parser.add_argument("--work", type=Path, help="where checkpoint and bundle are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = bundle_of(arguments.name, arguments.work or Path(temporary))
        for precision in arguments.precision or ("fp16",):
            started = time.perf_counter()
            clip_export.extend(path, precision=precision)
            print(f"{arguments.name} {precision} graphs: {time.perf_counter() - started:.1f} s")
            clip_export.extend(path, precision=precision, engine="tensorrt-rtx", gpus=arguments.gpu or GPUS)
        bundle = Bundle.open(path, check_files=False)
        print_plans(bundle)
        print_agreement(bundle)


if __name__ == "__main__":
    main()
