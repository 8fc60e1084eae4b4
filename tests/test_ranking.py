"""Ranks and losses by tile against naive ones over the whole matrix, open_clip's losses and its retrieval metrics."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_export import ranking, similarity_tiles
from clip_export.ranking import RECALL_AT, RankComparison, compare_ranks
from clip_export.retrieval import pair_ranks

SCALE = 20.0
open_clip_loss = oracles.open_clip().loss


def random_pairs(count: int, dim: int = 16, noise: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, dim)).astype(np.float32)
    return images, images + rng.normal(0, noise, (count, dim)).astype(np.float32)


def compare(images: np.ndarray, texts: np.ndarray, **options: object) -> RankComparison:
    """A model with itself, every picture and caption different unless told otherwise."""
    names: dict[str, object] = {"captions": range(len(images)), "pictures": range(len(images)), "scale": SCALE}
    return compare_ranks(images, texts, images, texts, **(names | options))  # type: ignore[arg-type]


def unit(rows: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(rows)).double())


@pytest.fixture(autouse=True, params=[(2048, 32), (7, 32), (7, 0), (7, 10**9)], ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is said in one tile, and in many that do not divide the rows evenly.

    In the latter what is unclear in float32 is multiplied again the cheaper way, always by pair, and always by tile.
    """
    for name, value in zip(("_TILE", "_PAIR_COST"), request.param, strict=True):
        monkeypatch.setattr(similarity_tiles, name, value)


def test_recall_is_open_clips_where_nothing_is_tied() -> None:
    images, texts = random_pairs(101)
    metrics = oracles.open_clip_train().get_clip_metrics(unit(images), unit(texts), torch.tensor(SCALE))
    found = compare(images, texts).reference.recall
    for k in RECALL_AT:
        assert found[k].image_to_text == pytest.approx(metrics[f"image_to_text_R@{k}"])
        assert found[k].text_to_image == pytest.approx(metrics[f"text_to_image_R@{k}"])
    assert 0 < found[1].image_to_text < found[10].image_to_text < 1
    assert found[1].image_to_text != found[1].text_to_image  # or a mix-up of the two would pass


@pytest.mark.parametrize("noise", [0.1, 0.8, 3.0])
def test_the_loss_is_open_clips(noise: float) -> None:
    images, texts = random_pairs(60, noise=noise)
    expected = open_clip_loss.ClipLoss()(unit(images), unit(texts), SCALE).item()
    logits = SCALE * unit(images) @ unit(texts).T
    entropies = [torch.nn.functional.cross_entropy(each, torch.arange(60)).item() for each in (logits, logits.T)]
    assert expected == pytest.approx(sum(entropies) / 2)
    assert compare(images, texts).reference.loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_the_sigmoid_loss_is_open_clips(bias: float) -> None:
    images, texts = random_pairs(60)
    expected = open_clip_loss.SigLipLoss()(unit(images), unit(texts), SCALE, bias).item()
    assert compare(images, texts, bias=bias).reference.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bias", [None, -5.0])
def test_a_scale_that_would_overflow_does_not(bias: float | None) -> None:
    images, texts = random_pairs(40, noise=2.0)
    arguments = unit(images), unit(texts), 5000.0
    expected = open_clip_loss.ClipLoss()(*arguments) if bias is None else open_clip_loss.SigLipLoss()(*arguments, bias)
    found = compare(images, texts, scale=5000.0, bias=bias).reference.loss
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("bias", [None, -5.0])
def test_a_repeated_caption_or_picture_is_in_the_loss_as_often_as_in_the_pairs(bias: float | None) -> None:
    """As in a batch of training, where only the row's own is right."""
    images, texts = random_pairs(30)
    rng = np.random.default_rng(1)
    pictures, captions = rng.integers(0, 12, 50), rng.integers(0, 15, 50)
    assert len(set(zip(pictures.tolist(), captions.tolist(), strict=True))) < 50  # a whole pair is there twice
    first, second = images[pictures], texts[captions]
    arguments = unit(first), unit(second), SCALE
    expected = open_clip_loss.ClipLoss()(*arguments) if bias is None else open_clip_loss.SigLipLoss()(*arguments, bias)
    found = compare(first, second, pictures=pictures.tolist(), captions=captions.tolist(), bias=bias)
    assert found.reference.loss == pytest.approx(expected.item(), rel=1e-5)
    assert (found.pairs, found.pictures, found.captions) == (50, len(set(pictures)), len(set(captions)))


# Small whole numbers: many ties.
ROWS = st.lists(st.integers(-2, 2), min_size=2, max_size=2).filter(any)


@given(
    st.lists(ROWS, min_size=1, max_size=9),
    st.lists(ROWS, min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=25),
)
def test_recall_is_the_naive_one_whatever_is_repeated(
    images: list[list[int]], texts: list[list[int]], places: list[tuple[int, int]]
) -> None:
    pairs = [(picture % len(images), caption % len(texts)) for picture, caption in places]
    found = compare(
        np.array([images[picture] for picture, _ in pairs], np.float32),
        np.array([texts[caption] for _, caption in pairs], np.float32),
        pictures=[picture for picture, _ in pairs],
        captions=[caption for _, caption in pairs],
    )
    cosine = (unit(np.array(images)) @ unit(np.array(texts)).T).numpy()
    for k in RECALL_AT:
        there = [naive_rank(cosine, pairs, picture) <= k for picture, _ in pairs]
        turned = [(caption, picture) for picture, caption in pairs]
        back = [naive_rank(cosine.T, turned, caption) <= k for caption, _ in turned]
        assert found.reference.recall[k].image_to_text == pytest.approx(np.mean(there))
        assert found.reference.recall[k].text_to_image == pytest.approx(np.mean(back))


def naive_rank(cosine: np.ndarray, pairs: list[tuple[int, int]], query: int) -> int:
    """Among the different candidates that are in a pair: how many wrong ones are as near as the best right one."""
    right = {candidate for other, candidate in pairs if other == query}
    best = max(cosine[query, candidate] for candidate in right)
    return 1 + sum(cosine[query, wrong] >= best - 1e-12 for wrong in {c for _, c in pairs} - right)


def test_candidates_closer_than_float32_can_tell_are_told_apart() -> None:
    """Steps of 1e-9 in the cosine, in a random order: float32 gives one value for dozens of them."""
    count = 200
    steps = np.random.default_rng(3).permutation(count)
    angles = math.pi / 3 + 1e-9 * steps
    texts = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    images = np.tile([[1.0, 0.0]], (count, 1))
    assert len(np.unique(np.float32(texts[:, 0]))) < 20
    by_image, _ = pair_ranks(images, texts)
    assert by_image.tolist() == (1 + steps).tolist()
    found = compare(images, texts).reference.recall
    assert [found[k].image_to_text for k in RECALL_AT] == [k / count for k in RECALL_AT]
    reversed_texts = texts[::-1].copy()
    flips = compare_ranks(images, texts, images, reversed_texts, captions=range(count), pictures=range(count),
                          scale=SCALE, flips=10**6).flips  # fmt: skip
    moved = {flip.query: (flip.reference_rank, flip.engine_rank) for flip in flips if flip.direction == "image to text"}
    assert moved == {i: (1 + steps[i], 1 + steps[-1 - i]) for i in range(count) if steps[i] != steps[-1 - i]}


def test_a_model_that_gives_one_point_finds_nothing() -> None:
    same = np.full((50, 8), 0.3, np.float32)
    images, texts = random_pairs(50, dim=8, noise=0.1)
    found = compare_ranks(images, texts, same, same, captions=range(50), pictures=range(50), scale=SCALE)
    for k in RECALL_AT:
        assert (found.engine.recall[k].image_to_text, found.engine.recall[k].text_to_image) == (0, 0)
    assert found.engine.loss == pytest.approx(math.log(50), abs=1e-5)
    assert found.agreement.image_to_text <= 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_an_engine_whose_row_is_no_direction_loses_it_and_all_that_ask_it(bad: float) -> None:
    images, _ = random_pairs(20)
    broken = images.copy()
    broken[3] = bad
    found = compare_ranks(images, images, broken, images, captions=range(20), pictures=range(20), scale=SCALE)
    assert found.reference.recall[1].image_to_text == found.reference.recall[1].text_to_image == 1
    assert found.engine.recall[10].image_to_text == 0.95
    assert found.engine.recall[1].text_to_image == 0  # what is no number comes before all others, as in torch's topk
    assert found.engine.recall[5].text_to_image == 0.95
    assert (found.agreement.image_to_text, found.agreement.text_to_image) == (0.95, 0.05)
    assert math.isnan(found.engine.loss)
    assert found.to_dict()["loss"]["engine"] is None
    assert found.flips[0].query == 3
    assert found.flips[0].engine_rank == 21


def test_a_row_that_is_no_number_counts_though_another_of_its_picture_is_one() -> None:
    pictures = [i // 2 for i in range(20)]
    images = random_pairs(20)[0][np.array(pictures)]
    texts = images + np.random.default_rng(2).normal(0, 0.01, images.shape).astype(np.float32)
    broken = images.copy()
    broken[7] = np.nan
    found = compare_ranks(images, texts, broken, texts, captions=range(20), pictures=pictures, scale=SCALE)
    assert found.reference.recall[1].image_to_text == 1
    assert found.engine.recall[1].image_to_text == pytest.approx(found.reference.recall[1].image_to_text - 0.1)


def test_several_captions_of_a_picture_are_as_good_as_one() -> None:
    """Five captions each: any of them will do, and the picture takes one place among the candidates."""
    images, _ = random_pairs(12, dim=8)
    texts = np.repeat(images, 5, axis=0) + np.random.default_rng(1).normal(0, 1.2, (60, 8)).astype(np.float32)
    pictures = np.repeat(np.arange(12), 5)
    found = compare(images[pictures], texts, pictures=pictures.tolist()).reference.recall
    cosine = unit(images) @ unit(texts).T
    for k in (1, 5):
        there = cosine.topk(k, dim=1).indices.numpy() // 5 == np.arange(12)[:, None]
        back = cosine.T.topk(k, dim=1).indices.numpy() == pictures[:, None]
        assert found[k].image_to_text == pytest.approx(there.any(axis=1).mean())
        assert found[k].text_to_image == pytest.approx(back.any(axis=1).mean())
    assert found[1].image_to_text < 1
    assert found[10].text_to_image > found[5].text_to_image > found[1].text_to_image


def test_agreement_is_that_of_the_firsts() -> None:
    images, texts = random_pairs(80, noise=0.5)
    rng = np.random.default_rng(2)
    moved = [array + rng.normal(0, 0.3, array.shape).astype(np.float32) for array in (images, texts)]
    found = compare_ranks(images, texts, *moved, captions=range(80), pictures=range(80), scale=SCALE)
    expected, engine = unit(images) @ unit(texts).T, unit(moved[0]) @ unit(moved[1]).T
    for axis, share in ((1, found.agreement.image_to_text), (0, found.agreement.text_to_image)):
        same = expected.argmax(dim=axis) == engine.argmax(dim=axis)
        assert share == pytest.approx(same.double().mean().item())
        assert 0.3 < share < 1
    assert compare(images, texts).agreement.image_to_text == 1
    assert not compare(images, texts).flips


def test_a_planted_swap_is_the_largest_flip_and_names_who_overtook() -> None:
    """Image 4 moves to where text 9 is: 9 overtakes 4, and nothing else changes for any image."""
    images = np.eye(12, dtype=np.float32) + 0.01
    texts = images + np.random.default_rng(0).normal(0, 0.01, images.shape).astype(np.float32)
    moved = images.copy()
    moved[4] = images[4] + 1.5 * images[9]
    found = compare_ranks(images, texts, moved, texts, captions=range(12), pictures=range(12), scale=SCALE)
    flips = {flip.direction: flip for flip in found.flips}
    flip = flips["image to text"]
    assert (flip.query, flip.right, flip.reference_rank, flip.engine_rank) == (4, 4, 1, 2)
    assert (flip.reference_first, flip.engine_first, flip.overtook) == (4, 9, 9)
    assert sum(flip.direction == "image to text" for flip in found.flips) == 1
    assert found.recall_difference(1).image_to_text == pytest.approx(-1 / 12)
    back = compare_ranks(moved, texts, images, texts, captions=range(12), pictures=range(12), scale=SCALE)
    risen = next(flip for flip in back.flips if flip.direction == "image to text")
    assert (risen.reference_rank, risen.engine_rank, risen.overtook) == (2, 1, None)


def test_flips_name_pairs_not_the_different_pictures() -> None:
    """The numbers in a flip are rows of what was given, so that pictures can be shown."""
    images, texts = np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32)
    rows = np.array([0, 0, 1, 1, 2, 3])
    moved = images.copy()
    moved[3] = [0, 0, 2, 1, 0, 0]
    captions = [0, 0, 1, 1, 2, 3]
    found = compare_ranks(images[rows], texts[rows], moved[rows], texts[rows], captions=captions,
                          pictures=list("aabbcd"), scale=SCALE)  # fmt: skip
    flip = next(flip for flip in found.flips if flip.direction == "image to text")
    assert (flip.query, flip.right, flip.engine_first, flip.overtook) == (5, 5, 4, 4)


def test_flips_are_ordered_by_the_ratio_of_ranks_and_limited() -> None:
    images, texts = random_pairs(60)
    moved = images + np.random.default_rng(4).normal(0, 1, images.shape).astype(np.float32)
    found = compare_ranks(images, texts, moved, texts, captions=range(60), pictures=range(60), scale=SCALE, flips=9)
    ratios = [abs(math.log(flip.engine_rank / flip.reference_rank)) for flip in found.flips]
    assert len(ratios) == 9
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] > 0
    assert {flip.direction for flip in found.flips} == {"image to text", "text to image"}


def test_the_result_is_json_and_has_the_differences() -> None:
    images, texts = random_pairs(40)
    moved = images + 1
    found = compare_ranks(images, texts, moved, texts, captions=range(40), pictures=range(40), scale=SCALE)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["recall"]["5"]["difference"]["image_to_text"] == pytest.approx(
        found.engine.recall[5].image_to_text - found.reference.recall[5].image_to_text
    )
    assert told["loss"]["difference"] == pytest.approx(found.engine.loss - found.reference.loss)
    assert found.loss_difference > 0
    assert set(told["flips"][0]) == set(ranking.Flip.__slots__)


def test_models_may_have_other_dimensions_and_lengths_do_not_matter() -> None:
    images, texts = random_pairs(30)
    wide = [np.pad(array, ((0, 0), (0, 8))) * 7 for array in (images, texts)]
    found = compare_ranks(images, texts, *wide, captions=range(30), pictures=range(30), scale=SCALE)
    assert found.engine.recall == found.reference.recall
    assert found.engine.loss == pytest.approx(found.reference.loss, abs=1e-5)


def test_memory_is_that_of_the_rows_and_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = random_pairs(3000, dim=8)
    whole = 3000 * 3000 * 4
    peaks = []
    for size in (250, 3000):
        monkeypatch.setattr(similarity_tiles, "_TILE", size)
        tracemalloc.start()
        compare(images, texts)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < whole / 8 < whole < peaks[1]


def test_shapes_that_are_no_pairs() -> None:
    images, texts = random_pairs(4)
    with pytest.raises(ValueError, match=r"found \[4, 3, 4, 3, 4, 4\] images"):
        compare(images, texts[:3])
    with pytest.raises(ValueError, match=r"at least 1, found \[0, 0, 0, 0, 0, 0\]"):
        compare(images[:0], texts[:0])
    with pytest.raises(ValueError, match=r"found \[4, 4, 4, 4, 3, 4\]"):
        compare(images, texts, captions=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"expected .pairs, dim., of one dim"):
        compare(images, texts[:, :3])
