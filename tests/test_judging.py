"""Scores of embeddings, against the same in a few lines of numpy: cosine, agreement, recall, and what is no number."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clip_export import judging
from clip_export.bundle import Bundle
from clip_export.feeds import Feeds, Samples, golden_feeds
from clip_export.judging import Judge, Outputs, Reference, recall_drop, run_graph
from clip_export.pairs import hold_out
from clip_export.precision.search import search
from clip_export.retrieval import Recall, recall_at

DIM = 8
GOLDEN, HELD_OUT, BATCH = 5, 11, 4  # inputs, and how many of them at once


def batched(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """As `Reference` has it: the golden inputs in batches of their own, then the held-out ones."""
    starts = [*range(0, GOLDEN, BATCH), *range(GOLDEN, GOLDEN + HELD_OUT, BATCH), GOLDEN + HELD_OUT]
    ends = [min(end, GOLDEN) if start < GOLDEN else end for start, end in itertools.pairwise(starts)]
    return [
        {name: array[s:e] for name, array in arrays.items()} for s, e in zip(starts[:-1], ends, strict=True) if s < e
    ]


def reference(arrays: dict[str, np.ndarray]) -> Reference:
    feeds = batched({"pixels": np.arange(GOLDEN + HELD_OUT)[:, None]})
    outputs = batched(arrays)
    golden = sum(int(batch["pixels"][0, 0]) < GOLDEN for batch in feeds)
    return Reference(feeds=tuple(feeds), outputs=tuple(outputs), golden=golden, rows=np.arange(HELD_OUT))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def embeddings(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((GOLDEN + HELD_OUT, DIM), dtype=np.float32)


def blurred(array: np.ndarray, rng: np.random.Generator, amount: float = 0.6) -> np.ndarray:
    return (array + amount * rng.standard_normal(array.shape)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.astype(float) @ b.astype(float) / np.linalg.norm(a.astype(float)) / np.linalg.norm(b.astype(float)))


def nearest(row: np.ndarray, candidates: np.ndarray) -> int:
    return int(np.argmax([cosine(row, candidate) for candidate in candidates]))


def recalls(images: np.ndarray, texts: np.ndarray) -> tuple[float, float]:
    """R@1 of pairs, image to text and back, in points."""
    pairs = range(len(images))
    there = sum(nearest(images[i], texts) == i for i in pairs)
    back = sum(nearest(texts[i], images) == i for i in pairs)
    return 100 * there / len(images), 100 * back / len(images)


# Against numpy


def test_cosines_are_of_every_row_of_every_output(embeddings: np.ndarray, rng: np.random.Generator) -> None:
    arrays = {"embedding": embeddings, "hidden_states": rng.standard_normal((len(embeddings), 3, 6)).astype(np.float32)}
    found = {name: blurred(array, rng) for name, array in arrays.items()}
    score = Judge(reference=reference(arrays)).score(batched(found))
    expected = [cosine(a, b) for a, b in zip(found["embedding"], embeddings, strict=True)]
    states = (found["hidden_states"].reshape(-1, 6), arrays["hidden_states"].reshape(-1, 6))
    expected += [cosine(a, b) for a, b in zip(*states, strict=True)]
    assert score.cosine == pytest.approx(min(expected), abs=1e-12)
    assert score.mean_cosine == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("place", [0, GOLDEN - 1, GOLDEN, GOLDEN + HELD_OUT - 1])
def test_one_row_anywhere_is_enough(embeddings: np.ndarray, place: int) -> None:
    found = embeddings.copy()
    found[place] *= -1
    score = Judge(reference=reference({"embedding": embeddings})).score(batched({"embedding": found}))
    assert score.cosine == pytest.approx(-1)
    assert score.mean_cosine == pytest.approx(1 - 2 / len(embeddings))


def test_agreement_is_that_of_held_out_inputs(embeddings: np.ndarray, rng: np.random.Generator) -> None:
    others = rng.standard_normal((20, DIM)).astype(np.float32)
    found = blurred(embeddings, rng)
    score = Judge(reference=reference({"embedding": embeddings}), others=others).score(batched({"embedding": found}))
    same = [nearest(found[i], others) == nearest(embeddings[i], others) for i in range(GOLDEN, len(found))]
    assert 0 < sum(same) < len(same)
    assert score.agreement == sum(same) / len(same)
    assert score.recall_drop is None


def test_a_single_tower_is_compared_with_itself(embeddings: np.ndarray, rng: np.random.Generator) -> None:
    found, own = blurred(embeddings, rng, 1.5), embeddings[GOLDEN:]
    score = Judge(reference=reference({"embedding": embeddings})).score(batched({"embedding": found}))
    same = [nearest(row, own) == number for number, row in enumerate(found[GOLDEN:])]
    assert 0 < sum(same) < len(same)
    assert (score.agreement, score.recall_drop) == (sum(same) / len(same), None)


def test_the_reference_itself_is_perfect(embeddings: np.ndarray) -> None:
    score = Judge(reference=reference({"embedding": embeddings})).score(batched({"embedding": embeddings}))
    assert score.cosine == pytest.approx(1, abs=1e-12)
    assert (score.agreement, score.recall_drop) == (1, None)


def test_without_embeddings_there_is_no_retrieval(embeddings: np.ndarray, rng: np.random.Generator) -> None:
    found = blurred(embeddings, rng)
    score = Judge(reference=reference({"pooled": embeddings})).score(batched({"pooled": found}))
    assert score.cosine < 1
    assert (score.agreement, score.recall_drop) == (1, None)


def test_recall_falls_as_far_as_retrieval_by_hand_says(embeddings: np.ndarray, rng: np.random.Generator) -> None:
    texts = embeddings[GOLDEN:] + 0.1
    found = blurred(embeddings, rng, 1.2)
    expected = recall_at(embeddings[GOLDEN:], texts)
    judge = Judge(
        reference=reference({"embedding": embeddings}),
        others=texts,
        drop=lambda rows: recall_drop(recall_at(rows, texts), expected),
    )
    before, after = recalls(embeddings[GOLDEN:], texts), recalls(found[GOLDEN:], texts)
    drop = max(old - new for old, new in zip(before, after, strict=True))
    assert drop > 0
    assert judge.score(batched({"embedding": found})).recall_drop == pytest.approx(drop, abs=1e-6)


@pytest.mark.parametrize(
    ("found", "drop"),
    [((0.5, 0.75), 25), ((0.75, 0.5), 25), ((0.75, 0.75), 0), ((1.0, 0.75), 0), ((1.0, 1.0), -25)],
    ids=["there", "back", "neither", "one better", "both better"],
)
def test_the_direction_that_falls_more_counts(found: tuple[float, float], drop: float) -> None:
    expected = Recall(image_to_text=0.75, text_to_image=0.75)
    assert recall_drop(Recall(image_to_text=found[0], text_to_image=found[1]), expected) == drop


# What is no number


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize("place", [0, GOLDEN + 3])
def test_what_has_no_direction_is_as_far_off_as_can_be(embeddings: np.ndarray, value: float, place: int) -> None:
    found = embeddings.copy()
    found[place] = value
    score = Judge(reference=reference({"embedding": embeddings})).score(batched({"embedding": found}))
    assert score.cosine == -1
    assert np.isfinite([score.cosine, score.mean_cosine, score.agreement, score.damage]).all()
    lost = place >= GOLDEN  # golden samples are not searched for
    assert score.agreement == 1 - lost / HELD_OUT


def test_one_value_that_is_not_a_number_spoils_its_row(embeddings: np.ndarray) -> None:
    found = embeddings.copy()
    found[GOLDEN, 2] = np.nan
    texts = embeddings[GOLDEN:]
    expected = recall_at(embeddings[GOLDEN:], texts)
    judge = Judge(
        reference=reference({"embedding": embeddings}),
        others=texts,
        drop=lambda rows: recall_drop(recall_at(rows, texts), expected),
    )
    score = judge.score(batched({"embedding": found}))
    assert score.cosine == -1
    # It finds nothing; and as a candidate, it comes before every right one.
    assert score.recall_drop == 100


def test_nothing_is_quantized_where_everything_gives_nan(embeddings: np.ndarray) -> None:
    judge = Judge(reference=reference({"embedding": embeddings}))

    def evaluate(mix: frozenset[str]) -> object:
        return judge.score(batched({"embedding": np.full_like(embeddings, np.nan) if mix else embeddings}))

    found = search({"a": 1.0, "b": 2.0}, evaluate, lambda score: score.cosine >= -0.5)  # type: ignore[arg-type]
    assert found.mix == ()
    assert {high.linear for high in found.high} == {"a", "b"}


# What is compared


def test_outputs_that_lack_a_batch_are_an_error(embeddings: np.ndarray) -> None:
    outputs = batched({"embedding": embeddings})
    with pytest.raises(ValueError, match="is longer than"):
        Judge(reference=reference({"embedding": embeddings})).score(outputs[:-1])


def test_a_part_is_whole_batches_spread_evenly_and_all_golden_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "BATCH", BATCH)
    places = np.arange(GOLDEN + HELD_OUT, dtype=np.float32)
    whole = reference({"embedding": np.stack([places, places + 1], axis=1)})
    starts = range(0, HELD_OUT, BATCH)
    for wanted, batches in (
        (0, []),
        (1, [1]),
        (BATCH, [1]),
        (BATCH + 1, [0, 2]),
        (HELD_OUT, [0, 1, 2]),
        (99, [0, 1, 2]),
    ):
        part = whole.spread(wanted)
        assert part.golden == whole.golden
        assert list(part.feeds[: part.golden]) == list(whole.feeds[: whole.golden])
        rows = [row for batch in batches for row in range(HELD_OUT)[starts[batch] : starts[batch] + BATCH]]
        assert part.rows.tolist() == rows
        found = part.embeddings()
        assert rows == [] if found is None else (found[:, 0] - GOLDEN).tolist() == rows


def test_the_reference_is_the_fp32_graph_on_golden_samples_then_held_out_ones(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    items = tuple(f"{number} red stars" for number in range(12))
    samples = Samples(bundle=bundle, tower="text", items=items, held_out=hold_out(items), source="texts")
    found = Reference.of(samples)
    golden = bundle.golden().text
    assert golden is not None
    assert same(found.feeds[: found.golden], list(golden_feeds(bundle, "text")))
    assert same(found.feeds[found.golden :], samples.judges)
    assert same(found.outputs, run_graph(bundle.graph_path("text"), found.feeds))
    replayed = np.concatenate([batch["embedding"] for batch in found.outputs[: found.golden]])
    np.testing.assert_allclose(replayed, golden.outputs["embedding"], atol=1e-4)
    own = found.embeddings()
    assert own is not None
    assert len(own) == int(samples.held_out.sum())
    assert Judge(reference=dataclasses.replace(found)).score(found.outputs).cosine == pytest.approx(1)


def same(found: Sequence[Feeds] | Outputs, expected: Sequence[Feeds] | Outputs) -> bool:
    return len(found) == len(expected) and all(
        one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
        for one, two in zip(found, expected, strict=True)
    )
