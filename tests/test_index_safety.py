"""Index safety: known verdicts, figures against naive ones, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clip_export import index_search
from clip_export.errors import InputError
from clip_export.index_safety import compare_index, open_index


@pytest.fixture(autouse=True, params=[4096, 7])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_search, "_BLOCK", request.param)


def vectors(count: int = 200, dim: int = 32, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def noisy(rows: np.ndarray, noise: float) -> np.ndarray:
    return rows + noise * vectors(*rows.shape, seed=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_same_vectors_mix(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "x.npy", vectors().astype(dtype))
    found = compare_index(open_index(tmp_path / "x.npy"), vectors())
    assert found.safe
    assert found.verdict.startswith("Mix freely")
    assert (found.vectors, found.queries, found.misplaced, found.normalized) == (200, 200, 0, True)
    assert json.loads(json.dumps(found.to_dict()))["safe"] is True


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_figures_are_the_naive_ones(noise: float) -> None:
    old = vectors()
    new = noisy(old, noise)
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    found = compare_index(old, new)
    before, after = (rows.astype(np.float64) @ old.T.astype(np.float64) for rows in (old, new))
    own = np.diag(after).copy()
    for scores in (before, after):
        np.fill_diagonal(scores, -np.inf)
    first, second = (np.argsort(-scores, axis=1)[:, :10] for scores in (before, after))
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(first.tolist(), second.tolist(), strict=True)])
    shift = np.take_along_axis(after, first, 1) - np.take_along_axis(before, first, 1)
    assert found.neighbour_overlap == pytest.approx(overlap)
    assert found.shift_mean == pytest.approx(shift.mean(), abs=1e-6)
    assert found.own_cosine_min == pytest.approx(own.min(), abs=1e-6)
    assert not found.safe
    assert found.verdict.startswith("Re-embed")


def test_another_order_is_told_from_another_model() -> None:
    assert compare_index(vectors(), vectors()[::-1]).verdict.startswith("Not the same inputs")


def test_repeated_and_unnormalized_rows_are_noted() -> None:
    rows = np.concatenate([vectors(), vectors()[:3]])
    found = compare_index(rows * 2, rows)
    assert (found.safe, found.repeated, found.normalized, len(found.notes)) == (True, 3, False, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (vectors(200, 31), "31 dimensions, the engine gives 32"),
        (vectors(199), "199 vectors, and 200 inputs"),
        (vectors().astype(np.int32), "expected floats"),
        (vectors()[0], "expected floats"),
        (np.where(np.arange(200)[:, None] == 9, np.nan, vectors()), "row 9 (from 0): the vector holds NaN"),
        (np.where(np.arange(200)[:, None] == 9, np.inf, vectors()), "row 9 (from 0): the vector is not finite"),
        (np.where(np.arange(200)[:, None] == 9, 0, vectors()), "row 9 (from 0): the vector is all zeros"),
    ],
)
def test_an_index_that_cannot_be_compared(index: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as raised:
        compare_index(index, vectors())
    assert message in raised.value.message
    assert raised.value.hint


def test_files_that_are_no_index(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[{}]], object), allow_pickle=True)
    for data in (path.read_bytes(), b"PK\x03\x04", b"\x93NUMPY", b""):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"x\.npy") as raised:
            open_index(path)
        assert raised.value.hint
    with pytest.raises(InputError, match="No such file"):
        open_index(tmp_path / "none.npy")


def test_too_few_vectors_have_no_ten_neighbours() -> None:
    with pytest.raises(InputError, match="10 vectors, expected at least 101"):
        compare_index(vectors(10), vectors(10))
    assert compare_index(vectors(101), vectors(101)).safe
