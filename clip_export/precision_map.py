"""The exact mix of a quantized precision, as a JSON file: which linear layer of which tower is held in which format.

    {"precision": "auto", "method": "mse", "towers": {"image": {"blocks.0.mlp.fc1/MatMul": "int8", …: "fp16"}}}

A build writes it into the bundle as PRECISION.map.json; given to another build it reproduces the mix without a search.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_export.errors import BundleSchemaError, InputError, SpecError
from clip_export.precision.formats import FormatName
from clip_export.spec import Tower, from_dict
from clip_export.strict_json import json_object

HIGH = "fp16"  # of a linear that is not quantized
_FORMATS = ("int8", "fp8", HIGH)
_MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionMap:
    """`towers` is tower -> name of a linear layer -> int8, fp8 or fp16; `method` found the ranges.

    `attention` says whether the products inside attention are quantized too, `half_cosine` what the fp16 graph below
    was required to keep before anything was quantized: both change the graphs. None where that is not known.
    """

    precision: str
    method: str
    towers: dict[Tower, dict[str, str]]
    attention: bool = False
    half_cosine: float | None = None

    def __post_init__(self) -> None:
        for tower, linears in self.towers.items():
            for name, format_ in linears.items():
                if format_ not in _FORMATS:
                    raise SpecError(f"towers.{tower}.{name}: expected one of {', '.join(_FORMATS)}, found {format_!r}")
        if self.half_cosine is not None and not 0 < self.half_cosine <= 1:
            raise SpecError(f"half_cosine: expected a number above 0 and up to 1, found {self.half_cosine!r}")

    def save(self, path: Path) -> None:
        """Write it as JSON; equal maps give equal bytes."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def read_map(path: Path) -> PrecisionMap:
    """The map in the file at `path`. Raises InputError, naming the key, for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path} is larger than a precision map can be", hint="give the PRECISION.map.json of a build")
    try:
        return from_dict(PrecisionMap, json_object(data, where=path.name), where=path.name)
    except (SpecError, BundleSchemaError) as error:
        message = f"{path} is not a precision map: {error.message}"
        raise InputError(message, hint="give the PRECISION.map.json that a build wrote") from error


def check_towers(given: PrecisionMap, towers: Iterable[Tower], precision: str, format_: FormatName) -> None:
    """Raise InputError for a map that lacks one of `towers`, or whose layers need more than `precision`, of `format_`.

    Every GPU that multiplies in fp8 does so in int8, not the other way: a plan of int8 may have no layer in fp8.
    """
    for tower in towers:
        if tower not in given.towers:
            raise InputError(f"the precision map says nothing of the {tower} tower", hint="give the map of both towers")
        if format_ != "fp8" and "fp8" in given.towers[tower].values():
            message = f"the precision map has layers of the {tower} tower in fp8, and {precision} was asked for"
            raise InputError(message, hint="ask for fp8, or make them int8")


def check_names(wanted: Mapping[str, str], known: Mapping[str, str | None], where: str) -> None:
    """Raise InputError unless `wanted` names exactly the linears of a graph, and quantizes none that cannot be.

    `known` has them with None, or with the reason for which it cannot be.
    """
    strange = [name for name in wanted if name not in known]
    lacking = [name for name in known if name not in wanted]
    for names, what in ((strange, "names layers that the graph has not"), (lacking, "says nothing of")):
        if names:
            raise InputError(f"the map of {where} {what}: {_some(names)}", hint="give the map of the same architecture")
    high = [f"{name} ({why})" for name, why in known.items() if why is not None and wanted[name] != HIGH]
    if high:
        raise InputError(f"the map of {where} quantizes what cannot be: {_some(high)}", hint=f"make them {HIGH}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
