"""The accuracy contract, and the proof that a bundle keeps it: golden samples through tokenizer, pixels and engine.

Runs without torch: the reference's float32 outputs are in the bundle. `CONTRACTS` is the one table of thresholds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from clip_export import backends
from clip_export.backends.building import EngineOptions
from clip_export.bundle import Bundle
from clip_export.choice import CPU_INT8, FP32, GRAPHS, Choice, best_plans, choose
from clip_export.context_inputs import sampled_feeds
from clip_export.cosine import Doubles, cosines, unit_rows
from clip_export.encoder import Encoder, Floats
from clip_export.errors import BundleIntegrityError, ContractError
from clip_export.golden import Golden, TextGolden
from clip_export.manifest import REBUILD, SECOND
from clip_export.progress import Progress, silent
from clip_export.runtime import open_choice
from clip_export.simulation import simulated, simulation_lacks
from clip_export.spec import Tower
from clip_export.tokenizer import Tokens

# Least cosine to the reference in float32, by precision. A graph that is all fp16 cannot be refined by keeping more of
# it in fp32. bf16 has 8 bits where fp16 has 11: errors 8 times as large, and 1 - cosine goes with their square.
# Quantized ones have a contract of their own in the bundle; here is what they are held to if nobody says otherwise.
CONTRACTS = {"fp32": 0.99999, "fp16": 0.9999, "fp16all": 0.999, "bf16": 0.99}
CONTRACTS |= dict.fromkeys(("int8", "int8all", "int8cpu", "fp8", "auto", "autoall", "autofp8"), 0.99)

# Points by which R@1 on pairs may fall, in the direction in which it falls more: what papers quote to a digit stays.
MAX_RECALL_DROP = {"fp32": 0.1} | dict.fromkeys([name for name in CONTRACTS if name != FP32], 0.5)

_BELOW_FP32 = "this is a bug of the export, not of the checkpoint; please report it with the architecture"
_BELOW_HALF = "build with another precision, or let ranges be measured on more inputs: --calibration PICTURES"
_REBUILT = "build it again with --force, for less or with --precision auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One output of one tower against the reference.

    `engine` is what ran it, or "simulation of fp16, cpu"; `samples` golden inputs; cosines over them (hidden_states:
    over every token of each), of which `p1_cosine` is the 1st percentile and `cosines` float64 [n] are all; `max_abs`
    is the largest difference of an output value, of the normalized embedding for `embedding`.
    """

    tower: Tower
    output: str
    precision: str
    engine: str
    samples: int
    min_cosine: float
    p1_cosine: float
    mean_cosine: float
    max_abs: float
    required_cosine: float
    cosines: Doubles = dataclasses.field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the contract is kept. A cosine that is not a number keeps none."""
        return self.min_cosine >= self.required_cosine

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "cosines"]
        return {name: getattr(self, name) for name in names} | {"passed": self.passed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What `replay` found; `notes` are the precisions that could not be measured here, each with its reason.

    `missed` is precision -> what of its contract it missed when it was built, in the words of the manifest: those that
    were published below it. Held-out inputs and R@1 are not in a bundle, so golden samples alone cannot clear them.
    Token ids and pixels are compared when the bundle is loaded: a difference is an error.
    """

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    missed: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every row keeps the contract, and every precision kept all of it when it was built."""
        return not self.missed and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        missed = {precision: list(words) for precision, words in self.missed.items()}
        found = {"name": self.name, "rows": [row.to_dict() for row in self.rows], "notes": list(self.notes)}
        return found | {"missed": missed, "passed": self.passed}


def replay(
    path: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    progress: Progress = silent,
) -> Replay:
    """Replay the golden samples of the bundle at `path` and compare with the reference's outputs.

    Every precision that the bundle has, or the one asked for, is run by the best that works here, or by `backend` on
    `device`. A half precision that no GPU runs here is simulated on the CPU, and its rows say so.

    Raises BundleError, BackendError as `load` does; a contract that is not kept is in the result, not an error.
    """
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    runs, notes, unmeasured = find_runs(bundle, backend, device, precision)
    asked = [precision] if precision is not None else list(bundle.manifest.variants) if backend is None else []
    found, second = _replayed(bundle, runs, asked, (*unmeasured, *notes), progress), bundle.second
    if second is None:
        return found
    also = replay(second, backend=backend, device=device, precision=precision, progress=progress)
    return _both(found, also)


def _both(first: Replay, second: Replay) -> Replay:
    """One of a bundle and of that of its second text encoder."""
    missed = {
        name: first.missed.get(name, ()) + second.missed.get(name, ()) for name in {**first.missed, **second.missed}
    }
    notes = tuple(dict.fromkeys((*first.notes, *second.notes)))
    return Replay(name=first.name, rows=(*first.rows, *of_second(second.rows)), notes=notes, missed=missed)


def of_second(rows: Iterable[Row]) -> Iterator[Row]:
    """`rows` of the bundle of a second text encoder, whose outputs are named text_2/…."""
    return (dataclasses.replace(row, output=f"{SECOND}/{row.output}") for row in rows)


def replay_choice(
    bundle: Bundle, choice: Choice, *, options: EngineOptions | None = None, progress: Progress = silent
) -> Replay:
    """Like `replay`, for exactly the plans or graphs that `choice` names. Raises as `load` does."""
    run = (choice.title, choice.precision, partial(open_choice, bundle, choice, options=options))
    return _replayed(bundle, [run], (), (), progress)


Run = tuple[str, str, Callable[[], AbstractContextManager[Encoder]]]  # what runs, its precision, how it is opened


def _replayed(
    bundle: Bundle, runs: Sequence[Run], asked: Sequence[str], notes: tuple[str, ...], progress: Progress
) -> Replay:
    """What `runs` give for the golden samples; `asked` are precisions to answer for, run here or not."""
    golden = bundle.golden()
    rows: list[Row] = []
    for done, (title, precision, open_encoder) in enumerate(runs):
        progress("verify", done, len(runs))
        with open_encoder() as encoder:
            required = required_cosine(bundle, precision)
            outputs = golden_outputs(encoder, golden)
            rows += golden_rows(outputs, golden, precision=precision, engine=title, required=required)
    progress("verify", len(runs), len(runs))
    precisions = list(dict.fromkeys([*asked, *(precision for _, precision, _ in runs)]))
    notes = (*notes, *lowered(bundle, precisions))
    return Replay(name=bundle.name, rows=tuple(rows), notes=notes, missed=missed(bundle, precisions))


def golden_outputs(encoder: Encoder, golden: Golden) -> dict[Tower, dict[str, Floats]]:
    """What `encoder` gives for golden samples, by tower and output, as they leave the tower."""
    found: dict[Tower, dict[str, Floats]] = {}
    if golden.text is not None and "text" in encoder.towers:
        found["text"] = _text_outputs(encoder, golden.text)
    if golden.image is not None and "image" in encoder.towers:
        found["image"] = encoder.image_outputs(golden.image.files)
    return found


def golden_rows(
    outputs: Mapping[Tower, Mapping[str, Floats]], golden: Golden, *, precision: str, engine: str, required: float
) -> list[Row]:
    """`outputs`, as `golden_outputs` gives them, against those of the reference that the bundle carries."""
    samples = {"text": golden.text, "image": golden.image}
    return [
        compare(tower, name, found[name], expected, precision=precision, engine=engine, required=required)
        for tower, found in outputs.items()
        if (sample := samples[tower]) is not None
        for name, expected in sample.outputs.items()
    ]


def lowered(bundle: Bundle, precisions: Iterable[str]) -> Iterator[str]:
    """In words, whose contract asks for less than is usual: what was chosen at the build is not hidden here."""
    for name in precisions:
        required = required_cosine(bundle, name)
        if required < CONTRACTS[name]:
            yield f"{name} was built to keep {required:.7g}, which is less than the usual {CONTRACTS[name]:.7g}"


def missed(bundle: Bundle, precisions: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What those of `precisions` that were published below their contract missed."""
    contracts = bundle.manifest.contracts
    return {name: contracts[name].missed for name in precisions if name in contracts and not contracts[name].kept}


def find_runs(
    bundle: Bundle, backend: str | None, device: str | None, precision: str | None
) -> tuple[list[Run], tuple[str, ...], tuple[str, ...]]:
    """What is run to verify a bundle; notes; and in words what cannot be measured, and why. Raises as `load` does."""
    if backend is not None:
        return [_real(bundle, choose(bundle, backend=backend, device=device, precision=precision))], (), ()
    runs: dict[str, Run] = {}  # by title and precision: fp16 may be answered by plans of fp16all, which come again
    notes, unmeasured = list[str](), list[str]()
    ran = False
    for wanted in [precision] if precision is not None else list(bundle.manifest.variants):
        found = list(_choices(bundle, device, wanted))
        ran = ran or any(choice.plans for choice in found)
        runs |= {f"{choice.title} {choice.precision}": _real(bundle, choice) for choice in found}
        missing = simulation_lacks()
        if found:
            continue
        if missing is None:
            bundle.graph(bundle.spec.towers[0], wanted)  # raises where there is no such precision
            runs[wanted] = (f"simulation of {wanted}, cpu", wanted, partial(simulated, bundle, wanted, second=False))
        elif precision is not None:
            raise missing
        else:
            unmeasured.append(f"{wanted} was not measured: {missing.message}; {missing.hint}")
    plans = bundle.manifest.plans
    if plans and not ran:
        reasons = {name: backends.status(name).reason for name in sorted({plan.backend for plan in plans})}
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        notes.append(f"{len(plans)} plans were not run ({why})")
    return list(runs.values()), tuple(notes), tuple(unmeasured)


def _choices(bundle: Bundle, device: str | None, precision: str) -> Iterator[Choice]:
    """What runs `precision` here: the graphs, where the device can compute in it, and the best plans that fit."""
    if precision == CPU_INT8:
        yield choose(bundle, backend=GRAPHS, device="cpu", precision=precision)
        return
    if precision == FP32 or (device or "").startswith("cuda"):
        yield choose(bundle, backend=GRAPHS, device=device, precision=precision)
    plans = best_plans(bundle, device, precision)
    if plans is not None:
        yield plans


def _real(bundle: Bundle, choice: Choice) -> Run:
    return choice.title, choice.precision, partial(open_choice, bundle, choice)


def _text_outputs(encoder: Encoder, golden: TextGolden) -> dict[str, Floats]:
    if encoder.spec.context is None:
        return encoder.text_outputs(golden.texts, truncate=True)
    # Their ids were compared with the tokenizer's when the bundle was loaded.
    tokens = Tokens(golden.input_ids, golden.eot_index)
    feeds = sampled_feeds({"input_ids": golden.input_ids, "eot_index": golden.eot_index}, encoder.spec)
    return encoder.token_outputs(tokens, more={"layer": feeds["layer"]})


def required_cosine(bundle: Bundle, precision: str) -> float:
    """The least cosine that `precision` of `bundle` has to keep: that of its own contract, or of CONTRACTS."""
    contract = bundle.manifest.contracts.get(precision)
    return CONTRACTS[precision] if contract is None else contract.min_cosine


def allowed_recall_drop(bundle: Bundle, precision: str) -> float:
    """Points by which R@1 of `precision` may fall: by its own contract, or by MAX_RECALL_DROP."""
    contract = bundle.manifest.contracts.get(precision)
    own = None if contract is None else contract.max_recall_drop
    return MAX_RECALL_DROP[precision] if own is None else own


def require_contract(found: Replay) -> None:
    """Raise ContractError, naming the output or what was missed, for a verification that did not pass."""
    for row in found.rows:
        if not row.passed:
            raise ContractError(
                f"{row.precision} {row.tower} {row.output}: min cosine {row.min_cosine:.6f} to the fp32 reference on "
                f"{row.engine}, expected at least {row.required_cosine}; nothing is published",
                hint=_BELOW_FP32 if row.precision == FP32 else _BELOW_HALF,
            )
    for precision, words in found.missed.items():
        raise ContractError(f"{precision} missed its contract when it was built: {'; '.join(words)}", hint=_REBUILT)


def compare(
    tower: Tower,
    output: str,
    found: Floats,
    expected: Floats,
    *,
    precision: str = FP32,
    engine: str = "",
    required: float = CONTRACTS[FP32],
) -> Row:
    """`found` against `expected`, float32 [samples, ..., features]; another shape raises BundleIntegrityError."""
    if found.shape != expected.shape:
        message = f"{tower} {output}: the engine gives {list(found.shape)}, the golden samples {list(expected.shape)}"
        raise BundleIntegrityError(message, hint=REBUILD)
    cosine = cosines(found, expected)  # NaN, which keeps no contract, for a row that is zero or not finite
    first, second = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (found, expected))
    if output == "embedding":
        first, second = unit_rows(first), unit_rows(second)
    with np.errstate(invalid="ignore"):
        max_abs = float(np.abs(first - second).max())
    return Row(
        tower=tower,
        output=output,
        precision=precision,
        engine=engine,
        samples=len(expected),
        min_cosine=float(cosine.min()),
        p1_cosine=float(np.quantile(cosine, 0.01)),
        mean_cosine=float(cosine.mean()),
        max_abs=max_abs,
        required_cosine=required,
        cosines=cosine,
    )
