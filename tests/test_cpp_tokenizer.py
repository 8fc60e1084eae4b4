"""The C++ tokenizer against Python's, id by id, and its tables against the libraries they were asked of."""

from __future__ import annotations

from collections.abc import Iterator

import corpus
import cpp_tables
import cpp_texts
import numpy as np
import pytest
from cpp_made import Cpp, CppError, CppTokenizer, build
from tokenizer_oracles import huggingface_json

from clip_export.spec import Dialect, TokenizerSpec
from clip_export.tokenizer import Tokenizer, clip_tokenizer_json, default_truncate

DIALECTS: tuple[Dialect, ...] = ("openai", "open_clip", "huggingface")
BLOCK = 256


@pytest.fixture(scope="module")
def cpp() -> Cpp:
    return Cpp(build())


@pytest.fixture(scope="module", params=DIALECTS)
def both(request: pytest.FixtureRequest, cpp: Cpp) -> tuple[Tokenizer, CppTokenizer]:
    return _both(request.param, cpp)


def _both(dialect: Dialect, cpp: Cpp, context: int = 77) -> tuple[Tokenizer, CppTokenizer]:
    huggingface = dialect == "huggingface"
    spec = TokenizerSpec(
        dialect=dialect,
        context_length=context,
        start_id=49406,
        end_id=49407,
        pad_id=49407 if huggingface else 0,
        pooling="first_end" if huggingface else "argmax",
        truncate=default_truncate(dialect),
    )
    json = huggingface_json() if huggingface else clip_tokenizer_json(dialect)
    return Tokenizer(spec, json), cpp.tokenizer(spec, json)


def _compare(python: Tokenizer, cpp: CppTokenizer, texts: list[str]) -> list[str]:
    """Fails at the first text with other ids; those that are refused as mojibake."""
    refused = []
    for start in range(0, len(texts), BLOCK):
        some = texts[start : start + BLOCK]
        while True:
            try:
                ids, ends = cpp(some, truncate=True)
                break
            except CppError as error:
                assert error.code == 21 and "looks like mojibake" in str(error), error
                refused.append(some.pop(int(str(error).split()[1])))
        expected = python(some, truncate=True)
        same = (expected.input_ids == ids).all(axis=1) & (expected.eot_index == ends)
        if not same.all():
            row = int(np.argmin(same))
            pytest.fail(f"{some[row]!r}: expected {expected.input_ids[row].tolist()}, found {ids[row].tolist()}")
    return refused


def _encodable(texts: Iterator[str] | list[str]) -> list[str]:
    return [text for text in texts if not any(0xD800 <= ord(char) <= 0xDFFF for char in text)]


def test_hand_picked_texts(both: tuple[Tokenizer, CppTokenizer]) -> None:
    python, cpp = both
    refused = _compare(python, cpp, _encodable(list(corpus.HAND_PICKED.values())))
    mojibake = [corpus.HAND_PICKED[name] for name in ("mojibake", "mojibake quotes", "lossy mojibake", "c1 controls")]
    assert refused == ([] if python.spec.dialect == "huggingface" else mojibake)


def test_sentences_in_many_scripts(both: tuple[Tokenizer, CppTokenizer]) -> None:
    texts = [text for several in corpus.sentences_by_script(60).values() for text in several]
    assert _compare(*both, texts) == []


def test_generated_texts(both: tuple[Tokenizer, CppTokenizer]) -> None:
    texts = list(cpp_texts.texts(6000, seed=7))
    assert len(_compare(*both, texts)) < 0.06 * len(texts)


@pytest.mark.slow
def test_a_million_generated_texts(both: tuple[Tokenizer, CppTokenizer]) -> None:
    _compare(*both, list(cpp_texts.texts(1_000_000, seed=2)))


@pytest.mark.slow
def test_the_whole_corpus(both: tuple[Tokenizer, CppTokenizer]) -> None:
    assert _compare(*both, _encodable(list(corpus.sentences()))) == []


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_code_point(dialect: Dialect, cpp: Cpp) -> None:
    """Each stands between letters, after a mark and before one: 20 in a text, which none of them ends."""
    python, ours = _both(dialect, cpp, context=1024)
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF and code != ord("<")]
    texts = [" ".join(f"a{c}Σ x\u0301{c}\u0327" for c in codes[at : at + 20]) for at in range(0, len(codes), 20)]
    refused = _compare(python, ours, texts)
    # What makes a text of 20 look like mojibake must not hide the other 19.
    singles = [text for many in refused for text in many.split(" ")]
    _compare(python, ours, singles)


@pytest.mark.slow
def test_tables_are_what_the_libraries_do() -> None:
    """The files of cpp/src/tables hold what the Python of record, ftfy and tokenizers give for every code point."""
    for name, content in cpp_tables.tables().items():
        assert (cpp_tables.FOLDER / name).read_text(encoding="ascii") == content, f"{name}: python tests/cpp_tables.py"


def test_the_table_of_entities_is_that_of_python_and_ftfy() -> None:
    assert (cpp_tables.FOLDER / "entities.inc").read_text(encoding="ascii") == cpp_tables.entities()


def test_texts_that_cannot_be_encoded(both: tuple[Tokenizer, CppTokenizer]) -> None:
    python, cpp = both
    with pytest.raises(CppError, match="text 1 cannot be encoded: byte 2 begins no character of UTF-8"):
        cpp([b"fine", b"ab\xff"])
    for text in (b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\xe4\xb8"):
        with pytest.raises(CppError, match="cannot be encoded") as raised:
            cpp([text])
        assert raised.value.code == 21
    if python.spec.dialect != "huggingface":
        with pytest.raises(CppError, match="text 0 cannot be encoded: Exceeds the limit"):
            cpp(["&#" + "1" * 5000 + ";"])


def test_a_text_too_long_says_what_python_says(both: tuple[Tokenizer, CppTokenizer]) -> None:
    python, cpp = both
    texts = ["short", "cat " * 80, "dog " * 90]
    with pytest.raises(CppError) as raised:
        cpp(texts, truncate=False)
    with pytest.raises(Exception, match="text 1 has 82 tokens") as expected:
        python(texts, truncate=False)
    assert str(raised.value) == str(expected.value)
    assert (cpp(texts, truncate=True)[0] == python(texts, truncate=True).input_ids).all()


def test_no_texts_and_empty_ones(both: tuple[Tokenizer, CppTokenizer]) -> None:
    python, cpp = both
    assert cpp([])[0].shape == (0, 77)
    assert (cpp(["", " ", "\n"])[0] == python(["", " ", "\n"]).input_ids).all()


def test_texts_beyond_any_context(both: tuple[Tokenizer, CppTokenizer]) -> None:
    texts = ["a" * 100_000, "ab1" * 30_000, "\u0301" * 50_000, "!" * 100_000, "漢" * 30_000, " " * 100_000 + "x"]
    assert _compare(*both, texts) == []


def test_mojibake_is_tokenized_as_it_stands_where_that_is_wanted(cpp: Cpp) -> None:
    """With a warning, and apart from the encoding as ftfy cleans it."""
    spec = TokenizerSpec(
        dialect="openai", context_length=77, start_id=49406, end_id=49407, pad_id=0, pooling="argmax", truncate=False
    )
    json = clip_tokenizer_json("openai")
    warning = cpp.tokenizer(spec, json, warn=True)
    python = Tokenizer(spec, json)
    ids, _ = warning(["schÃ¶n “cat”"])
    assert (ids != python(["schÃ¶n “cat”"]).input_ids).any()
    assert (ids[0] == python(["schÃ¶n", '"cat"']).input_ids[0])[:2].any()


def test_a_tokenizer_of_other_ends_is_refused(cpp: Cpp) -> None:
    spec = TokenizerSpec(
        dialect="openai", context_length=77, start_id=49406, end_id=5, pad_id=0, pooling="argmax", truncate=False
    )
    with pytest.raises(CppError) as raised:
        cpp.tokenizer(spec, clip_tokenizer_json("openai"))
    with pytest.raises(Exception, match="expected start and end ids") as expected:
        Tokenizer(spec, clip_tokenizer_json("openai"))
    assert str(raised.value) == str(expected.value)
