"""Strings that the tokenizers are compared on: hand-picked ones, and real sentences in many scripts."""

from __future__ import annotations

import functools
import gettext
from pathlib import Path

import django
import regex

HAND_PICKED: dict[str, str] = {
    "caption": "a photo of a cat",
    "empty": "",
    "spaces only": "   \t\n ",
    "upper case": "A Photo OF A Cat",
    "inner spaces": "  a   photo \t of\n\na  cat  ",
    "contractions": "it's I'm they're we've you'll he'd don't CAN'T IT'S",
    "apostrophes without words": "'' 's '' 'x ''s rock 'n' roll",
    "digits": "in 1984, 3.14 or 1,000,000 of them",
    "punctuation runs": "wow!!! ... (a) [b] {c} -- ?!?",
    "url": "see http://example.org/a_b?c=1#d",
    "long word": "pneumonoultramicroscopicsilicovolcanoconiosis",
    "underscores": "snake_case __init__ file_name.py",
    "hashtag and at": "#nofilter @user $5 50% ~tilde ^caret `tick` \\ |",
    "curly quotes": "“a cat” and ‘a dog’",
    "curly apostrophe": "it’s the dog’s",
    "low and angle quotes": "„ein Hund“ «un chien»",
    "dashes and ellipsis": "a – b — c… d",
    "ampersand entity": "salt &amp; pepper",
    "entity twice": "salt &amp;amp; pepper",
    "entity three times": "salt &amp;amp;amp; pepper",
    "markup with entity": "<b>salt &amp; pepper</b>",
    "markup with entity twice": "<b>salt &amp;amp; pepper</b> <i>&amp;lt;3</i>",
    "numeric entities": "&#39;quoted&#39; &#x263a; &#128;",
    "entity without semicolon": "fish &amp chips &copy 2020",
    "unknown entity": "AT&T &foo; & Q&A",
    "angle brackets": "a < b > c <3",
    "entity of an end token": "&lt;|endoftext|&gt; after",
    "fullwidth": "ＬＯＵＤ　ＮＯＩＳＥ １２３",
    "halfwidth katakana": "ｶﾀｶﾅ",
    "ligatures": "ﬁne ﬂour oﬃce ﬆop",
    "mojibake": "schÃ¶n cafÃ©",
    "mojibake quotes": "â€œquotedâ€\x9d itâ€™s",
    "lossy mojibake": "voilÃ le travail",
    "byte order mark": "\ufeffa cat",
    "replacement character": "a \ufffd cat",
    "control characters": "a\x00b\x01c\x07d\x1be\x7ff",
    "separators 1c to 1f": "a\x1cb\x1dc\x1ed\x1fe",
    "c1 controls": "a\x80b\x85c\x96d",
    "ansi colours": "\x1b[36;44mcoloured\x1b[0m text",
    "line breaks": "a\r\nb\rc\u2028d\u2029e",
    "vertical tab and form feed": "a\x0bb\x0cc",
    "nul bytes": "\x00a cat\x00\x00",
    "title case digraph": "ǅ Ǆ ǆ",
    "final sigma": "ΟΔΟΣ ΟΔΟΣ. ΣΑΣ",
    "sharp s": "STRASSE straße ẞ",
    "dotted capital i": "İstanbul ISPARTA ısı",
    "long s": "'ſ 'S it'ſ ſt",
    "kelvin and angstrom signs": "'K 5 K Å Ω",
    "end token": "before <|endoftext|> after",
    "start token": "<|startoftext|>a cat",
    "end token in capitals": "<|ENDOFTEXT|>",
    "end token after punctuation": "!<|endoftext|> and <|endoftext|><|endoftext|>",
    "broken end token": "<|endoftext| > <|endof text|> |endoftext|> <| |>",
    "open_clip end token": "a <end_of_text> b <start_of_text>",
    "open_clip end token after punctuation": "!<end_of_text>! <end_of_text><start_of_text>",
    "long s in special tokens": "<|ſtartoftext|> <ſtart_of_text>",
    "emoji": "😀 a smile 🎉🎉",
    "emoji zwj sequence": "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "flags and skin tones": "🇫🇷🇩🇪 👍🏽",
    "keycaps and variation selectors": "1️⃣ ☎︎ ☎️",
    "han": "一只猫的照片",
    "japanese": "猫の写真とカタカナー",
    "korean": "고양이 사진",
    "korean jamo": "한글",
    "thai": "ภาพถ่ายของแมว",
    "hindi": "बिल्ली की तस्वीर",
    "arabic": "صورة قطة ١٢٣",
    "hebrew points": "שָׁלוֹם",
    "combining marks": "cafe\u0301 n\u0303 a\u0300\u0301\u0302",
    "combining iota": "α\u0345 a\u0345b \u0345",
    "zalgo": "z\u0351\u0352\u0353a\u0310\u0311l\u0360g\u0334o",
    "numbers that are not digits": "½ ² Ⅷ ① ৳৫ 四",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\u00adf",
    "directions": "\u202eabc\u202c \u2066d\u2069",
    "exotic spaces": "a\u00a0b\u2003c\u3000d\u1680e\u202ff\u205fg",
    "mathematical letters": "𝓪 𝔠𝔞𝔱 𝟙𝟚",
    "gothic and cuneiform": "𐌰𐌱 𒀀𒀁 𓀀",
    "private use and unassigned": "\ue000 \U000f0000 \u0378 \U0010fffd",
    "newest letters": "\u1c89 \U00010d4a \U00016d40",
    "paired surrogates": "\ud83d\ude00",
    "lone surrogate": "a\ud800b",
    "mixed scripts": "abcабвαβγאבג一二三12٣",
}


SCRIPTS = (
    *("Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gurmukhi"),
    *("Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer", "Malayalam", "Myanmar", "Tamil", "Telugu"),
    *("Thai", "Han", "Latin"),  # last: most sentences of the other scripts have a word of these
)


@functools.cache
def sentences() -> tuple[str, ...]:
    """Every translated message of Django and of its contributed applications, once each, in a fixed order."""
    root = Path(django.__file__).parent
    found: dict[str, None] = {}
    for path in sorted(root.rglob("LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        found |= {text: None for key, text in catalogue.items() if key and len(text) >= 12}
    return tuple(found)


@functools.cache
def sentences_by_script(most: int = 300) -> dict[str, tuple[str, ...]]:
    """At most `most` sentences for each Unicode script, spread over the languages; each sentence counts once."""
    sorted_out: dict[str, list[str]] = {script: [] for script in SCRIPTS}
    letters = {script: regex.compile(rf"[\p{{L}}&&\p{{Script={script}}}]", regex.V1) for script in SCRIPTS}
    for text in sentences():
        if script := next((script for script in SCRIPTS if letters[script].search(text)), None):
            sorted_out[script].append(text)
    return {script: tuple(texts[:: -(-len(texts) // most)]) for script, texts in sorted_out.items() if texts}
