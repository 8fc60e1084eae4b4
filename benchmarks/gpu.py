"""Every engine that this GPU can build and run, against torch: accuracy first, then speed.

    python benchmarks/gpu.py [--model vit-b-32] [--batches 1,8,64,256] [--json FILE] [--plot FILE.png]

Makes a checkpoint with random weights, builds the bundle, its fp16 graphs, and TensorRT and TensorRT-RTX plans; says of
each that cannot be had why not; holds each to the accuracy contract; and times what is left in interleaved rounds,
tower by tower, on the device and from host to host. Percentages are of the fastest fp16 matrix product that torch
reaches on this very chip. --dry-run does all of it on the CPU with a tiny model: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_checkpoint import SIZES, Case, cases, write_checkpoint
from _gpu_contestants import Contestant, Found, Where, as_numpy, find_engines, find_torch, reason, torch_towers
from _gpu_limits import ceiling, tower_flop
from _gpu_report import Row, draw, lines
from _gpu_timing import Clock, calls_for, event_clock, interleaved, wall_clock

import clip_export
from clip_export.errors import ClipExportError
from clip_export.spec import ModelSpec

LIBRARIES = ("clip-export", "torch", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "cuda-core", "numpy")
RTX = ("tensorrt-rtx-cu13", "tensorrt-rtx")


@dataclass(frozen=True)
class Settings:
    """How to measure. `sample_seconds` is what one contestant gets a round; `products` are sizes of square matrices."""

    device: str
    batches: tuple[int, ...]
    rounds: int
    sample_seconds: float
    limit_seconds: float
    products: tuple[int, ...]
    compile_mode: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    arguments = _parser().parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("error: torch finds no NVIDIA GPU on this machine\n", file=sys.stderr)
        print("hint: run it where nvidia-smi shows one; --dry-run tries the benchmark on the CPU", file=sys.stderr)
        return 1
    settings, model = _settings(arguments)
    with ExitStack() as stack, torch.inference_mode():
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            checkpoint, bundle = _prepared(model, work)
            result = measure(checkpoint, bundle, settings)
        except ClipExportError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    result = {"model": model, "dry_run": arguments.dry_run} | result
    rows = result.pop("rows")
    heading = f"{model} on {result['machine']['device']}" + (" (dry run: no figures)" if arguments.dry_run else "")
    print(f"\n{heading}; {settings.rounds} rounds", *lines(rows, result["baseline"]), sep="\n")
    if arguments.json is not None:
        content = result | {"rows": [row.to_dict() for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(rows, heading, arguments.plot)
    return 0


def measure(checkpoint: Path, bundle: Path, settings: Settings) -> dict[str, Any]:
    """All of it, for one checkpoint and its bundle: JSON-ready but for `rows`."""
    spec = clip_export.Bundle.open(bundle).spec
    found = _contestants(checkpoint, bundle, spec, settings)
    half = torch.float16 if settings.device.startswith("cuda") else torch.float32
    limit = ceiling(settings.device, half, settings.products, seconds=settings.limit_seconds)
    _say(f"limit: {limit / 1e12:.1f} TFLOP/s of {str(half).removeprefix('torch.')} matrix products")
    reference = torch_towers(checkpoint, settings.device, torch.float32)
    assert spec.image is not None
    bench = Bench(found.contestants, spec, limit, settings)
    for case in cases(spec.image.image_size, settings.batches):
        tensors = (torch.from_numpy(array).to(settings.device) for array in case.inputs.values())
        expected = as_numpy(reference[case.tower](*tensors)[0])
        for where in ("device", "host"):
            _say(f"{case.title}, batch {case.batch}, {where} to {where}")
            bench.time(case, where, expected)
    for contestant in found.contestants:
        contestant.close()
    return {
        "baseline": found.contestants[0].name,
        "machine": machine(settings.device),
        "limit_flop_per_second": limit,
        "verified": found.verified,
        "left_out": found.left_out,
        "problems": bench.problems,
        "rows": bench.rows,
    }


@dataclass
class Bench:
    """The contestants, and what was measured of them: `problems` says who failed at which case, and why."""

    contestants: Sequence[Contestant]
    spec: ModelSpec
    limit: float
    settings: Settings
    rows: list[Row] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)

    def time(self, case: Case, where: Where, expected: np.ndarray) -> None:
        """Add the rows of one case, fastest first. The first contestant is what ratios are to."""
        on_gpu = where == "device" and self.settings.device.startswith("cuda")
        clock: Clock = event_clock if on_gpu else wall_clock
        works, calls, cosines = {}, {}, {}
        for contestant in self.contestants:
            name = contestant.name
            try:
                work = contestant.work(case, where)
                cosines[name] = _min_cosine(as_numpy(work()), expected)
                calls[name] = calls_for(work, clock, self.settings.sample_seconds)
                works[name] = work
            except Exception as error:  # noqa: BLE001 - out of memory, for one, takes many forms
                problem = {"title": case.title, "batch": case.batch, "where": where, "contestant": name}
                self.problems.append(problem | {"reason": reason(error)})
                _say(f"  {name}: {reason(error)}")
        baseline = self.contestants[0].name
        timings = interleaved(works, clock, calls, baseline=baseline, rounds=self.settings.rounds)
        precisions = {contestant.name: contestant.precision for contestant in self.contestants}
        flop = tower_flop(self.spec, case.tower, case.length)
        rows = [
            Row(case.title, where, case.batch, name, precisions[name], timing, flop, self.limit, cosines[name])
            for name, timing in timings.items()
        ]
        self.rows += sorted(rows, key=lambda row: row.timing.median)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "memory_mib": properties.total_memory // 2**20}
        facts |= {"compute_capability": f"sm_{properties.major}{properties.minor}", "cuda": torch.version.cuda}
        facts |= {"driver": _driver()}
    versions = {}
    for library in (*LIBRARIES, *RTX):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return facts | {"versions": versions}


def _contestants(checkpoint: Path, bundle: Path, spec: ModelSpec, settings: Settings) -> Found:
    found = Found()
    find_torch(found, checkpoint, spec, device=settings.device, compile_mode=settings.compile_mode)
    for name in find_engines(found, bundle, settings.batches, device=settings.device):
        _say(f"build, verify and open {name}")
    for name, why in found.left_out.items():
        _say(f"left out: {name}: {why}")
    for name, verified in found.verified.items():
        for row in (row for run in verified["runs"] for row in run["rows"]):
            kept = "keeps" if row["passed"] else "BREAKS"
            _say(f"{name}: {row['tower']} {kept} the contract, min cosine {row['min_cosine']:.6f}")
    return found


def _min_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    first, second = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / lengths).min())


def _prepared(model: str, work: Path) -> tuple[Path, Path]:
    """Checkpoint and bundle in `work`, made where they are not there."""
    checkpoint, bundle = work / model, work / f"{model}-bundle"
    if not checkpoint.is_dir():
        _say(f"write a checkpoint of {model} with random weights")
        write_checkpoint(model, checkpoint)
    if not bundle.is_dir():
        _say("build the bundle")
        clip_export.build(checkpoint, bundle)
    return checkpoint, bundle


def _settings(arguments: argparse.Namespace) -> tuple[Settings, str]:
    if arguments.dry_run:
        small = Settings("cpu", (1, 2), 2, 0.0, 0.0, (512,), None)
        return small, "tiny"
    # 2048 and up, since which size is fastest differs by chip.
    products = (2048, 4096, 8192)
    gpu = Settings("cuda:0", arguments.batches, arguments.rounds, 0.05, 3.0, products, arguments.compile_mode)
    return gpu, arguments.model


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def _batches(text: str) -> tuple[int, ...]:
    sizes = tuple(sorted({int(part) for part in text.split(",")}))
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"expected batch sizes of at least 1, found {text}")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-b-32", choices=[name for name in SIZES if name != "tiny"])
    parser.add_argument("--batches", type=_batches, default=(1, 8, 64, 256), help="such as 1,8,64,256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile-mode", default="reduce-overhead", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="keep checkpoint and bundle here, and take those that are there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png, .webp or .pdf")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, to try the benchmark itself")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
