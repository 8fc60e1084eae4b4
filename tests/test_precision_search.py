"""The search for 8-bit linears, on damage that is made up: what it finds, what it costs, and that it can go on."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_export.errors import OutputError
from clip_export.precision.search import (
    RETRIES,
    Found,
    Journal,
    Mix,
    Score,
    most_evaluations,
    search,
)

REQUIRED = 0.99
NAMES = [f"blocks.{block}.{part}" for block in range(4) for part in ("attention.qkv", "mlp.fc1", "mlp.fc2")]


def keeps(score: Score) -> bool:
    return score.cosine >= REQUIRED


class Additive:
    """Linears whose damages add up, and the mixes that were asked for."""

    def __init__(self, damages: dict[str, float]) -> None:
        self.damages = damages
        self.asked: list[Mix] = []

    def __call__(self, mix: Mix) -> Score:
        self.asked.append(mix)
        damage = math.fsum(self.damages[name] for name in mix)
        return Score(cosine=1 - damage, mean_cosine=1 - damage / 2, agreement=1.0)


class PowerCutError(Exception):
    """What a power cut is to the search."""


def stopping(evaluate: Callable[[Mix], Score], after: int) -> Callable[[Mix], Score]:
    """`evaluate`, which fails once it was called `after` times."""
    calls = itertools.count()

    def run(mix: Mix) -> Score:
        if next(calls) == after:
            raise PowerCutError
        return evaluate(mix)

    return run


def costs(names: list[str]) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


# What is found


def test_everything_keeps_it_in_one_evaluation() -> None:
    evaluate = Additive(dict.fromkeys(NAMES, 1e-4))
    found = search(costs(NAMES), evaluate, keeps)
    assert found.mix == tuple(NAMES)
    assert found.high == ()
    assert found.sensitivity == {}
    assert (found.evaluations, found.share) == (1, 1.0)
    assert evaluate.asked == [frozenset(NAMES)]


def test_nothing_keeps_it() -> None:
    evaluate = Additive(dict.fromkeys(NAMES, 0.5))
    found = search(costs(NAMES), evaluate, keeps)
    assert found.mix == ()
    assert found.share == 0
    assert found.score.cosine == 1.0  # that of the half graph
    assert [high.linear for high in found.high] == NAMES
    assert all(high.why.startswith("alone it breaks the contract: cosine 0.50000") for high in found.high)
    assert found.evaluations == len(evaluate.asked) == len(NAMES) + 2  # everything, each alone, nothing


def test_a_contract_that_cannot_be_kept_ends_with_nothing() -> None:
    found = search(costs(NAMES), Additive(dict.fromkeys(NAMES, 0.0)), lambda score: False)
    assert found.mix == ()


def test_no_linears_and_one() -> None:
    assert search({}, Additive({}), keeps).evaluations == 1
    alone = search({"a": 2.0}, Additive({"a": 0.1}), keeps)
    assert (alone.mix, alone.evaluations, [high.linear for high in alone.high]) == ((), 2, ["a"])


def test_additive_damage_is_spent_where_it_pays() -> None:
    """Room for 0.01: the culprit of 0.02 goes for itself; of the others, those that cost most for their damage stay."""
    damages = {"culprit": 0.02, "dear": 0.006, "cheap": 0.006, "small": 0.001, "free": 0.0}
    shares = {"culprit": 8.0, "dear": 8.0, "cheap": 2.0, "small": 1.0, "free": 1.0}
    found = search(shares, Additive(damages), keeps)
    assert found.mix == ("dear", "small", "free")
    assert found.share == 0.5
    assert found.score.cosine == pytest.approx(0.993)
    why = {high.linear: high.why for high in found.high}
    assert why["culprit"] == "alone it breaks the contract: cosine 0.98000"
    assert why["cheap"] == "it does not fit beside the others: cosine 0.98700"


def test_a_linear_left_out_is_taken_back_where_it_fits() -> None:
    """By damage per cost "wide" is the worst, but with "costly" out there is room for it; a prefix would lose it."""
    damages = {"costly": 0.0085, "wide": 0.0009, "rest": 0.0089}
    shares = {"costly": 9.0, "wide": 0.5, "rest": 10.0}
    found = search(shares, Additive(damages), keeps)
    assert found.mix == ("wide", "rest")
    assert [high.linear for high in found.high] == ["costly"]


def test_the_dearest_is_taken_back_first() -> None:
    """Beside the rest there is room for one of the first two; beside "wide" for none."""
    damages = {"first": 0.005, "dearest": 0.0055, "wide": 0.0065, "rest": 0.004}
    shares = {"first": 0.95, "dearest": 1.0, "wide": 1.3, "rest": 9.0}
    found = search(shares, Additive(damages), keeps)
    assert found.mix == ("dearest", "rest")
    assert [high.linear for high in found.high] == ["first", "wide"]


def test_equals_are_taken_in_graph_order() -> None:
    evaluate = Additive(dict.fromkeys(NAMES, 0.003))
    found = search(costs(NAMES), evaluate, keeps)
    assert found.mix == tuple(NAMES[-3:])


def test_a_cosine_that_is_not_a_number_is_the_worst_damage() -> None:
    def evaluate(mix: Mix) -> Score:
        cosine = math.nan if "overflows" in mix else 1 - 0.006 * len(mix)
        return Score(cosine=cosine, mean_cosine=cosine, agreement=1.0)

    found = search(costs(["a", "overflows", "b"]), evaluate, keeps)
    assert found.mix == ("b",)
    assert "cosine nan" in next(high.why for high in found.high if high.linear == "overflows")


def test_damage_that_is_not_monotone_gives_a_mix_that_was_seen_to_keep_the_contract() -> None:
    """Errors that cancel: pairs are better than what they are made of."""
    seen: dict[Mix, Score] = {}

    def evaluate(mix: Mix) -> Score:
        damage = 0.004 * abs(sum(-1 if NAMES.index(name) % 2 else 1 for name in mix)) + 0.0025 * (len(mix) > 7)
        seen[mix] = Score(cosine=1 - 3 * damage, mean_cosine=1 - damage, agreement=1.0)
        return seen[mix]

    found = search(costs(NAMES), evaluate, lambda score: score.cosine >= 0.995)
    assert found.score == seen[frozenset(found.mix)]
    assert found.score.cosine >= 0.995 or not found.mix


def test_recall_is_among_the_reasons() -> None:
    def evaluate(mix: Mix) -> Score:
        return Score(cosine=0.999, mean_cosine=0.999, agreement=0.5, recall_drop=1.25 * len(mix))

    found = search(costs(["a"]), evaluate, lambda score: score.recall_drop == 0)
    assert found.high[0].why.endswith("cosine 0.99900, agreement 50.0%, R@1 down by 1.25 points")


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_costs_that_cannot_be_divided_by(cost: float) -> None:
    with pytest.raises(ValueError, match=r"the cost of a is .*, expected a finite number above 0"):
        search({"a": cost}, Additive({"a": 0.0}), keeps)


# What it costs


@st.composite
def any_scores(draw: st.DrawFn) -> tuple[dict[str, float], Callable[[Mix], Score]]:
    """Costs, and scores without any rule: each mix has its own, and it may be NaN."""
    names = [f"linear {number}" for number in range(draw(st.integers(0, 40)))]
    seed, mean = draw(st.integers(0, 2**32)), draw(st.floats(0, 1))

    def evaluate(mix: Mix) -> Score:
        cosine = (hash((seed, tuple(sorted(map(names.index, mix))))) % 1000) / 1000 * mean * 2
        return Score(cosine=math.nan if cosine > 1.9 else cosine, mean_cosine=cosine, agreement=1.0)

    amounts = draw(st.lists(st.floats(1e-3, 1e12), min_size=len(names), max_size=len(names)))
    return dict(zip(names, amounts, strict=True)), evaluate


@given(any_scores(), st.floats(0, 2))
def test_evaluations_are_bounded_and_the_mix_keeps_the_contract(
    problem: tuple[dict[str, float], Callable[[Mix], Score]], required: float
) -> None:
    amounts, evaluate = problem
    asked: list[Mix] = []

    def counted(mix: Mix) -> Score:
        asked.append(mix)
        return evaluate(mix)

    found = search(amounts, counted, lambda score: score.cosine >= required)
    count = len(amounts)
    assert len(asked) == len(set(asked)) == found.evaluations <= most_evaluations(count)
    assert most_evaluations(count) == count + (math.ceil(math.log2(count)) if count else 0) + RETRIES + 2
    assert not found.mix or found.score.cosine >= required
    assert frozenset(found.mix) in asked
    if found.sensitivity:
        assert sorted([*found.mix, *(high.linear for high in found.high)]) == sorted(amounts)


@given(st.lists(st.tuples(st.floats(1e-6, 0.02), st.floats(0.5, 9)), min_size=1, max_size=24))
def test_additive_damage_leaves_no_room_for_the_next(pairs: list[tuple[float, float]]) -> None:
    """Where no more than RETRIES are tried again, none of those left high would fit in what was found."""
    names = [f"linear {number}" for number in range(len(pairs))]
    damages = {name: damage for name, (damage, _) in zip(names, pairs, strict=True)}
    evaluate = Additive(damages)
    found = search({name: cost for name, (_, cost) in zip(names, pairs, strict=True)}, evaluate, keeps)
    left = [high.linear for high in found.high if damages[high.linear] <= 1 - REQUIRED]
    if len(left) <= RETRIES:
        assert not any(keeps(evaluate(frozenset({*found.mix, name}))) for name in left)


# What a sample does not show


def test_what_more_inputs_refuse_is_made_smaller_from_the_worst_on() -> None:
    """The sample passes everything; all inputs see ten times the damage."""
    damages = {name: 0.0002 * number for number, name in enumerate(NAMES, start=1)}
    sample, whole = Additive({name: 0.1 * damage for name, damage in damages.items()}), Additive(damages)
    found = search(costs(NAMES), sample, keeps, confirm=whole)
    assert found.score == whole(frozenset(found.mix))
    assert keeps(found.score)
    assert found.high
    for high in found.high:  # each is one too many
        assert not keeps(whole(frozenset({*found.mix, high.linear})))
        assert high.why.startswith("on all inputs: ")
    assert sorted([*found.mix, *(high.linear for high in found.high)], key=NAMES.index) == NAMES


def test_one_that_looks_harmless_in_the_sample_does_not_cost_the_others() -> None:
    """Ordered by the sample it would be the last to go, and every layer would go before it."""
    sample = dict.fromkeys((str(number) for number in range(24)), 1e-4)
    sample["7"] = 9e-5
    whole = Additive(sample | {"7": 0.02})
    found = search(costs(list(sample)), Additive(sample), keeps, confirm=whole)
    assert set(sample) - set(found.mix) == {"7"}
    (refused,) = found.high
    assert refused.why == "on all inputs: alone it breaks the contract: cosine 0.98000"
    assert keeps(found.score)


def test_the_part_that_is_left_out_for_the_sample_stays_out() -> None:
    """What the sample refuses is not asked of all inputs again, and each reason is the one of who refused."""
    sample = Additive({"a": 0.02, "b": 1e-4, "c": 1e-4})
    whole = Additive({"a": 1e-5, "b": 0.02, "c": 1e-4})
    found = search(costs(["a", "b", "c"]), sample, keeps, confirm=whole)
    assert found.mix == ("c",)
    assert [(high.linear, high.why.startswith("on all inputs: ")) for high in found.high] == [("a", False), ("b", True)]
    assert not any("a" in mix for mix in whole.asked)
    assert found.share == pytest.approx(1 / 3)
    assert found.evaluations == len(sample.asked) + len(whole.asked)


def test_what_is_confirmed_at_once_costs_one_evaluation_more() -> None:
    damages = Additive(dict.fromkeys(NAMES, 1e-6))
    found = search(costs(NAMES), damages, keeps, confirm=damages)
    assert damages.asked == [frozenset(NAMES)] * 2
    assert (found.mix, found.evaluations, found.high) == (tuple(NAMES), 2, ())


@given(st.lists(st.tuples(st.floats(0, 0.02), st.floats(0, 0.02)), max_size=20))
def test_confirmations_are_bounded_and_what_comes_out_was_confirmed(damages: list[tuple[float, float]]) -> None:
    names = [str(number) for number in range(len(damages))]
    sample, whole = (Additive(dict(zip(names, (pair[which] for pair in damages), strict=True))) for which in (0, 1))
    found = search(costs(names), sample, keeps, confirm=whole)
    assert len(whole.asked) <= most_evaluations(len(names))
    assert len(sample.asked) <= most_evaluations(len(names))
    assert not found.mix or (frozenset(found.mix) in whole.asked and keeps(found.score))


def test_neighbours_that_change_weigh_more() -> None:
    quiet = Score(cosine=0.999, mean_cosine=0.999, agreement=1.0)
    loud = Score(cosine=0.999, mean_cosine=0.999, agreement=0.5)
    assert quiet.damage < loud.damage <= 2 * quiet.damage


def test_progress_says_what_is_tried() -> None:
    said: list[tuple[str, int, int]] = []
    damages = {name: 0.001 * number for number, name in enumerate(NAMES)}
    search(costs(NAMES), Additive(damages), keeps, progress=lambda *step: said.append(step))
    steps = list(dict.fromkeys(step for step, _, _ in said))
    assert steps == [
        "quantize every layer",
        "quantize one layer alone",
        "find how many layers fit together",
        "try again the layers left out",
    ]
    assert [done for step, done, _ in said if step == steps[1]] == list(range(len(NAMES)))
    assert all(0 <= done < total for _, done, total in said)


# The journal

DAMAGES = {name: 0.0004 * (1 + 7 * number % 11) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def whole() -> tuple[Found, int]:
    """What a search without a journal finds, and how many evaluations it takes."""
    evaluate = Additive(DAMAGES)
    return search(costs(NAMES), evaluate, keeps), len(evaluate.asked)


def test_the_same_search_finds_the_same(whole: tuple[Found, int]) -> None:
    assert search(costs(NAMES), Additive(DAMAGES), keeps) == whole[0]
    assert whole[0].mix and whole[0].high  # or what follows would show little


def test_an_interrupted_search_goes_on_wherever_it_stopped(tmp_path: Path, whole: tuple[Found, int]) -> None:
    found, evaluations = whole
    for after in range(evaluations):
        path = tmp_path / f"{after}.jsonl"
        with pytest.raises(PowerCutError):
            search(costs(NAMES), stopping(Additive(DAMAGES), after), keeps, journal=Journal(path, "key"))
        evaluate = Additive(DAMAGES)
        assert search(costs(NAMES), evaluate, keeps, journal=Journal(path, "key")) == found
        assert len(evaluate.asked) == evaluations - after


def test_a_journal_torn_at_any_byte_of_its_last_line(tmp_path: Path, whole: tuple[Found, int]) -> None:
    path = tmp_path / "journal.jsonl"
    search(costs(NAMES), Additive(DAMAGES), keeps, journal=Journal(path, "key"))
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(data)):
        path.write_bytes(data[:end])
        evaluate = Additive(DAMAGES)
        assert search(costs(NAMES), evaluate, keeps, journal=Journal(path, "key")) == whole[0]
        assert len(evaluate.asked) == 1
        assert path.read_bytes() == data


def test_a_journal_torn_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "key")
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        Journal(path, "key").add(frozenset("ab"), Score(cosine=1.0, mean_cosine=1.0, agreement=1.0))
        assert path.read_bytes().startswith(data)
        assert Journal(path, "key").find(frozenset("ab")) is not None


@pytest.mark.parametrize("line", [b"\0" * 40, b"[]", b'{"mix": ["c"]}', b'{"mix": ["c"], "score": {"cosin', b"\xff"])
def test_what_follows_a_damaged_line_is_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    score = Score(cosine=0.1 + 0.2, mean_cosine=math.inf, agreement=1 / 3, recall_drop=0.1)
    Journal(path, "key").add(frozenset("ab"), score)
    good = path.read_bytes()
    path.write_bytes(good + line + b"\n" + good.splitlines(keepends=True)[1].replace(b'"a"', b'"c"'))
    journal = Journal(path, "key")
    assert journal.find(frozenset("ab")) == score
    assert journal.find(frozenset("cb")) is None
    assert path.read_bytes() == good


def test_a_journal_of_another_key_is_not_used(tmp_path: Path, whole: tuple[Found, int]) -> None:
    path = tmp_path / "journal.jsonl"
    search(costs(NAMES), Additive(dict.fromkeys(NAMES, 0.0)), keeps, journal=Journal(path, "another"))
    evaluate = Additive(DAMAGES)
    assert search(costs(NAMES), evaluate, keeps, journal=Journal(path, "key")) == whole[0]
    assert len(evaluate.asked) == whole[1]
    assert json.loads(path.read_bytes().splitlines()[0]) == {"key": "key"}


def test_a_score_that_is_not_a_number_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "key").add(frozenset(), Score(cosine=math.nan, mean_cosine=1.0, agreement=0.0))
    found = Journal(path, "key").find(frozenset())
    assert found is not None and math.isnan(found.cosine) and found.recall_drop is None


def test_a_journal_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"journal\.jsonl cannot be written: no such file or directory"):
        Journal(tmp_path / "nowhere" / "journal.jsonl", "key")
