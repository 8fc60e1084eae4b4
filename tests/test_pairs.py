"""Pairs from a folder: what the two formats hold, what is refused and on which line, and what is held out."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_export.errors import InputError
from clip_export.pairs import Pairs, find_pairs, group, hold_out, spread

NAMES = ("a.png", "b.png", "sub/c.png", "d, e.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, name: str, data: str | bytes) -> None:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def read(folder: Path) -> list[tuple[str, str]]:
    found = find_pairs(folder)
    assert found is not None
    return [
        (file.relative_to(folder).as_posix(), caption)
        for file, caption in zip(found.files, found.captions, strict=True)
    ]


def labels(folder: Path) -> dict[str, str]:
    pairs = find_pairs(folder)
    assert pairs is not None
    return {file.name: label for file, label in pairs.labels.items()}


def failure(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        find_pairs(folder)
    assert raised.value.hint
    return raised.value.message.replace(str(folder), "DIR")


# What is read

PAIRS = [
    ("a.png", "a cat"),
    ("b.png", 'two "dogs", one red'),
    ("sub/c.png", "line one\nline two"),
    ("d, e.png", "кошка 猫 \u2028 🐱"),
    ("a.png", "a second caption of a file"),
    ("b.png", "a cat"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_both_formats_hold_the_same_pairs(folder: Path, end: str, mark: bytes) -> None:
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=end).writerows([("file", "caption"), *PAIRS])
    write(folder, "captions.csv", mark + (folder / "captions.csv").read_bytes())
    assert read(folder) == PAIRS

    (folder / "captions.csv").unlink()
    lines = [json.dumps({"file": file, "caption": caption}, ensure_ascii=False) + end for file, caption in PAIRS]
    write(folder, "captions.jsonl", mark + "".join(lines).encode())
    assert read(folder) == PAIRS


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, unique=True))
def test_whatever_csv_and_json_write_is_read(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "a.png").touch()
    path = folder / "captions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *(("a.png", caption) for caption in captions)])
    assert [caption for _, caption in read(folder)] == captions
    path.unlink()
    lines = [json.dumps({"file": "a.png", "caption": caption}) for caption in captions]
    write(folder, "captions.jsonl", "\n".join(lines))
    assert [caption for _, caption in read(folder)] == captions


def test_other_columns_and_keys_are_passed_over_and_empty_lines_too(folder: Path) -> None:
    write(folder, "captions.csv", "id,caption,file\n\n1,a cat,a.png\n\n2,a dog,b.png\n\n")
    assert read(folder) == [("a.png", "a cat"), ("b.png", "a dog")]
    (folder / "captions.csv").unlink()
    write(folder, "captions.jsonl", '\n{"id": 1, "file": "a.png", "caption": "a cat"}\n  \n')
    assert read(folder) == [("a.png", "a cat")]


def test_labels_are_of_files_and_may_be_missing(folder: Path) -> None:
    write(folder, "captions.csv", "file,caption,label\na.png,a cat, cat \na.png,a pet,\nb.png,a dog,\n")
    assert labels(folder) == {"a.png": "cat"}
    (folder / "captions.csv").unlink()
    lines = ('{"file": "a.png", "caption": "a cat", "label": "cat"}', '{"file": "b.png", "caption": "a dog"}')
    write(folder, "captions.jsonl", "\n".join(lines))
    assert labels(folder) == {"a.png": "cat"}
    write(folder, "captions.jsonl", '{"file": "a.png", "caption": "a cat", "label": 7}')
    with pytest.raises(InputError, match="line 1: the label is 7, expected a string"):
        find_pairs(folder)
    (folder / "captions.jsonl").unlink()
    write(folder, "captions.csv", "file,caption,label\na.png,a cat,cat\na.png,a pet,pet\n")
    with pytest.raises(InputError, match=r"line 3: 'a\.png' is labelled 'pet' here, and 'cat' before"):
        find_pairs(folder)


def test_half_of_a_surrogate_pair(folder: Path) -> None:
    write(folder, "captions.jsonl", '{"file": "a.png", "caption": "a \\ud83d cat"}')
    assert failure(folder) == r"DIR/captions.jsonl, line 1: the caption holds half of a surrogate pair, '\ud83d'"


def test_a_folder_without_captions(folder: Path) -> None:
    assert find_pairs(folder) is None
    assert find_pairs(folder / "nowhere") is None


def test_a_link_is_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "picture.png"
    elsewhere.touch()
    (folder / "linked.png").symlink_to(elsewhere)
    write(folder, "captions.csv", "file,caption\nlinked.png,a cat\n")
    assert find_pairs(folder) == Pairs(files=(folder / "linked.png",), captions=("a cat",))


# What is refused

CSV_REFUSED = {
    "": "DIR/captions.csv has no pairs",
    "file,caption\n": "DIR/captions.csv has no pairs",
    "a.png,a cat\n": "line 1: expected a header with the columns file and caption, found a.png,a cat",
    "file;caption\na.png;a cat\n": "line 1: expected a header with the columns file and caption, found file;caption",
    "file,caption,file\n": "line 1: expected a header with the columns file and caption, found file,caption,file",
    "file,caption\na.png,a cat, a dog\n": "line 2: 3 fields, expected 2 as in the header",
    "file,caption\na.png\n": "line 2: 1 field, expected 2 as in the header",
    'file,caption\na.png,"one\ntwo"\nb.png, \n': "line 4: the caption of 'b.png' is empty",
    'file,caption\r\na.png,"a\r\ncat"\r\n\r\nb.png,\r\n': "line 5: the caption of 'b.png' is empty",
    'file,caption\nb.png,x\na.png,"a cat\n\n': "line 3: malformed: unexpected end of data",
    'file,caption\na.png,"a" cat\n': "line 2: malformed: ',' expected after '\"'",
    "file,caption\n,a cat\n": "line 2: the file name is empty",
    "file,caption\nnone.png,a cat\n": "line 2: 'none.png' is not a file in DIR",
    "file,caption\nsub,a cat\n": "line 2: 'sub' is not a file in DIR",
    "file,caption\n../a.png,a cat\n": "line 2: '../a.png' is outside DIR",
    "file,caption\nsub/../../a.png,a cat\n": "line 2: 'sub/../../a.png' is outside DIR",
    "file,caption\n/etc/passwd,a cat\n": "line 2: '/etc/passwd' is outside DIR",
    "file,caption\na\0.png,a cat\n": "line 2: 'a\\x00.png' is not a file in DIR",
    "file,caption\na.png,a cat\nb.png,a cat\na.png,a cat\n": "line 4: the same file and caption as line 2",
    "file,caption\na.png,a cat\n./a.png,a cat\n": "line 3: the same file and caption as line 2",
}
JSON_REFUSED = {
    "": "DIR/captions.jsonl has no pairs",
    '{"file": "a.png", "caption": "a cat"}\n{"file": "b.png"': "line 2: not JSON: Expecting ',' delimiter",
    "[" * 100_000: "line 1: not JSON: ",
    "file,caption\n": "line 1: not JSON: ",
    '["a.png", "a cat"]': 'line 1: expected an object with the strings "file" and "caption"',
    '{"file": "a.png"}': 'line 1: expected an object with the strings "file" and "caption"',
    '{"file": "a.png", "caption": ["a cat"]}': 'line 1: expected an object with the strings "file" and "caption"',
    '\n{"file": "a.png", "caption": "\\n"}': "line 2: the caption of 'a.png' is empty",
    '{"file": "", "caption": "a cat"}': "line 1: the file name is empty",
    '{"file": "\\ud800.png", "caption": "a cat"}': "line 1: '\\ud800.png' is not a file in DIR",
    '{"file": "../a.png", "caption": "a cat"}': "line 1: '../a.png' is outside DIR",
}


@pytest.mark.parametrize(("text", "message"), CSV_REFUSED.items())
def test_csv_that_is_refused(folder: Path, text: str, message: str) -> None:
    write(folder, "captions.csv", text)
    assert message in failure(folder)
    assert failure(folder).startswith("DIR/captions.csv")


@pytest.mark.parametrize(("text", "message"), JSON_REFUSED.items(), ids=lambda text: text[:40])
def test_json_that_is_refused(folder: Path, text: str, message: str) -> None:
    write(folder, "captions.jsonl", text)
    assert message in failure(folder)
    assert failure(folder).startswith("DIR/captions.jsonl")


def test_a_name_that_is_too_long(folder: Path) -> None:
    write(folder, "captions.csv", f"file,caption\n{'a' * 5000},a cat\n")
    assert failure(folder) == f"DIR/captions.csv, line 2: '{'a' * 79}…' is not a file in DIR"


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_bytes_that_are_not_utf8(folder: Path, name: str) -> None:
    write(folder, name, b"file,caption\na.png,a cat\nb.png,caf\xe9\n")
    assert failure(folder) == f"DIR/{name}, line 3: not UTF-8: byte 0xe9"
    write(folder, name, "file,caption\n".encode("utf-16"))
    assert failure(folder) == f"DIR/{name}, line 1: not UTF-8: byte 0xff"


def test_both_files(folder: Path) -> None:
    write(folder, "captions.csv", "file,caption\na.png,a cat\n")
    write(folder, "captions.jsonl", '{"file": "a.png", "caption": "a cat"}')
    assert failure(folder) == "DIR has both captions.csv and captions.jsonl, expected one"


def test_a_captions_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "captions.csv").symlink_to(folder / "gone")
    assert failure(folder) == "DIR/captions.csv cannot be read: No such file or directory"
    (folder / "captions.csv").unlink()
    (folder / "captions.csv").mkdir()
    assert "DIR/captions.csv cannot be read: " in failure(folder)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_captions_file_without_permission(folder: Path) -> None:
    write(folder, "captions.csv", "file,caption\na.png,a cat\n")
    (folder / "captions.csv").chmod(0)
    assert failure(folder) == "DIR/captions.csv cannot be read: Permission denied"


# What belongs together

KEYS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=25)


@given(KEYS)
def test_groups_are_what_hangs_together(items: list[tuple[int, int]]) -> None:
    pictures, captions = [picture for picture, _ in items], [caption for _, caption in items]
    found = group(pictures, captions)
    near = np.equal.outer(pictures, pictures) | np.equal.outer(captions, captions)
    reached = np.linalg.matrix_power(near.astype(object), max(len(items), 1)) > 0  # in as many steps as there can be
    assert found == [int(np.flatnonzero(row)[0]) for row in reached]


def test_groups_by_one_key_and_by_two() -> None:
    assert group([]) == []
    assert group(["a", "b", "a", "c"]) == [0, 1, 0, 3]
    assert group(["a", "b", "a", "c"], ["x", "y", "z", "y"]) == [0, 1, 0, 1]
    assert group(["a", "b", "c"], ["b", "c", "a"]) == [0, 1, 2]  # a caption is no picture
    with pytest.raises(ValueError, match="zip"):
        group(["a", "b"], ["x"])


def test_a_long_chain_is_one_group() -> None:
    """Each picture has a caption of the one before, from the far end: nothing recurses, and no way stays long."""
    count = 20_000
    steps = np.arange(count)[::-1]
    assert set(group((steps // 2).tolist(), ((steps + 1) // 2).tolist())) == {0}


# What is held out


@given(st.integers(0, 3000), st.integers(0, 300))
def test_a_spread_is_even(count: int, most: int) -> None:
    found = spread(count, most)
    assert found.dtype == np.int64
    assert len(found) == min(count, most)
    if not len(found):
        return
    gaps = np.diff(found)
    assert not len(gaps) or 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1
    assert found[0] >= 0
    assert abs(found[0] - (count - 1 - found[-1])) <= 1


def test_a_spread_over_fewer_is_all_of_them() -> None:
    assert spread(5, 5).tolist() == spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 2).tolist() == [2, 7]


@given(st.integers(0, 3000), st.floats(0.01, 0.99), st.integers(1, 300))
def test_of_different_items_as_many_as_asked_for_are_held_out_evenly(count: int, share: float, most: int) -> None:
    held = hold_out(range(count), share, most)
    assert (held.dtype, held.shape) == (np.bool_, (count,))
    if count < 2:
        assert not held.any()
        return
    wanted = min(max(round(count * share), 1), count - 1, most)
    assert np.flatnonzero(held).tolist() == spread(count, wanted).tolist()


GROUPS = st.lists(st.integers(0, 20), max_size=120)


@given(GROUPS, st.floats(0.01, 0.99), st.integers(1, 40))
def test_no_group_is_parted(groups: list[int], share: float, most: int) -> None:
    held = hold_out(groups, share, most)
    inside = {name for name, is_held in zip(groups, held, strict=True) if is_held}
    outside = {name for name, is_held in zip(groups, held, strict=True) if not is_held}
    assert not inside & outside
    assert (bool(inside) and bool(outside)) == (len(set(groups)) >= 2)
    assert len(inside) <= max(round(len(set(groups)) * share), 1)
    assert held.sum() <= max(most, min(map(groups.count, groups), default=0))
    renamed = [f"group {name}" for name in groups]
    assert np.array_equal(hold_out(renamed, share, most), held)  # what a group is called does not count


@given(st.integers(4, 60), st.integers(1, 9), st.randoms(use_true_random=False))
def test_of_groups_of_one_size_the_share_of_items_is_held_out(count: int, size: int, rng: random.Random) -> None:
    """However they are mixed: five captions of a picture, in any order."""
    groups = list(range(count)) * size
    rng.shuffle(groups)
    held = hold_out(groups, most=count * size)
    assert abs(held.sum() - len(groups) / 4) <= size / 2
    order = list(dict.fromkeys(groups))
    places = sorted({order.index(name) for name in itertools.compress(groups, held)})
    assert places == spread(count, len(places)).tolist()


def test_hold_out_by_default() -> None:
    assert np.flatnonzero(hold_out(range(12))).tolist() == [2, 6, 10]
    assert hold_out(range(100_000)).sum() == 256
    assert hold_out([item // 5 for item in range(100_000)]).sum() == 255  # 51 groups; one more would be too many


def test_a_group_that_is_larger_than_the_share_is_passed_over() -> None:
    groups = ["many"] * 50 + [f"one {number}" for number in range(50)]
    assert hold_out(groups)[:50].sum() == 0
    assert hold_out(groups)[50:].sum() == round(51 / 4)
    assert hold_out(["a"] * 6 + ["b"] * 4 + ["c"] * 5).tolist() == [False] * 6 + [True] * 4 + [False] * 5
    assert hold_out(["a"] * 9 + ["b"] * 8, most=2).sum() == 8  # every group has more: the smallest of them


def test_what_is_one_group_is_not_held_out() -> None:
    assert not hold_out(["the same"] * 20).any()


@pytest.mark.parametrize(("share", "most"), [(0.0, 9), (1.0, 9), (float("nan"), 9), (0.5, 0)])
def test_shares_that_leave_a_side_empty(share: float, most: int) -> None:
    with pytest.raises(ValueError, match="expected between 0 and 1, and at least 1"):
        hold_out(range(10), share, most)
