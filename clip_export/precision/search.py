"""Which linears can be 8-bit together while the outputs keep a contract: the rest stays half, each with its reason.

Everything is tried first; where that keeps the contract it costs one evaluation. Otherwise each linear is tried alone.
Those that break the contract alone stay high. The others are ordered by damage per cost, and a binary search finds how
many of the worst have to stay high with them. Last, those are tried again beside what was found, the dearest first: a
prefix of an ordering is rarely the best set.

Where scores are those of a sample, `confirm` has the last word: what it refuses is made smaller, the worst first.

Damage seldom adds up exactly, and need not even grow with the mix, so nothing here is taken on trust: the mix that
comes out was evaluated and kept the contract, or is empty.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from clip_export.output_file import writing
from clip_export.progress import Progress, silent

Mix: TypeAlias = frozenset[str]

# How many linears are tried again at most, after the binary search: one evaluation each.
RETRIES = 8
_ON_ALL = "on all inputs: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a mix of 8-bit linears does to the outputs.

    `cosine` is the least over rows and `mean_cosine` their mean; `agreement` is the share of rows whose nearest
    neighbour stays the same; `recall_drop` in points of R@1, None where there are no pairs to measure it on.
    """

    cosine: float
    mean_cosine: float
    agreement: float
    recall_drop: float | None = None

    @property
    def damage(self) -> float:
        """What linears are ordered by: 1 - `cosine`; infinite where that is not a number.

        It counts up to twice where neighbours change: a direction that retrieval depends on was moved.
        """
        return math.inf if math.isnan(self.cosine) else (1 - self.cosine) * (2 - self.agreement)


@dataclass(frozen=True, slots=True, kw_only=True)
class High:
    """A linear that is not in the mix: `why`, in words, and its `score` with this linear alone in 8 bits."""

    linear: str
    why: str
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The `mix` that keeps the contract and its `score`; what is `high`. All in the order of `costs`.

    `sensitivity` has each linear's score alone; it is empty where everything kept the contract at once. `evaluations`
    is how often a mix was scored, those that a journal remembered among them. `share` is the mix's part of all costs,
    and `unquantized` the score of the empty mix, where somebody asked for it.
    """

    mix: tuple[str, ...]
    score: Score
    high: tuple[High, ...]
    sensitivity: Mapping[str, Score]
    evaluations: int
    share: float
    unquantized: Score | None = None


class Journal:
    """Scores of mixes, on disk as they are found, so that a search that was interrupted goes on.

    JSON lines: first the `key`, which says what is searched (graph, data, treatments), then one mix a line. A journal
    of another key is begun anew. What follows the last whole line, as after a crash, is dropped. `path` is this
    process's alone. Raises OutputError where it cannot be read or written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._scores: dict[Mix, Score] = {}
        header = _line({"key": key})
        with writing(path), path.open("a+b") as file:
            file.seek(0)
            whole = len(header) if file.readline() == header else 0
            for line in file if whole else ():
                entry = _entry(line)
                if entry is None:
                    break
                self._scores[entry[0]] = entry[1]
                whole += len(line)
            file.truncate(whole)  # or the next line would be appended to half of one
            if not whole:
                file.write(header)

    def find(self, mix: Mix) -> Score | None:
        """The score of `mix`, or None where it is not known."""
        return self._scores.get(mix)

    def add(self, mix: Mix, score: Score) -> None:
        """Remember the score of `mix`; it is in the file when this returns."""
        self._scores[mix] = score
        with writing(self._path), self._path.open("ab") as file:
            file.write(_line({"mix": sorted(mix), "score": dataclasses.asdict(score)}))


def search(
    costs: Mapping[str, float],
    evaluate: Callable[[Mix], Score],
    keeps: Callable[[Score], bool],
    *,
    confirm: Callable[[Mix], Score] | None = None,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Found:
    """A mix of the linears in `costs` whose score `keeps` the contract, with as much of the cost in it as was found.

    `costs` are the linears in graph order, with what each costs in half (FLOPs; finite and above 0). `evaluate` scores
    the linears of a mix in 8 bits and the rest in half. It is called at most `most_evaluations(len(costs))` times, and
    not for what `journal` remembers. `confirm`, where it is given, scores the mix that was found, on more inputs; where
    that breaks the contract, what of it keeps it is searched by the same steps, and these scores alone decide. It is
    called at most `most_evaluations` times for the linears in the mix. The result depends on the scores alone; equals
    are taken in graph order. Raises ValueError for a cost that cannot be divided by, and whatever `evaluate` and
    `confirm` raise.
    """
    for name, cost in costs.items():
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"the cost of {name} is {cost}, expected a finite number above 0")
    return _Search(costs, evaluate, keeps, confirm, journal, progress).run()


def most_evaluations(count: int) -> int:
    """The most evaluations that a search over `count` linears takes.

    Everything and nothing, each alone, a binary search, the retries: count + ⌈log2 count⌉ + RETRIES + 2.
    """
    return count + max(count - 1, 0).bit_length() + RETRIES + 2


@dataclass(slots=True)
class _Search:
    """One run of `search`: its arguments; the scores so far; those of linears alone, and of what was tried again."""

    costs: Mapping[str, float]
    evaluate: Callable[[Mix], Score]
    keeps: Callable[[Score], bool]
    confirm: Callable[[Mix], Score] | None
    journal: Journal | None
    progress: Progress
    scores: dict[Mix, Score] = field(default_factory=dict)
    sensitivity: dict[str, Score] = field(default_factory=dict)
    beside: dict[str, Score] = field(default_factory=dict)

    def run(self) -> Found:
        found = self.found(self.fitting())
        return found if self.confirm is None else self.confirmed(found, self.confirm)

    def fitting(self) -> Mix:
        mix = frozenset(self.costs)
        self.progress("quantize every layer", 0, 1)
        if self.keeps(self.score(mix)):
            return mix
        return self.retried(self.longest_that_keeps(self.worst_first()))

    def score(self, mix: Mix) -> Score:
        """The score of `mix`: of this run, of the journal, or evaluated now and written down."""
        if mix not in self.scores:
            score = self.journal.find(mix) if self.journal else None
            if score is None:
                score = self.evaluate(mix)
                if self.journal:
                    self.journal.add(mix, score)
            self.scores[mix] = score
        return self.scores[mix]

    def breaks_alone(self, name: str) -> bool:
        return name in self.sensitivity and not self.keeps(self.sensitivity[name])

    def worst_first(self) -> list[str]:
        """Those that break the contract alone, then the others by damage per cost."""
        for number, name in enumerate(self.costs):
            self.progress("quantize one layer alone", number, len(self.costs))
            self.sensitivity[name] = self.score(frozenset([name]))

        def key(name: str) -> tuple[bool, float]:
            return not self.breaks_alone(name), -self.sensitivity[name].damage / self.costs[name]

        return sorted(self.costs, key=key)  # stable: equals stay in graph order

    def longest_that_keeps(self, order: Sequence[str]) -> Mix:
        """A binary search over how many of the first in `order` stay high; the mix is the rest.

        `fails` linears high are too few and `fits` are enough: all but one are where the last keeps the contract
        alone, and all are in any case.
        """
        broken = sum(map(self.breaks_alone, order))
        fails = max(broken - 1, 0)
        fits = len(order) - (broken < len(order))
        steps = max(fits - fails - 1, 0).bit_length()
        step = 0
        while fits - fails > 1:
            self.progress("find how many layers fit together", step, steps)
            step += 1
            middle = (fails + fits) // 2
            if self.keeps(self.score(frozenset(order[middle:]))):
                fits = middle
            else:
                fails = middle
        return frozenset(order[fits:])

    def retried(self, mix: Mix) -> Mix:
        """`mix` with those of the others that fit beside it, the dearest first, at the cost of RETRIES evaluations."""
        limit = len(self.scores) + RETRIES
        others = [name for name in self.costs if name not in mix and not self.breaks_alone(name)]
        for number, name in enumerate(sorted(others, key=lambda name: -self.costs[name])):
            wider = mix | {name}
            if len(self.scores) == limit and wider not in self.scores:
                continue
            self.progress("try again the layers left out", number, len(others))
            self.beside[name] = self.score(wider)
            if self.keeps(self.beside[name]):
                mix = wider
        return mix

    def confirmed(self, found: Found, confirm: Callable[[Mix], Score]) -> Found:
        """`found`, or as much of it as keeps the contract where `confirm` scores it: searched for all over again.

        What more inputs refuse need not be what looked worst on fewer, so nothing but what they say is gone by.
        """
        costs = {name: self.costs[name] for name in found.mix}
        judged = _Search(costs, confirm, self.keeps, None, None, self.judging)
        inner = judged.found(judged.fitting())
        refused = [dataclasses.replace(item, why=f"{_ON_ALL}{item.why}") for item in inner.high]
        place = {name: number for number, name in enumerate(self.costs)}
        return dataclasses.replace(
            inner,
            high=tuple(sorted([*found.high, *refused], key=lambda item: place[item.linear])),
            sensitivity={**found.sensitivity, **inner.sensitivity},
            evaluations=found.evaluations + inner.evaluations,
            share=found.share * inner.share,
        )

    def judging(self, what: str, done: int, total: int) -> None:
        self.progress(f"{_ON_ALL}{what}", done, total)

    def found(self, mix: Mix) -> Found:
        total = sum(self.costs.values())
        return Found(
            mix=tuple(name for name in self.costs if name in mix),
            score=self.score(mix),
            high=tuple(self.high(mix)),
            sensitivity=self.sensitivity,
            evaluations=len(self.scores),
            share=sum(cost for name, cost in self.costs.items() if name in mix) / total if total else 0.0,
        )

    def high(self, mix: Mix) -> Iterator[High]:
        for name, score in self.sensitivity.items():
            if name in mix:
                continue
            if self.breaks_alone(name):
                why = f"alone it breaks the contract: {_words(score)}"
            elif name in self.beside:
                why = f"it does not fit beside the others: {_words(self.beside[name])}"
            else:
                why = f"it was left out for others that cost less accuracy; alone: {_words(score)}"
            yield High(linear=name, why=why, score=score)


def _words(score: Score) -> str:
    """For example: cosine 0.99213, agreement 98.4%, R@1 down by 0.40 points; what is as it was goes without saying."""
    words = f"cosine {score.cosine:.5f}"
    if score.agreement < 1:
        words += f", agreement {score.agreement:.1%}"
    if score.recall_drop is not None and score.recall_drop > 0:
        words += f", R@1 down by {score.recall_drop:.2f} points"
    return words


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _entry(line: bytes) -> tuple[Mix, Score] | None:
    """What `Journal.add` wrote as `line`; None for anything else, such as half of it."""
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
        return frozenset(map(str, fields["mix"])), Score(**fields["score"])
    except (ValueError, TypeError, KeyError):
        return None
