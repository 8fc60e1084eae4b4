"""Recall and agreement against naive ones over the whole matrix, and against torch's topk; ties, NaN, blocks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_export import retrieval
from clip_export.retrieval import Recall, pair_ranks, recall_at, top1_agreement


def random_pairs(count: int, dim: int = 8, noise: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, dim)).astype(np.float32)
    return images, images + rng.normal(0, noise, (count, dim)).astype(np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
    unit = torch.nn.functional.normalize
    return unit(torch.from_numpy(a).double()) @ unit(torch.from_numpy(b).double()).T


def torch_recall(similarity: torch.Tensor, right: torch.Tensor, k: int) -> float:
    """The share of rows with a right one among torch's k nearest."""
    return right.gather(1, similarity.topk(k, dim=1).indices).any(dim=1).double().mean().item()


def naive_ranks(cosine: np.ndarray, right: np.ndarray) -> list[int]:
    """Row by row: how many wrong ones are as near as the best right one, plus 1."""
    return [
        1 + sum(near >= max(row[fits]) - 1e-12 for near in row[~fits]) for row, fits in zip(cosine, right, strict=True)
    ]


@pytest.fixture(autouse=True, params=[2**24, 64])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is said twice: in one block, and in many that do not divide the rows evenly."""
    monkeypatch.setattr(retrieval, "_BLOCK", request.param)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_is_torchs_where_nothing_is_tied(k: int) -> None:
    images, texts = random_pairs(101)
    similarity, right = cosines(images, texts), torch.eye(101, dtype=torch.bool)
    expected = Recall(
        image_to_text=torch_recall(similarity, right, k), text_to_image=torch_recall(similarity.T, right, k)
    )
    assert recall_at(images, texts, k) == expected
    assert 0 < expected.image_to_text < 1
    assert expected.image_to_text != expected.text_to_image  # or a mix-up of the two would pass


@pytest.mark.parametrize("k", [1, 5])
def test_equal_captions_and_equal_pictures_are_right(k: int) -> None:
    images, texts = random_pairs(60)
    labels, files = [f"caption {i % 23}" for i in range(60)], [i // 2 for i in range(60)]
    by_label, by_file = (np.equal.outer(names, names) for names in (np.array(labels), np.array(files)))
    similarity = cosines(images, texts)
    for given_names, right in (
        ({"labels": labels}, by_label),
        ({"pictures": files}, by_file),
        ({"labels": labels, "pictures": files}, by_label | by_file),
    ):
        found = recall_at(images, texts, k, **given_names)
        mask = torch.from_numpy(right)
        assert found.image_to_text == torch_recall(similarity, mask, k)
        assert found.text_to_image == torch_recall(similarity.T, mask, k)
    assert found.image_to_text > recall_at(images, texts, k).image_to_text


# Small whole numbers: many ties, and zero rows are left out since they find nothing by definition.
ROWS = st.lists(st.integers(-2, 2), min_size=2, max_size=2).filter(any)


@given(st.lists(st.tuples(ROWS, ROWS, st.integers(0, 3)), min_size=1, max_size=20), st.booleans())
def test_ranks_are_the_naive_ones(rows: list[tuple[list[int], list[int], int]], labelled: bool) -> None:
    images, texts = (np.array([row[side] for row in rows], np.float32) for side in (0, 1))
    labels = [row[2] for row in rows] if labelled else list(range(len(rows)))
    cosine, right = cosines(images, texts).numpy(), np.equal.outer(np.array(labels), np.array(labels))
    by_image, by_text = pair_ranks(images, texts, labels=labels)
    assert by_image.tolist() == naive_ranks(cosine, right)
    assert by_text.tolist() == naive_ranks(cosine.T, right)


def test_a_model_that_gives_one_point_finds_nothing() -> None:
    same = np.full((50, 8), 0.3, np.float32)
    assert recall_at(same, same) == Recall(image_to_text=0, text_to_image=0)
    assert recall_at(same, same, 49) == Recall(image_to_text=0, text_to_image=0)
    assert recall_at(same, same, labels=["a"] * 50) == Recall(image_to_text=1, text_to_image=1)


def test_equal_rows_are_tied_however_their_sums_are_taken() -> None:
    """Each text twice, under two labels, at columns that a matrix product treats differently."""
    images, _ = random_pairs(67, dim=515)
    images[33:66] = images[:33]
    by_image, by_text = pair_ranks(images, images.copy())
    assert (by_image[:66] == 2).all() and (by_text[:66] == 2).all()
    assert by_image[66] == by_text[66] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_that_are_no_direction_find_nothing(bad: float) -> None:
    images, _ = random_pairs(20)
    texts = images.copy()
    images[3] = bad
    by_image, by_text = pair_ranks(images, texts)
    assert by_image[3] == by_text[3] == 21
    assert (np.delete(by_image, 3) == 1).all()
    assert (np.delete(by_text, 3) == 2).all()  # the image that is no number comes first, as in torch
    nan = torch.tensor([[0.5, torch.nan, 0.9]])
    assert nan.topk(1).indices.item() == 1
    assert recall_at(images, texts, 20) == Recall(image_to_text=0.95, text_to_image=0.95)
    assert recall_at(images[3:4], texts[3:4], 5, labels=["a"]) == Recall(image_to_text=0, text_to_image=0)


def test_lengths_of_rows_do_not_matter() -> None:
    images, texts = random_pairs(40)
    lengths = np.random.default_rng(1).uniform(0.1, 10, (40, 1)).astype(np.float32)
    assert recall_at(images * lengths, texts / lengths) == recall_at(images, texts)


def test_agreement_is_that_of_torchs_nearest() -> None:
    expected, found = random_pairs(90, noise=0.3)
    others, _ = random_pairs(37, seed=5)
    same = cosines(found, others).argmax(dim=1) == cosines(expected, others).argmax(dim=1)
    assert top1_agreement(found, expected, others) == pytest.approx(same.double().mean().item())
    assert 0.3 < same.double().mean() < 1
    assert top1_agreement(expected, expected, others) == 1


def test_agreement_on_ties() -> None:
    others = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    left, right, middle = np.array([[1, 0.1]]), np.array([[0.1, 1]]), np.array([[1, 1]])
    assert top1_agreement(left, left, others) == 1  # two equal captions were nearest before
    assert top1_agreement(middle, left, others) == 0  # a new tie: a sort may pick the third
    assert top1_agreement(left, middle, others) == 1  # whatever a sort picks was nearest before
    assert top1_agreement(right, left, others) == 0


@pytest.mark.parametrize("bad", [np.nan, 0.0])
def test_agreement_with_what_is_no_direction(bad: float) -> None:
    rows, others = random_pairs(10)
    broken = rows.copy()
    broken[4] = bad
    assert top1_agreement(broken, rows, others) == 0.9
    assert top1_agreement(rows, broken, others) == 0.9
    assert top1_agreement(broken, broken, others) == 0.9
    assert top1_agreement(rows, rows, broken) == 0


def test_memory_is_that_of_the_rows_and_a_block(block: None) -> None:
    images, texts = random_pairs(3000, dim=16)
    tracemalloc.start()
    recall_at(images, texts)
    top1_agreement(images, texts, texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = 3000 * 3000 * 8
    assert peak < (whole / 10 if retrieval._BLOCK == 64 else 2 * whole)


def test_shapes_that_are_no_pairs() -> None:
    images, texts = random_pairs(4)
    with pytest.raises(ValueError, match="4 images and 3 texts"):
        recall_at(images, texts[:3])
    with pytest.raises(ValueError, match="0 images and 0 texts"):
        recall_at(images[:0], texts[:0])
    with pytest.raises(ValueError, match=r"expected .rows, dim. of one dim"):
        recall_at(images, texts[:, :3])
    with pytest.raises(ValueError, match="recall at 0"):
        recall_at(images, texts, 0)
    with pytest.raises(ValueError, match="3 labels for 4 pairs"):
        recall_at(images, texts, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="4 rows, 2 expected and 4 others"):
        top1_agreement(images, texts[:2], texts)
