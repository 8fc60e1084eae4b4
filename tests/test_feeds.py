"""What a bundle is calibrated on and judged by: where it comes from, how it is parted, and in which batches it goes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_export
from clip_export.bundle import Bundle, Graph
from clip_export.errors import ImageError, InputError
from clip_export.feeds import (
    BATCH,
    LEAST_INPUTS,
    Data,
    Feeds,
    Samples,
    gather,
    golden_feeds,
    image_feeds,
    require_inputs,
    text_feeds,
)
from clip_export.prompts import prompts
from clip_export.spec import Tower

COUNT = 22  # pictures: two batches and a part of one
CAPTIONS = [f"picture number {number} of {'very ' * (number % 5)}many" for number in range(COUNT)]


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clip_export.build("demo", tmp_path_factory.mktemp("bundles") / "text", towers=("text",))


@pytest.fixture(scope="module")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clip_export.build("demo", tmp_path_factory.mktemp("bundles") / "image", towers=("image",))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of different pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(COUNT):
        write_picture(folder / f"{number:02}.png", seed=number)
    return folder


@pytest.fixture
def pairs(plain: Path) -> Path:
    """The same with captions, the last picture first: so that their order is not that of the files."""
    rows = [{"file": f"{number:02}.png", "caption": CAPTIONS[number]} for number in reversed(range(COUNT))]
    (plain / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return plain


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"line {number}\n" for number in range(12)), encoding="utf-8")
    return path


def write_picture(path: Path, *, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((64, 64)).save(path)


def rows(batches: Iterable[Feeds]) -> list[bytes]:
    """One value for each input, the same for the same: its pixels, or its tokens up to the end."""
    found = []
    for batch in batches:
        if "pixels" in batch:
            found += [pixels.tobytes() for pixels in batch["pixels"]]
        else:
            ends = batch["eot_index"]
            found += [ids[: end + 1].tobytes() for ids, end in zip(batch["input_ids"], ends, strict=True)]
    return found


def everything(samples: Samples) -> list[bytes]:
    """Every input of `samples` in its order, as it comes from the bundle's own preprocessing."""
    if samples.tower == "text":
        return rows(text_feeds(samples.bundle, [item for item in samples.items if isinstance(item, str)]))
    return rows(image_feeds(samples.bundle, [item for item in samples.items if isinstance(item, Path)]))


def held(data: Data, tower: Tower) -> list[Path | str]:
    samples = data.towers[tower]
    return [item for item, is_held in zip(samples.items, samples.held_out, strict=True) if is_held]


# Where they come from


def test_a_folder_of_pairs(bundle: Bundle, pairs: Path) -> None:
    data = gather(bundle, [pairs], None)
    assert data.paired
    assert data.towers["image"].items == tuple(pairs / f"{number:02}.png" for number in reversed(range(COUNT)))
    assert data.towers["text"].items == tuple(reversed(CAPTIONS))
    assert data.towers["image"].source == f"{COUNT} pictures of pictures"
    assert data.towers["text"].source == f"{COUNT} captions of the pictures"
    assert np.array_equal(data.towers["image"].held_out, data.towers["text"].held_out)  # pairs are held out as pairs
    held_out = dict(zip(held(data, "image"), held(data, "text"), strict=True))
    assert held_out == {file: CAPTIONS[int(Path(file).stem)] for file in held_out}


def test_a_file_of_texts_goes_before_captions(bundle: Bundle, pairs: Path, texts: Path) -> None:
    data = gather(bundle, [pairs], texts)
    assert not data.paired  # line i is not about picture i
    assert data.towers["text"].items == tuple(f"line {number}" for number in range(12))
    assert data.towers["text"].source == "12 texts of texts.txt"
    assert len(data.towers["image"].items) == COUNT


def test_without_texts_the_built_in_prompts_are_taken_and_said_to_be(bundle: Bundle, plain: Path) -> None:
    data = gather(bundle, [plain], None)
    assert not data.paired
    assert data.towers["text"].items == prompts()
    assert data.towers["text"].source == f"{len(prompts())} built-in prompts, since no texts were given"


def test_pictures_by_name_and_from_several_places(bundle: Bundle, pairs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_picture(other / "one.png", seed=100)
    files = sorted(pairs.glob("*.png"))[:LEAST_INPUTS]
    data = gather(bundle, [*files, other], None)
    assert not data.paired
    assert data.towers["image"].items == (*files, other / "one.png")
    assert data.towers["image"].source.startswith(f"{LEAST_INPUTS + 1} pictures of 00.png, ")


def test_several_folders_of_pairs_are_one(bundle: Bundle, image_bundle: Bundle, pairs: Path, tmp_path: Path) -> None:
    """Captions are not passed over, neither those of all folders nor, in silence, those of some."""
    other, bare = tmp_path / "other", tmp_path / "bare"
    for folder, first in ((other, 100), (bare, 200)):
        folder.mkdir()
        for number in range(LEAST_INPUTS):
            write_picture(folder / f"{number}.png", seed=first + number)
    rows = [{"file": f"{number}.png", "caption": f"another of {number}"} for number in range(LEAST_INPUTS)]
    (other / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = gather(bundle, [pairs, other], None)
    assert data.paired
    assert data.towers["text"].items == (*reversed(CAPTIONS), *(row["caption"] for row in rows))
    assert data.towers["image"].items[-1] == other / "7.png"
    with pytest.raises(InputError, match=f"{pairs} has captions, and {bare} has none"):
        gather(bundle, [bare, pairs], None)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(CAPTIONS), encoding="utf-8")
    for taken in (gather(bundle, [bare, pairs], texts), gather(image_bundle, [bare, pairs], None)):
        assert len(taken.towers["image"].items) == COUNT + LEAST_INPUTS and not taken.paired


@pytest.mark.parametrize("count", [1, LEAST_INPUTS - 1])
def test_too_few_pictures(bundle: Bundle, plain: Path, count: int) -> None:
    files = sorted(plain.iterdir())
    message = f"expected at least {LEAST_INPUTS} different pictures .*, found {count}\n"
    with pytest.raises(InputError, match=message) as caught:
        gather(bundle, files[:count], None)
    assert "some hundred" in str(caught.value.hint)
    assert len(gather(bundle, files[:LEAST_INPUTS], None).towers["image"].items) == LEAST_INPUTS


def test_too_few_texts(bundle: Bundle, plain: Path, texts: Path) -> None:
    texts.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"expected at least {LEAST_INPUTS} different texts .*, found 2\n"):
        gather(bundle, [plain], texts)


def test_no_pictures_at_all(bundle: Bundle, image_bundle: Bundle, texts: Path) -> None:
    for opened in (bundle, image_bundle):
        with pytest.raises(InputError, match="calibrated on real pictures, and none were given") as caught:
            gather(opened, [], texts)
        assert "--calibration DIRECTORY" in str(caught.value.hint)


def test_a_tower_that_is_not_there_needs_no_data(
    text_bundle: Bundle, image_bundle: Bundle, pairs: Path, texts: Path
) -> None:
    alone = gather(text_bundle, [], None)
    assert (set(alone.towers), alone.towers["text"].items) == ({"text"}, prompts())
    assert gather(text_bundle, [], texts).towers["text"].source == "12 texts of texts.txt"
    captions = gather(text_bundle, [pairs], None)
    assert (set(captions.towers), captions.towers["text"].items) == ({"text"}, tuple(reversed(CAPTIONS)))
    images = gather(image_bundle, [pairs], None)
    assert set(images.towers) == {"image"}
    assert not captions.paired  # pairs need both
    assert not images.paired


def test_what_is_refused_before_a_bundle_is_built_is_what_gather_refuses(
    bundle: Bundle, text_bundle: Bundle, pairs: Path, texts: Path, tmp_path: Path
) -> None:
    few, empty = tmp_path / "few", tmp_path / "empty"
    for folder in (few, empty):
        folder.mkdir()
    for number in range(3):
        write_picture(few / f"{number:02}.png", seed=number)
    write_pairs(few, [(number % 3, f"caption {number}") for number in range(20)])  # three pictures
    for pictures, named in (([few], None), ([empty], texts), ([pairs, few], None)):
        require_inputs(pictures, named, image=False, text=True)  # its pictures are not looked at
        gather(text_bundle, pictures, named)
    with pytest.raises(InputError, match=r"expected at least \d+ different pictures .* found 3"):
        require_inputs([few], None, image=True, text=False)
    with pytest.raises(InputError, match=r"expected at least \d+ different pictures .* found 3"):
        gather(bundle, [few], None)
    with pytest.raises(InputError, match=r"has captions, and .*empty has none"):
        require_inputs([pairs, empty], None, image=False, text=True)
    with pytest.raises(InputError, match=r"has captions, and .*empty has none"):
        gather(text_bundle, [pairs, empty], None)


def test_what_cannot_be_read(bundle: Bundle, plain: Path, texts: Path, tmp_path: Path) -> None:
    texts.write_bytes(b"fine\n\xff\n")
    with pytest.raises(InputError, match=r"texts\.txt, line 2: "):
        gather(bundle, [plain], texts)
    texts.write_bytes(b"")
    with pytest.raises(InputError, match=r"expected texts in .*texts\.txt, found none"):
        gather(bundle, [plain], texts)
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        gather(bundle, [plain], tmp_path / "nowhere.txt")
    (plain / "00.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"00\.png"):
        list(gather(bundle, [plain], None).towers["image"].calibration())


def test_a_file_that_is_gone_has_no_digest(bundle: Bundle, plain: Path) -> None:
    files = tuple(sorted(plain.iterdir()))
    samples = Samples(bundle=bundle, tower="image", items=files, held_out=np.zeros(COUNT, np.bool_), source="")
    (plain / "00.png").unlink()
    with pytest.raises(InputError, match=r"00\.png cannot be read: No such file"):
        list(samples.digests())


# How they are parted


@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_held_out_is_not_calibrated_on_and_nothing_is_lost(bundle: Bundle, pairs: Path, tower: Tower) -> None:
    samples = gather(bundle, [pairs], None).towers[tower]
    calibrated, judges = rows(samples.calibration()), rows(samples.judges)
    assert len(calibrated) == samples.count == int((~samples.held_out).sum())
    assert judges and not set(calibrated) & set(judges)
    assert Counter(calibrated + judges) == Counter(everything(samples))
    assert judges == [row for row, held in zip(everything(samples), samples.held_out, strict=True) if held]


def write_pairs(folder: Path, rows: Iterable[tuple[int, str]]) -> None:
    """Captions of the pictures by their numbers."""
    lines = [json.dumps({"file": f"{number:02}.png", "caption": caption}) + "\n" for number, caption in rows]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def assert_nothing_is_on_both_sides(samples: Samples, names: Sequence[Hashable]) -> None:
    """`names` tell the items of `samples`, whose inputs are compared as the graph is given them as well."""
    parts = [{name for name, held in zip(names, samples.held_out, strict=True) if held == side} for side in (0, 1)]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not set(rows(samples.calibration())) & set(rows(samples.judges))


def test_five_captions_of_a_picture_stay_together(bundle: Bundle, plain: Path) -> None:
    write_pairs(plain, [(number, f"caption {kind} of {number}") for kind in range(5) for number in range(COUNT)])
    data = gather(bundle, [plain], None)
    assert data.paired
    assert np.array_equal(data.towers["image"].held_out, data.towers["text"].held_out)
    for samples in data.towers.values():
        assert_nothing_is_on_both_sides(samples, data.towers["image"].items)
        assert samples.held_out.sum() == 5 * round(COUNT / 4)


def test_a_picture_under_two_names_is_one(bundle: Bundle, plain: Path) -> None:
    for number in range(COUNT // 2):
        (plain / f"{COUNT - 1 - number:02}.png").write_bytes((plain / f"{number:02}.png").read_bytes())
    samples = gather(bundle, [plain], None).towers["image"]
    assert_nothing_is_on_both_sides(samples, [min(number, COUNT - 1 - number) for number in range(COUNT)])
    write_pairs(plain, [(number, f"caption of {number}") for number in range(COUNT)])
    data = gather(bundle, [plain], None)
    assert data.paired
    for samples in data.towers.values():
        assert_nothing_is_on_both_sides(samples, [min(number, COUNT - 1 - number) for number in range(COUNT)])
    assert set(Counter(data.held_out("image")).values()) == {2}  # by which recall tells that they are the same
    assert set(Counter(data.held_out("text")).values()) == {1}


def test_pairs_that_share_a_caption_stay_together(bundle: Bundle, plain: Path) -> None:
    write_pairs(plain, [(number, f"caption {number % (COUNT // 2)}") for number in range(COUNT)])
    data = gather(bundle, [plain], None)
    for samples in data.towers.values():
        assert_nothing_is_on_both_sides(samples, data.towers["text"].items)


def test_the_same_text_twice_is_on_one_side_and_counts_twice(bundle: Bundle, plain: Path, texts: Path) -> None:
    different = [f"line {number} {'and more ' * (number % 3)}" for number in range(12)]
    texts.write_text("".join(f"{text}\n" for text in different * 8), encoding="utf-8")
    samples = gather(bundle, [plain], texts).towers["text"]
    assert_nothing_is_on_both_sides(samples, samples.items)
    assert sum(Counter(rows(samples.calibration())).values()) == samples.count
    assert Counter(rows(samples.calibration())) + Counter(rows(samples.judges)) == Counter(everything(samples))
    assert set(Counter(everything(samples)).values()) == {8}


def test_texts_that_the_tower_cannot_tell_are_one(bundle: Bundle, plain: Path, texts: Path) -> None:
    lines = [f"A Cat, number {number}" for number in range(12)]
    texts.write_text("".join(f"{line}\n" for line in [*lines, *map(str.lower, lines)]), encoding="utf-8")
    samples = gather(bundle, [plain], texts).towers["text"]
    assert_nothing_is_on_both_sides(samples, [line.lower() for line in lines] * 2)
    assert samples.different(held_out=False) + samples.different(held_out=True) == len(lines)


def test_pictures_that_are_all_the_same_are_too_few(bundle: Bundle, plain: Path) -> None:
    for path in plain.iterdir():
        write_picture(path, seed=0)
    with pytest.raises(InputError, match=f"at least {LEAST_INPUTS} different pictures .*, found 1 among {COUNT}\n"):
        gather(bundle, [plain], None)


def test_pairs_that_all_hang_together_cannot_be_parted(bundle: Bundle, plain: Path, texts: Path) -> None:
    """Each picture has a caption of its own, and one that says nothing."""
    own = [(number, f"caption of {number}") for number in range(COUNT)]
    write_pairs(plain, [*own, *((number, "a picture") for number in range(COUNT))])
    with pytest.raises(
        InputError, match=f"to judge by, found {COUNT} and 0: .* such as 'a picture' of {COUNT}"
    ) as found:
        gather(bundle, [plain], None)
    assert "--calibration-texts FILE" in str(found.value.hint)
    data = gather(bundle, [plain], texts)  # as the hint says: no pairs, and each tower by itself
    for samples in data.towers.values():
        assert_nothing_is_on_both_sides(samples, samples.items)


def test_a_caption_that_many_pictures_share_leaves_the_others(bundle: Bundle, plain: Path) -> None:
    write_pairs(plain, [(number, f"caption {number}" if number < 10 else "a picture") for number in range(COUNT)])
    data = gather(bundle, [plain], None)
    for samples in data.towers.values():
        assert_nothing_is_on_both_sides(samples, data.towers["text"].items)
        assert not samples.held_out[10:].any()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_golden_samples_are_neither(bundle: Bundle, pairs: Path, tower: Tower) -> None:
    """They judge what is published, so they may not have shaped it."""
    samples = gather(bundle, [pairs], None).towers[tower]
    golden = set(rows(golden_feeds(bundle, tower)))
    assert golden
    assert not golden & set(rows(samples.calibration()) + rows(samples.judges))


def test_the_golden_samples_are_all_there(bundle: Bundle) -> None:
    golden = bundle.golden()
    assert golden.image is not None
    assert golden.text is not None
    assert np.array_equal(np.concatenate([b["pixels"] for b in golden_feeds(bundle, "image")]), golden.image.pixels)
    batches = list(golden_feeds(bundle, "text"))
    for name, expected in (("input_ids", golden.text.input_ids), ("eot_index", golden.text.eot_index)):
        assert np.array_equal(np.concatenate([batch[name] for batch in batches]), expected)


# In which batches


def test_texts_are_calibrated_on_by_length_with_hardly_any_padding(bundle: Bundle, plain: Path) -> None:
    samples = gather(bundle, [plain], None).towers["text"]  # the built-in prompts, of every length
    batches = list(samples.calibration())
    by_position = [item for item, held in zip(samples.items, samples.held_out, strict=True) if not held]
    as_they_come = list(text_feeds(bundle, [str(item) for item in by_position]))
    assert Counter(rows(batches)) == Counter(rows(as_they_come))
    lengths = np.concatenate([batch["eot_index"] for batch in batches]) + 1
    assert (np.diff(lengths) >= 0).all()
    # Sorted, what a batch's texts lack of its longest adds up to no more than the whole span for each place in it.
    span = int(lengths.max() - lengths.min())
    assert padding(batches) <= (BATCH - 1) * span < padding(as_they_come)


def padding(batches: Iterable[Feeds]) -> int:
    """How many tokens of all batches stand behind the end of a text."""
    return sum(int((batch["input_ids"].shape[1] - 1 - batch["eot_index"]).sum()) for batch in batches)


def test_batches_are_as_wide_as_their_longest_text_where_the_graph_takes_that(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a cat", "a photo of two small dogs in the snow", "x"]
    (batch,) = text_feeds(bundle, texts)
    assert batch["input_ids"].shape == (3, int(batch["eot_index"].max()) + 1)
    graph = bundle.graph("text")

    def fixed(self: Bundle, tower: Tower, precision: str = "fp32") -> Graph:
        return dataclasses.replace(graph, sequence_dynamic=False)

    monkeypatch.setattr(Bundle, "graph", fixed)
    (whole,) = text_feeds(bundle, texts)
    assert bundle.spec.text is not None
    assert whole["input_ids"].shape == (3, bundle.spec.text.context_length)
    assert rows([whole]) == rows([batch])


def test_no_batch_is_larger_than_it_says(bundle: Bundle, pairs: Path) -> None:
    data = gather(bundle, [pairs], None)
    for samples in data.towers.values():
        sizes = [len(next(iter(batch.values()))) for batch in samples.calibration()]
        assert sizes == [BATCH] * (samples.count // BATCH) + [samples.count % BATCH] * (samples.count % BATCH > 0)


# What stands for them


def digests(data: Data) -> dict[tuple[Tower, bool], list[bytes]]:
    return {
        (tower, held): list(samples.digests(held_out=held))[1:]  # the first is of what makes them ready
        for tower, samples in data.towers.items()
        for held in (False, True)
    }


def test_digests_follow_the_content_of_their_own_part(bundle: Bundle, pairs: Path) -> None:
    data = gather(bundle, [pairs], None)
    before = digests(data)
    assert {key: len(found) for key, found in before.items()} == {
        (tower, held): int((samples.held_out == held).sum())
        for tower, samples in data.towers.items()
        for held in (False, True)
    }
    write_picture(Path(held(data, "image")[0]), seed=1000)
    after = digests(gather(bundle, [pairs], None))
    assert {key for key in before if before[key] != after[key]} == {("image", True)}
    captions = pairs / "captions.jsonl"
    calibrated = next(str(item) for item in data.towers["text"].items if item not in held(data, "text"))
    captions.write_text(captions.read_text().replace(calibrated, "something else"))
    changed = digests(gather(bundle, [pairs], None))
    assert {key for key in before if after[key] != changed[key]} == {("text", False)}


def test_digests_tell_what_the_graph_is_fed_and_not_only_the_files(bundle: Bundle, pairs: Path) -> None:
    """The graph is the same for every dialect, and so are the files; pixels and token ids are not."""
    spec = bundle.spec
    assert spec.preprocess is not None
    assert spec.tokenizer is not None
    other = dataclasses.replace(
        spec,
        preprocess=dataclasses.replace(spec.preprocess, dialect="openai", transparency="drop"),
        tokenizer=dataclasses.replace(spec.tokenizer, dialect="openai"),
    )
    assert other != spec
    for samples in gather(bundle, [pairs], None).towers.values():
        moved = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, spec=other))
        found, changed = (list(each.digests()) for each in (samples, dataclasses.replace(samples, bundle=moved)))
        assert found[0] != changed[0]
        assert found[1:] == changed[1:]


def test_digests_do_not_hang_on_where_pictures_are(bundle: Bundle, pairs: Path, tmp_path: Path) -> None:
    before = digests(gather(bundle, [pairs], None))
    moved = pairs.rename(tmp_path / "elsewhere")
    assert digests(gather(bundle, [moved], None)) == before


def test_a_picture_file_is_hashed_once(bundle: Bundle, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(plain, [(number, f"caption {kind} of {number}") for kind in range(2) for number in range(COUNT)])
    hashed: list[str] = []

    def file_digest(file: BufferedReader, algorithm: str) -> object:
        hashed.append(file.name)
        return real(file, algorithm)

    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    data = gather(bundle, [plain], None)
    found = digests(data)
    assert len(hashed) == len(set(hashed)) == COUNT
    everyone = found["image", False] + found["image", True]
    assert set(everyone) == {hashlib.sha256(path.read_bytes()).digest() for path in plain.glob("*.png")}
