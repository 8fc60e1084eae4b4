"""Each dialect against its original, id by id; and what happens with texts that are no captions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracles
import pytest
from corpus import HAND_PICKED, sentences, sentences_by_script
from tokenizer_oracles import (
    CONTEXT,
    DIALECTS,
    clip_vocabulary,
    frozen_classes,
    frozen_merges,
    make_tokenizer,
    original,
    spec_of,
)
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from vocabulary_data import open_clip_merges, unicode_classes

from clip_export.errors import SpecError, TextError
from clip_export.spec import Dialect
from clip_export.tokenizer import Tokenizer, clip_tokenizer_json, default_truncate, dialect_versions

LONE_SURROGATE = HAND_PICKED["lone surrogate"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[Dialect, Tokenizer]:
    return {dialect: make_tokenizer(dialect) for dialect in DIALECTS}


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def tokenizer(tokenizers: dict[Dialect, Tokenizer], dialect: Dialect) -> Tokenizer:
    return tokenizers[dialect]


def assert_equal(tokenizer: Tokenizer, texts: Sequence[str], context_length: int = CONTEXT) -> None:
    ours = tokenizer(texts, truncate=True).input_ids
    theirs = original(tokenizer.spec.dialect, context_length)(texts)
    differing = [texts[row] for row in np.flatnonzero((ours != theirs).any(axis=1))]
    assert not differing, f"{len(differing)} of {len(texts)} differ, the first: {differing[0]!r}"


# ---------------------------------------------------------------- ids


def test_hand_picked_strings(tokenizer: Tokenizer) -> None:
    strings = list(HAND_PICKED.values())
    if tokenizer.spec.dialect == "huggingface":  # what cannot be UTF-8 is an error in both, see below
        strings = [text for text in strings if not any("\ud800" <= char <= "\udfff" for char in text)]
    assert len(strings) >= 61
    assert_equal(tokenizer, strings)
    for text in strings:  # alone as well: a batch goes two ways
        assert_equal(tokenizer, [text])


def test_real_sentences_in_many_scripts(tokenizer: Tokenizer) -> None:
    by_script = sentences_by_script()
    texts = [text for group in by_script.values() for text in group]
    assert len(by_script) >= 20
    assert min(map(len, by_script.values())) >= 30
    assert len(texts) >= 4000
    assert_equal(tokenizer, texts)


@pytest.mark.slow
def test_all_real_sentences(tokenizer: Tokenizer) -> None:
    assert len(sentences()) > 30_000
    assert_equal(tokenizer, sentences())


def test_the_dialects_differ_where_they_should(tokenizers: dict[Dialect, Tokenizer]) -> None:
    def same(one: Dialect, other: Dialect, text: str) -> bool:
        ids = [tokenizers[dialect]([text]) for dialect in (one, other)]
        cut = [tokens.input_ids[0, : tokens.eot_index[0] + 1].tolist() for tokens in ids]
        return cut[0] == cut[1]

    texts = ("a b", "“a” &amp; b", "<|endoftext|>")
    assert [same("openai", "open_clip", text) for text in texts] == [True, True, False]
    assert [same("openai", "huggingface", text) for text in texts] == [True, False, True]


def word_pattern(dialect: Dialect) -> str:
    split, _ = json.loads(clip_tokenizer_json(dialect))["pre_tokenizer"]["pretokenizers"]
    return str(split["pattern"]["Regex"])


def test_every_code_point_is_split_as_the_original_pattern_splits_it() -> None:
    """The frozen pattern against the original one: all of Unicode between letters, what has a meaning also alone."""
    split = Split(Regex(word_pattern("openai")), behavior="removed", invert=True)
    findall = oracles.openai_clip().clip._tokenizer.pat.findall
    codes = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    for start in range(0, len(codes), 256):
        chars = [chr(code) for code in codes[start : start + 256]]
        assigned = [char for char in chars if unicodedata.category(char) not in ("Cn", "Co")]
        text = " ".join([*(f"a{char}b" for char in chars), *(f"{char} '{char}" for char in assigned)])
        text = text.lower()  # as both lower it
        ours = [word for word, _ in split.pre_tokenize_str(text)]
        assert ours == findall(text), f"from U+{codes[start]:04X}"


def test_open_clips_pattern_differs_in_the_special_words_alone() -> None:
    patterns = [word_pattern(dialect).partition("|'") for dialect in ("openai", "open_clip")]
    assert patterns[0][1:] == patterns[1][1:]
    assert (patterns[0][0], patterns[1][0]) == (
        r"<\|[sſ]tartoftext\|>|<\|endoftext\|>",
        "<[sſ]tart_of_text>|<end_of_text>",
    )
    tails = [package._tokenizer.pat for package in (oracles.openai_clip().clip, oracles.open_clip().tokenizer)]
    assert tails[0].pattern.partition("|'")[1:] == tails[1].pattern.partition("|'")[1:]
    assert tails[0].flags == tails[1].flags


@pytest.mark.slow
def test_every_code_point_from_text_to_ids(dialect: Dialect) -> None:
    tokenizer = make_tokenizer(dialect, context_length=4096)
    codes = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = ["".join(f"{chr(c)} a{chr(c)}b " for c in codes[i : i + 128]) for i in range(0, len(codes), 128)]
    for i in range(0, len(texts), 512):
        assert_equal(tokenizer, texts[i : i + 512], 4096)


# ---------------------------------------------------------------- vocabulary


def test_merges_are_open_clips() -> None:
    assert frozen_merges() == open_clip_merges()
    assert len(frozen_merges()) == 48_894


def test_character_classes_are_the_regex_modules() -> None:
    expected = unicode_classes()
    found = frozen_classes()
    assert found["unicode"] == expected["unicode"], (
        "regex is of another Unicode now: decide whether CLIP's dialects are"
    )
    for name in ("letters", "numbers", "separators"):
        assert found[name] == expected[name]


def test_vocabulary_is_openais() -> None:
    vocabulary = json.loads(clip_tokenizer_json("openai"))["model"]["vocab"]
    theirs = clip_vocabulary()
    assert {symbol: index for symbol, index in vocabulary.items() if index < 49406} == {
        symbol: index for symbol, index in theirs.items() if index < 49406
    }
    for word in ("<|startoftext|>", "<|endoftext|>"):
        assert vocabulary[word + "</w>"] == theirs[word]


def test_the_json_is_the_same_each_time() -> None:
    again = clip_tokenizer_json.__wrapped__("openai")
    assert again == clip_tokenizer_json("openai")
    assert clip_tokenizer_json() == clip_tokenizer_json("openai") != clip_tokenizer_json("open_clip")


# ---------------------------------------------------------------- length


def captions_of(tokens: int) -> str:
    """A text of so many tokens, start and end included; no word of it is plain punctuation."""
    return " ".join(["cat"] * (tokens - 2))


@pytest.mark.parametrize("tokens", [2, 3, 76, 77, 78, 79, 200])
def test_cutting_is_the_originals(tokenizer: Tokenizer, tokens: int) -> None:
    assert_equal(tokenizer, [captions_of(tokens), "naïve " + captions_of(tokens)])


@pytest.mark.parametrize("context_length", [2, 3, 8, 128])
def test_other_context_lengths(dialect: Dialect, context_length: int) -> None:
    tokenizer = make_tokenizer(dialect, context_length=context_length)
    assert_equal(tokenizer, ["", "a cat", "é", captions_of(100), "a dog on the “beach” <|endoftext|>"], context_length)


def test_too_long_is_an_error_where_the_original_raises(tokenizers: dict[Dialect, Tokenizer]) -> None:
    texts = ["a cat", captions_of(78), captions_of(500)]
    with pytest.raises(RuntimeError, match="too long"):
        oracles.openai_clip().tokenize(texts)
    for dialect in ("openai", "huggingface"):
        with pytest.raises(TextError, match=r"text 1 has 78 tokens .* holds 77 \(and 1 more") as caught:
            tokenizers[dialect](texts)
        assert caught.value.hint is not None
        assert "truncate=True" in caught.value.hint
        tokenizers[dialect]([captions_of(77)])
    assert tokenizers["open_clip"](texts).input_ids.shape == (3, CONTEXT)
    with pytest.raises(TextError, match="text 1 has 78"):
        tokenizers["open_clip"](texts, truncate=False)


def test_default_truncate() -> None:
    assert {d: default_truncate(d) for d in DIALECTS} == {"openai": False, "open_clip": True, "huggingface": False}


@pytest.mark.parametrize("word", ["a", "word ", "!", "9", "é", "的", "xq", "&amp;", "<"])
def test_hundred_thousand_characters(tokenizer: Tokenizer, word: str) -> None:
    text = (word * 100_000)[:100_000]
    assert_equal(tokenizer, [text[:3000]])  # the original needs minutes for a long word
    beginning = tokenizer([text[:5000]], truncate=True).input_ids[0]
    np.testing.assert_array_equal(tokenizer([text], truncate=True).input_ids[0], beginning)
    with pytest.raises(TextError, match="text 0 has "):
        tokenizer([text], truncate=False)


# ---------------------------------------------------------------- pooling


def test_eot_index_is_where_the_originals_pool(tokenizer: Tokenizer) -> None:
    texts = ["a cat", "", "a <|endoftext|> b", "a <end_of_text> b", captions_of(100)]
    tokens = tokenizer(texts, truncate=True)
    ids = original(tokenizer.spec.dialect)(texts)
    np.testing.assert_array_equal(tokens.eot_index, ids.argmax(axis=-1))  # text[torch.arange(n), ids.argmax(-1)]
    np.testing.assert_array_equal(tokens.eot_index, (ids == 49407).argmax(axis=-1))  # no id above it: the same
    moved = {"openai": 2, "huggingface": 2, "open_clip": 9}[tokenizer.spec.dialect]
    assert tokens.eot_index[2] == moved
    assert tokens.eot_index.dtype == tokens.input_ids.dtype == np.int32


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("a cat", r"expected a list of texts, found one str"),
        (b"a cat", r"expected a list of texts, found one bytes"),
        (None, r"expected a list of texts, found NoneType"),
        (3, r"expected a list of texts, found int"),
        (["a", None], r"text 1 is not a str but NoneType"),
        (["a", "b", b"c"], r"text 2 is not a str but bytes"),
        ([["a"]], r"text 0 is not a str but list"),
        ([float("nan")], r"text 0 is not a str but float"),
    ],
)
def test_what_is_no_text(tokenizer: Tokenizer, texts: Any, words: str) -> None:
    with pytest.raises(TextError, match=words) as caught:
        tokenizer(texts)
    assert caught.value.hint


def test_no_texts(tokenizer: Tokenizer) -> None:
    tokens = tokenizer([])
    assert tokens.input_ids.shape == (0, CONTEXT)
    assert tokens.eot_index.shape == (0,)
    assert tokens.input_ids.dtype == tokens.eot_index.dtype == np.int32


def test_other_sequences(tokenizer: Tokenizer) -> None:
    texts = ["a cat", "naïve"]
    expected = tokenizer(texts).input_ids
    for same in (tuple(texts), np.array(texts), (text for text in texts)):
        np.testing.assert_array_equal(tokenizer(same).input_ids, expected)  # type: ignore[arg-type]


def test_what_the_original_cannot_encode(tokenizers: dict[Dialect, Tokenizer]) -> None:
    with pytest.raises(TypeError):
        original("huggingface")([LONE_SURROGATE])
    with pytest.raises(TextError, match=r"text 1 cannot be encoded.*surrogates"):
        tokenizers["huggingface"](["a", LONE_SURROGATE])
    digits = "&#" + "9" * 5000 + ";"
    for dialect in ("openai", "open_clip"):
        with pytest.raises(ValueError, match="digits"):
            original(dialect)([digits])  # type: ignore[arg-type]
        with pytest.raises(TextError, match=r"text 1 cannot be encoded.*digits"):
            tokenizers[dialect](["a", digits])  # type: ignore[index]


def test_a_tokenizer_of_another_dialect() -> None:
    with pytest.raises(SpecError, match=r"start and end ids \[49406, 49407\] in dialect open_clip"):
        Tokenizer(spec_of("open_clip"), clip_tokenizer_json("openai"))
    with pytest.raises(SpecError, match=r"\[49406, 49408\] in dialect openai, the tokenizer has \[49406, 49407\]"):
        Tokenizer(spec_of("openai", end_id=49408), clip_tokenizer_json("openai"))
    with pytest.raises(SpecError, match="no vocabulary of its own"):
        clip_tokenizer_json("huggingface")


@pytest.mark.parametrize("damaged", ["", "[]", "{}", clip_tokenizer_json("openai")[:-1000], '{"model": 3}'])
def test_a_damaged_json(damaged: str) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        Tokenizer(spec_of("openai"), damaged)


# ---------------------------------------------------------------- conduct


def test_a_table_of_words_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_export.plain_text.REMEMBERED_WORDS", 50)
    tokenizer = make_tokenizer("openai")
    texts = [text for text in sentences_by_script()["Latin"] if text.isascii()]
    for i in range(0, 90, 9):
        assert_equal(tokenizer, texts[i : i + 9])
    assert tokenizer._plain is not None
    assert len(tokenizer._plain._ids) < 300


def test_a_batch_larger_than_a_block(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    texts = [text for group in sentences_by_script().values() for text in group[:10]] + list("abc")
    whole = tokenizer(texts, truncate=True)
    monkeypatch.setattr("clip_export.tokenizer.BLOCK", 7)
    parts = tokenizer(texts, truncate=True)
    np.testing.assert_array_equal(whole.input_ids, parts.input_ids)
    np.testing.assert_array_equal(whole.eot_index, parts.eot_index)


def test_threads_agree(tokenizer: Tokenizer) -> None:
    texts = [text for group in sentences_by_script().values() for text in group[:30]]
    expected = tokenizer(texts, truncate=True).input_ids
    with ThreadPoolExecutor(8) as pool:
        shifted = [texts[i:] + texts[:i] for i in range(0, 160, 10)]
        results = list(pool.map(lambda batch: tokenizer(batch, truncate=True).input_ids, shifted))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, np.roll(expected, -10 * i, axis=0))


FORKING = """
import os, sys
from clip_export.spec import TokenizerSpec
from clip_export.tokenizer import Tokenizer, clip_tokenizer_json
spec = TokenizerSpec(dialect="openai", context_length=77, start_id=49406, end_id=49407, pad_id=0, pooling="argmax",
                     truncate=True)
tokenizer = Tokenizer(spec, clip_tokenizer_json())
texts = [f"naïve {i}" for i in range(200)]
before = tokenizer(texts).input_ids
child = os.fork()
if child == 0:
    os._exit(0 if (tokenizer(texts).input_ids == before).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.environ.get("TOKENIZERS_PARALLELISM"),
      (tokenizer(texts).input_ids == before).all(), sorted({"torch", "transformers", "regex"} & sys.modules.keys()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_tokenizes_quietly() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert (result.stdout, result.stderr) == ("0 None True []\n", "")


def test_tokens_for_reading(tokenizers: dict[Dialect, Tokenizer]) -> None:
    assert tokenizers["openai"].tokens("It's <|endoftext|>") == [
        *("<|startoftext|>", "it</w>", "'s</w>", "<|endoftext|>", "<|endoftext|>"),
    ]
    assert tokenizers["huggingface"].tokens("a cat") == ["<|startoftext|>", "a</w>", "cat</w>", "<|endoftext|>"]
    assert tokenizers["open_clip"].tokens("a")[0] == "<start_of_text>"
    assert len(tokenizers["openai"].tokens(captions_of(100))) == 100


def test_versions() -> None:
    versions = dialect_versions()
    assert set(versions) == {"ftfy", "python", "tokenizers", "unicode"}
    import ftfy

    assert versions["ftfy"] == ftfy.__version__
