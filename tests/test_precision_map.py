"""Precision maps as files: what is written is read again, and anything else is an error that names its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_export.errors import InputError
from clip_export.precision_map import HIGH, PrecisionMap, check_names, check_towers, read_map

NAMES = ("blocks.0.attention.qkv/MatMul", "blocks.0.mlp.fc1/MatMul", "blocks.0.mlp.fc2/MatMul")
MAP = PrecisionMap(
    precision="auto",
    method="mse",
    towers={"image": dict.fromkeys(NAMES, "int8"), "text": {NAMES[0]: HIGH, NAMES[1]: "int8", NAMES[2]: "fp8"}},
)
PLAIN = {"precision": MAP.precision, "method": MAP.method, "towers": MAP.towers}

NUMBERS = st.integers() | st.floats(allow_nan=True)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FORMATS = st.sampled_from(["int8", "fp8", HIGH])


def write(path: Path, plain: object) -> Path:
    path.write_text(json.dumps(plain), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of a property: each writes it anew."""
    return tmp_path_factory.mktemp("maps") / "auto.map.json"


# What is written is read


def test_a_map_is_read_as_it_was_written(file: Path) -> None:
    MAP.save(file)
    found = read_map(file)
    assert found == MAP
    assert list(found.towers) == list(MAP.towers)  # in the order of the graph, for people
    assert json.loads(file.read_text()) == PLAIN | {"attention": False, "half_cosine": None}
    file.write_text(json.dumps(PLAIN))  # as it was written before those two were known
    assert read_map(file) == MAP


@given(
    towers=st.dictionaries(
        st.sampled_from(["image", "text"]), st.dictionaries(st.text(min_size=1), FORMATS, max_size=5), max_size=2
    ),
    precision=st.text(),
)
def test_any_map_is_read_as_it_was_written(file: Path, towers: dict[str, dict[str, str]], precision: str) -> None:
    made = PrecisionMap(precision=precision, method="mse", towers=towers)  # type: ignore[arg-type]
    made.save(file)
    first = file.read_bytes()
    assert read_map(file) == made
    read_map(file).save(file)
    assert file.read_bytes() == first


# What is none


@given(plain=JSON)
def test_other_json_is_an_error_of_ours(file: Path, plain: object) -> None:
    with pytest.raises(InputError, match=r"auto\.map\.json is not a precision map: ") as caught:
        read_map(write(file, plain))
    assert "that a build wrote" in str(caught.value.hint)


@given(key=st.sampled_from(sorted(PLAIN)), value=JSON)
def test_a_key_that_holds_something_else(file: Path, key: str, value: object) -> None:
    try:
        found = read_map(write(file, PLAIN | {key: value}))
    except InputError as error:
        assert "is not a precision map" in error.message
    else:  # such as another name, or no towers
        assert getattr(found, key) == value


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_json(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(InputError, match="is not a precision map"):
        read_map(file)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], r"expected an object, found list"),
        ({}, r"missing key method, precision, towers"),
        (PLAIN | {"speed": 11}, r"unknown key speed \(known: precision, method, towers, attention, half_cosine\)"),
        (PLAIN | {"precision": 8}, r"precision: expected str, found 8"),
        (PLAIN | {"towers": ["image"]}, r"towers: expected an object, found list"),
        (PLAIN | {"towers": {"sound": {}}}, r"'sound' is not one of text, image"),
        (PLAIN | {"towers": {"image": "int8"}}, r"towers\.image: expected an object, found str"),
        (PLAIN | {"towers": {"image": {"a": None}}}, r"towers\.image\.a: expected str, found None"),
        (PLAIN | {"towers": {"image": {"a": "int4"}}}, r"image\.a: expected one of int8, fp8, fp16, found 'int4'"),
        (PLAIN | {"towers": {"image": {"a": "INT8"}}}, r"image\.a: expected one of int8, fp8, fp16, found 'INT8'"),
    ],
)
def test_the_message_names_the_key(file: Path, plain: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_map(write(file, plain))


def test_a_layer_that_is_named_twice(file: Path) -> None:
    file.write_text('{"precision": "auto", "method": "mse", "towers": {"image": {"a": "int8", "a": "fp16"}}}')
    with pytest.raises(InputError, match="duplicate key 'a'"):
        read_map(file)


def test_nesting_without_end(file: Path) -> None:
    file.write_text('{"towers": ' * 90_000)
    with pytest.raises(InputError, match="is not a precision map"):
        read_map(file)


def test_a_file_that_is_too_large_is_not_parsed(file: Path) -> None:
    MAP.save(file)
    data = file.read_bytes()
    file.write_bytes(data + b" " * (2**20 - len(data)))
    assert read_map(file) == MAP
    file.write_bytes(data + b" " * (2**20 + 1 - len(data)))
    with pytest.raises(InputError, match="is larger than a precision map can be"):
        read_map(file)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_map(tmp_path)
    with pytest.raises(InputError, match=r"nothing\.json cannot be read: No such file") as caught:
        read_map(tmp_path / "nothing.json")
    assert caught.value.hint == "check the path"


# Whether it fits a graph


def test_the_layers_of_the_graph_exactly() -> None:
    known = {NAMES[0]: "its scale is too small", NAMES[1]: None, NAMES[2]: None}
    check_names(MAP.towers["text"], known, "the text tower")


def test_layers_that_the_graph_has_not() -> None:
    wanted = MAP.towers["image"] | {f"blocks.{number}.x": HIGH for number in range(5)}
    message = (
        r"the map of the image tower names layers that the graph has not: blocks\.0\.x, .*blocks\.2\.x and 2 more\n"
    )
    with pytest.raises(InputError, match=message) as caught:
        check_names(wanted, dict.fromkeys(NAMES), "the image tower")
    assert caught.value.hint == "give the map of the same architecture"


def test_towers_and_formats_are_those_of_the_precision() -> None:
    check_towers(MAP, ["image"], "auto", "int8")
    check_towers(MAP, ["image", "text"], "autofp8", "fp8")
    with pytest.raises(InputError, match="layers of the text tower in fp8, and auto was asked for") as caught:
        check_towers(MAP, ["image", "text"], "auto", "int8")
    assert caught.value.hint == "ask for fp8, or make them int8"
    alone = PrecisionMap(precision="auto", method="mse", towers={"text": {}})
    with pytest.raises(InputError, match="says nothing of the image tower"):
        check_towers(alone, ["text", "image"], "auto", "int8")


def test_layers_that_are_missing() -> None:
    with pytest.raises(InputError, match=r"the map of the text tower says nothing of: blocks\.9, blocks\.10\n"):
        check_names(MAP.towers["text"], dict.fromkeys((*NAMES, "blocks.9", "blocks.10")), "the text tower")


def test_layers_that_cannot_be_quantized() -> None:
    known = dict.fromkeys(NAMES) | {NAMES[1]: "its scale is too small"}
    with pytest.raises(
        InputError, match=r"quantizes what cannot be: .*fc1/MatMul \(its scale is too small\)"
    ) as caught:
        check_names(MAP.towers["text"], known, "the text tower")
    assert caught.value.hint == f"make them {HIGH}"
