"""What 8 bits cost, contestant by contestant: cosines, R@1, the share of FLOPs in int8, plans. No GPU is needed.

    python benchmarks/quantization.py demo|vit-b-32 [--hardened] [--draws N] [--modelopt PYTHON] [--json FILE]

Each contestant is given the same fp32 graphs and inputs, and judged by others (_quantization_data.py says which). With
--hardened the checkpoint does the same in fp32 and is hard on 8 bits: tests/hardened.py, "outliers". PYTHON is that of
an environment with nvidia-modelopt[onnx]==0.47.0, which cannot share one with clip-export; without it ModelOpt is left
out. Markdown goes to stdout. The least of a dozen cosines is luck: --draws N measures with N draws of the pairs, prints
the tables of the first and then what each contestant has over all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _quantization_contestants import Contestants
from _quantization_data import NAMES, Case, describe, make_case
from _quantization_scores import GPU, Row, Scorer, recall

from clip_export.judging import recall_drop
from clip_export.spec import Tower

TOWERS: tuple[Tower, ...] = ("image", "text")


def measure(case: Case, modelopt: Path | None, work: Path) -> dict[str, Any]:
    """Everything that is measured, JSON-ready."""
    contestants = {tower: Contestants(case.calibration.towers[tower], work, _say) for tower in TOWERS}
    scorers = {tower: Scorer(case, tower, contestants[tower].calibration, work) for tower in TOWERS}
    rows: list[Row] = []
    embeddings: dict[str, dict[Tower, np.ndarray]] = {"fp32": {tower: scorers[tower].expected for tower in TOWERS}}
    for tower, other in zip(TOWERS, reversed(TOWERS), strict=True):
        for name, graph in contestants[tower].make(modelopt):
            _say(f"{tower}: judge {name}", 0, 0)
            row, found = scorers[tower].score(name, graph, scorers[other].expected)
            rows.append(row)
            embeddings.setdefault(name, {})[tower] = found
    return {
        "data": describe(case),
        "versions": {name: metadata.version(name) for name in ("clip-export", "onnxruntime", "tensorrt-rtx-cu13")},
        "rows": [dataclasses.asdict(row) for row in rows],
        "recall_at_1": _recalls(case, embeddings) if case.paired else None,
        "notes": {tower: contestants[tower].notes for tower in TOWERS},
    }


def _recalls(case: Case, embeddings: dict[str, dict[Tower, np.ndarray]]) -> dict[str, Any]:
    expected = recall(case, embeddings["fp32"])
    found = {name: recall(case, towers) for name, towers in embeddings.items()}
    return {
        name: dataclasses.asdict(each) | {"drop_in_points": recall_drop(each, expected)} for name, each in found.items()
    }


def markdown(title: str, measured: dict[str, Any]) -> str:
    """The tables."""
    data, modelopt = measured["data"], measured["notes"]["image"].get("ModelOpt", {}).get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in (measured["versions"] | modelopt).items())
    lines = [
        f"{title}: calibrated on {data['calibrated_on']} pairs, {data['held_out_for_choices']} held out for choices, "
        f"judged by {data['judged_by']} others and the golden samples; plans for {GPU}. {versions}",
        "",
        "| tower | contestant | golden min | golden mean | held-out min | held-out mean | top-1 agreement "
        "| int8 share | with patches | plan MB | build s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in measured["rows"]]
    lines += ["", *_both(measured)]
    for tower, notes in measured["notes"].items():
        search = notes["search"]
        high = "; ".join(f"{name} ({why})" for name, why in search["high"].items()) or "none"
        lines += ["", f"{tower}, evaluations of the search: {search['evaluations']}; left in fp16: {high}"]
    lines += [f"\n{row['tower']}, {row['contestant']}: {row['error']}" for row in measured["rows"] if row["error"]]
    return "\n".join(lines)


def _both(measured: dict[str, Any]) -> Iterator[str]:
    """The table of both towers together: a picture and a text."""
    recalls = measured["recall_at_1"]
    yield "| both towers | int8 share" + (
        " | R@1 image to text | R@1 text to image | drop, points |" if recalls else " |"
    )
    yield "|---|---|" + ("---|---|---|" if recalls else "")
    rows = measured["rows"]
    for name in recalls or dict.fromkeys(row["contestant"] for row in rows):
        towers = [row for row in rows if row["contestant"] == name]
        cells = [name, ""]
        if towers:
            flops = sum(row["flops"] for row in towers)
            cells[1] = f"{sum(row['flops'] * row['share'] for row in towers) / flops:.1%}"
        if recalls:
            cells += [f"{recalls[name][way]:.2%}" for way in ("image_to_text", "text_to_image")]
            cells.append(f"{recalls[name]['drop_in_points']:.2f}")
        yield f"| {' | '.join(cells)} |"


def _line(row: dict[str, Any]) -> str:
    cosines = [row[part][key] for part in ("golden", "held_out") for key in ("cosine", "mean_cosine")]
    plan = ("does not build", "") if row["error"] else (f"{row['plan_bytes'] / 1e6:.1f}", f"{row['build_seconds']:.1f}")
    cells = [row["tower"], row["contestant"], *(f"{cosine:.5f}" for cosine in cosines)]
    cells += [f"{row['held_out']['agreement']:.1%}", f"{row['share']:.1%}", f"{row['share_with_patches']:.1%}", *plan]
    return f"| {' | '.join(cells)} |"


def spread(draws: list[dict[str, Any]]) -> str:
    """The table of several draws: medians, and from least to largest."""
    lines = [
        f"Over {len(draws)} draws of the pairs, the median (least to largest):",
        "",
        "| tower | contestant | golden min | golden mean | held-out min | held-out mean |",
        "|---|---|---|---|---|---|",
    ]
    for rows in zip(*(measured["rows"] for measured in draws), strict=True):
        cells = [rows[0]["tower"], rows[0]["contestant"]]
        for part, key in product(("golden", "held_out"), ("cosine", "mean_cosine")):
            cosines = [row[part][key] for row in rows]
            cells.append(f"{np.median(cosines):.5f} ({min(cosines):.5f} to {max(cosines):.5f})")
        lines.append(f"| {' | '.join(cells)} |")
    if all(measured["recall_at_1"] for measured in draws):
        lines += ["", "| both towers | drop of R@1, points |", "|---|---|"]
        for name in draws[0]["recall_at_1"]:
            drops = [measured["recall_at_1"][name]["drop_in_points"] for measured in draws]
            lines.append(f"| {name} | {np.median(drops):.2f} ({min(drops):.2f} to {max(drops):.2f}) |")
    return "\n".join(lines)


_said: list[str] = []


def _say(step: str, _done: int, _total: int) -> None:
    if _said[-1:] != [step]:
        _said.append(step)
        print(f"{time.strftime('%H:%M:%S')} {step}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--hardened", action="store_true", help="function-preserving outliers in the weights")
    parser.add_argument("--draws", type=int, default=1, metavar="N", help="how many draws of the pairs")
    parser.add_argument("--modelopt", type=Path, metavar="PYTHON", help="of an environment with ModelOpt")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    title = f"{arguments.name}, hardened" if arguments.hardened else arguments.name
    draws = []
    for draw in range(arguments.draws):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            case = make_case(arguments.name, Path(temporary), hardened=arguments.hardened, draw=draw)
            measured = measure(case, arguments.modelopt, Path(temporary)) | {"title": title, "draw": draw}
        draws.append(measured | {"seconds": round(time.perf_counter() - started)})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(draws, indent=2) + "\n", encoding="utf-8")
    print(markdown(title, draws[0]))
    if len(draws) > 1:
        print(f"\n{spread(draws)}")


if __name__ == "__main__":
    main()
