"""Any text at all: each dialect against its original, and the quick way against the long one."""

from __future__ import annotations

import numpy as np
import pytest
from corpus import HAND_PICKED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizer_oracles import DIALECTS, make_tokenizer, original

from clip_export.errors import TextError
from clip_export.spec import Dialect
from clip_export.text_cleaning import CLEANERS, is_plain
from clip_export.tokenizer import Tokenizer

PLANES = [(plane << 16, (plane << 16) | 0xFFFF) for plane in range(17)]
ANYTHING = st.one_of(
    st.text(max_size=40),
    *(st.text(st.characters(min_codepoint=low, max_codepoint=high), min_size=1, max_size=6) for low, high in PLANES),
)
FRAGMENTS = st.sampled_from(
    (
        *HAND_PICKED.values(),
        *(
            "<",
            "|",
            "<|",
            "|>",
            "<|end",
            "oftext|>",
            "endoftext",
            "<|endoftext|>",
            "<start_of_text>",
            "<end_of_",
            "text>",
        ),
        *("'", "'s", "'ſ", "'LL", "’", "&", "&amp;", "&amp", ";", "&#", "39;", "lt;", "&lt;", "Ã", "©", "â€", "\u2122"),
        *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u0085", "\x1b[0m", "\ufeff", "\u0345"),
        *(
            "a",
            "Z",
            "é",
            "Σ",
            "σ",
            "İ",
            "1",
            "½",
            "一",
            "が",
            "か\u3099",
            "한",
            "ᄒ",
            "😀",
            "\u200d",
            "ﬁ",
            "Ａ",
            "ｱ",
            "ǅ",
        ),
        "\u0301",
    )
)
TEXTS = st.one_of(ANYTHING, st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join))
PLAIN_WORDS = (
    *("a", "cat", "it's", "DON'T", "''", "!!", "12", "x_y", "|>", "<|", "&", "#1;", "\t", "\n", ""),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'x", "he'd", "'r", "'l", "'v"),
)
PLAIN_TEXTS = st.one_of(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60),
    st.lists(st.sampled_from(PLAIN_WORDS), max_size=12).map(" ".join),
)
SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def tokenizers() -> dict[Dialect, Tokenizer]:
    return {dialect: make_tokenizer(dialect) for dialect in DIALECTS}


@pytest.mark.parametrize("dialect", ["openai", "open_clip"])
@SETTINGS
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=["\ud800", "a\u0345ſ"])
def test_any_text_with_cleaning(tokenizers: dict[Dialect, Tokenizer], dialect: Dialect, texts: list[str]) -> None:
    ours = tokenizers[dialect](texts, truncate=True).input_ids
    np.testing.assert_array_equal(ours, original(dialect)(texts))


@SETTINGS
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_in_huggingface(tokenizers: dict[Dialect, Tokenizer], texts: list[str]) -> None:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        with pytest.raises(TextError, match="cannot be encoded"):
            tokenizers["huggingface"](texts, truncate=True)
        return
    ours = tokenizers["huggingface"](texts, truncate=True).input_ids
    np.testing.assert_array_equal(ours, original("huggingface")(texts))


@pytest.mark.parametrize("dialect", DIALECTS)
@SETTINGS
@given(texts=st.lists(PLAIN_TEXTS, max_size=6))
def test_the_quick_way_equals_the_long_way(
    tokenizers: dict[Dialect, Tokenizer], dialect: Dialect, texts: list[str]
) -> None:
    quick = tokenizers[dialect]
    assert quick._plain is not None
    plain = [text for text in texts if is_plain(text)]
    if not plain:
        return
    rows = list(range(len(plain)))
    for one, other in zip(quick._encode_plain(plain, rows), quick._encode(plain, rows), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dialect", ["openai", "open_clip"])
@SETTINGS
@given(text=PLAIN_TEXTS)
def test_cleaning_only_lowers_plain_texts(dialect: Dialect, text: str) -> None:
    if is_plain(text):
        assert CLEANERS[dialect](text).split() == text.lower().split()


@pytest.mark.parametrize("text", ["é", "a&b", "a<b", "a\tb", "a\nb", "\x7f", "a" * 1001, "’"])
def test_what_is_not_plain(text: str) -> None:
    assert not is_plain(text)
    assert is_plain("a" + "b" * 999)
