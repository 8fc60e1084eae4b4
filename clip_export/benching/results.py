"""What was measured, and the same as JSON. `KEYS` documents every key of it; a list is written `rows[]`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_export.benching.end_to_end import EndToEnd
from clip_export.benching.fresh import Opening
from clip_export.benching.limits import Ceiling
from clip_export.benching.timing import CONFIDENCE, Timing
from clip_export.json_text import json_text
from clip_export.output_file import staged_file, writing
from clip_export.spec import Tower
from clip_export.speed import Ratio

SCHEMA_VERSION = 1

_TIMING = {
    "p50": "seconds of one call, the median over all calls",
    "p90": "seconds that nine of ten calls do not take longer than",
    "p99": "the same for 99 of 100; the slowest call where there are fewer than 100",
    "median": "seconds of one call, the median over rounds, each of which counts as its median call",
    "low": "the lower end of the interval that holds the true median with `confidence`",
    "high": "its upper end",
    "mean": "seconds of one call, the mean over all calls",
    "spread": "half the interquartile range of the rounds, as a fraction of the median",
    "rounds": "how often every contestant had its turn",
    "calls": "how many calls were timed",
}
KEYS: dict[str, str] = {
    "schema_version": "of this layout: 1",
    "bundle": "the name of the bundle",
    "measured": "whether all that was asked of the bundle itself was; if not, left_out says why; the exit code is 2",
    "confidence": "of every interval, 0 to 1",
    "baseline": "the contestant that ratios are to; null where nothing was timed",
    "machine.cpu": "the processor",
    "machine.cpus": "how many of its cores this process may use",
    "machine.system": "the operating system",
    "machine.python": "its version",
    "machine.gpu": "name, compute_capability, driver and cuda of the GPU; null on a CPU",
    "machine.versions": "of the libraries installed here, by distribution",
    "ceilings": "the fastest matrix product, by device and precision: flop_per_second, library, size, dtype",
    "rows[].tower": "text or image",
    "rows[].lengths": "natural, or the tokens of each text; null for pictures",
    "rows[].tokens": "the length that the batch was padded to; null for pictures",
    "rows[].batch": "inputs a call",
    "rows[].where": "host: numpy arrays in and out; device: both stay on the GPU",
    "rows[].contestant": "who",
    "rows[].precision": "of its weights and most of its arithmetic",
    **{f"rows[].timing.{key}": text for key, text in _TIMING.items()},
    "rows[].per_second": "inputs a second: all inputs over the time of all calls",
    "rows[].ratio.ratio": "times as fast as the baseline, the median over rounds; ratio is null for the baseline",
    "rows[].ratio.low": "the lower end of its interval",
    "rows[].ratio.high": "its upper end",
    "rows[].flop": "floating-point operations of one call, counted in the fp32 graph; null where they were not",
    "rows[].of_ceiling": "the part of the ceiling of its device and precision that it reaches; null without one",
    "rows[].min_cosine": "the least of the batch's first eight rows to the fp32 graphs of the bundle",
    "openings[].contestant": "who",
    "openings[].cold": "seconds from the start of a fresh process to the first embedding of each tower",
    "openings[].opening": "seconds of these that opening took, imports of libraries included",
    "openings[].warm": "seconds to open it again in the same process",
    "openings[].batch": "the inputs at once that peak_bytes is for",
    "openings[].opened_bytes": "resident after opening; null where the system does not tell",
    "openings[].peak_bytes": "resident at most, after a batch for each tower; null where the system does not tell",
    "openings[].device_bytes": "taken of the GPU's memory; null on a CPU",
    "end_to_end[].tower": "text or image",
    "end_to_end[].inputs": "how many of the folder's were used",
    "end_to_end[].batch": "how many at once",
    "end_to_end[].stages": "seconds an input, by stage; preparing in one thread",
    "end_to_end[].shares": "each stage's part of their sum",
    "end_to_end[].whole": "seconds an input through the Encoder, which prepares in `threads`",
    "end_to_end[].threads": "the cores that preparing pictures may use",
    "end_to_end[].overlaps": "whether a GPU computes, so that preparing and computing go on side by side",
    "end_to_end[].binds": "the stage that a gain has to come from",
    "end_to_end[].advice": "what to do about it",
    "end_to_end[].picture_pixels": "the median of width x height; null for texts",
    "end_to_end[].tower_pixels": "what the tower sees of it; null for texts",
    "left_out": "who did not take part, or not in everything, with the reason",
    "notes": "what a reader of the figures should know",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant on one batch. `ratio` is None for the baseline, `flop` and `ceiling` where they are not known."""

    tower: Tower
    lengths: str | None
    tokens: int | None
    batch: int
    where: str
    contestant: str
    precision: str
    timing: Timing
    ratio: Ratio | None
    flop: int | None
    ceiling: float | None
    min_cosine: float

    @property
    def title(self) -> str:
        """The block of a table that it belongs to: as in "text, natural"."""
        return self.tower if self.lengths is None else f"{self.tower}, {self.lengths}"

    @property
    def per_second(self) -> float:
        """Inputs a second."""
        return self.batch / self.timing.mean

    @property
    def of_ceiling(self) -> float | None:
        """What part of the fastest matrix product's rate it reaches; None where that is not known."""
        if self.flop is None or self.ceiling is None:
            return None
        return self.flop / self.timing.mean / self.ceiling

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as KEYS has it."""
        fields = ("tower", "lengths", "tokens", "batch", "where", "contestant", "precision", "flop", "min_cosine")
        ratio = None if self.ratio is None else {name: getattr(self.ratio, name) for name in ("ratio", "low", "high")}
        derived = {"per_second": self.per_second, "of_ceiling": self.of_ceiling}
        plain = {name: getattr(self, name) for name in fields}
        return {**plain, "timing": dataclasses.asdict(self.timing), "ratio": ratio, **derived}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that `bench` found. `ceilings` are by "device, precision"; `left_out` maps a name to its reason.

    `measured` says whether all that was asked of the bundle itself was: each of its engines, and the files of a folder.
    """

    bundle: str
    measured: bool
    baseline: str | None
    machine: Mapping[str, Any]
    rows: tuple[Row, ...]
    ceilings: Mapping[str, Ceiling]
    openings: tuple[Opening, ...]
    end_to_end: tuple[EndToEnd, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as KEYS has it."""
        from clip_export.benching.advice import advice

        stages = [
            {**dataclasses.asdict(found), "shares": found.shares, "binds": found.binds, "advice": advice(found)}
            for found in self.end_to_end
        ]
        about = {"schema_version": SCHEMA_VERSION, "bundle": self.bundle, "measured": self.measured}
        return {
            **about,
            "confidence": CONFIDENCE,
            "baseline": self.baseline,
            "machine": dict(self.machine),
            "ceilings": {name: dataclasses.asdict(ceiling) for name, ceiling in self.ceilings.items()},
            "rows": [row.to_dict() for row in self.rows],
            "openings": [dataclasses.asdict(opening) for opening in self.openings],
            "end_to_end": stages,
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


def write_json(result: Result, path: str | os.PathLike[str]) -> None:
    """Write `result` to `path`, whole or not at all. A number that is not finite is null. Raises OutputError."""
    with staged_file(path) as file, writing(path):
        file.write(f"{json_text(result.to_dict())}\n".encode("ascii"))
