"""What a build says of a precision of 8 bits: how much of it is in them, how exact that is, and why not more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_HARDLY = 0.1  # the share of FLOPs below which 8 bits are a name only
_MOST = 12  # layers that are listed of each tower; the report has them all


def lines(precision: str, report: Mapping[str, Any]) -> Iterator[str]:
    """`report` is that of `precision`, as Bundle.report() has it under "precisions"."""
    contract = report["contract"]
    for tower, found in report["towers"].items():
        yield f"  {precision} {tower}: {_share(found)}; {_cosine(found, contract)}"
        yield from _high(found["layers"])
        for name, became in found.get("attention", {}).items():
            yield f"    {name}: {became}"
        if found["share"] < _HARDLY:
            yield f"    hardly anything of the {tower} tower is in 8 bits: fp16 would serve as well"
    if report["pairs"] is not None:
        yield f"  {precision} R@1: {_recall(report['pairs'], contract)}"
    for missed in report["missed"]:
        yield f"  {precision} misses its contract: {missed}"


def _share(found: Mapping[str, Any]) -> str:
    formats = sorted({layer["format"] for layer in found["layers"].values() if "why" not in layer})
    return f"{percent(found['share'])} of the FLOPs of linear layers in {' and '.join(formats) or '8 bits'}"


def percent(share: float) -> str:
    """Rounded down: less than all is never 100 %."""
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f} %"


def _cosine(found: Mapping[str, Any], contract: Mapping[str, Any]) -> str:
    measured, least = found["score"]["cosine"], contract["min_cosine"]
    return f"min cosine {measured:.7f} over golden and held-out inputs, required {least:.7g}"


def _recall(pairs: Mapping[str, Any], contract: Mapping[str, Any]) -> str:
    drop, most = pairs["recall_drop"], contract["max_recall_drop"]
    moved = "the same" if drop == 0 else f"{'down' if drop > 0 else 'up'} by {abs(drop):.2f} points"
    allowed = "no limit was set" if most is None else f"allowed are {most:.4g} points down"
    return f"{moved} on {pairs['count']} held-out pairs; {allowed}"


def _high(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The layers that are not in 8 bits, in the order of computation, each with its reason."""
    high = {name: layer for name, layer in layers.items() if "why" in layer}
    shown = dict(list(high.items())[:_MOST])
    width = max(map(len, shown), default=0)
    for name, layer in shown.items():
        yield f"    {name:{width}}  stays {layer['format']}: {layer['why']}"
    if len(high) > len(shown):
        yield f"    and {len(high) - len(shown)} more, see report.json"
