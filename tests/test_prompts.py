"""The built-in texts: how many, how long in tokens, in which scripts, and that they are the same everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import regex
from corpus import SCRIPTS
from tokenizer_oracles import DIALECTS, make_tokenizer

from clip_export.prompts import prompts
from clip_export.spec import Dialect

DIGEST = "0e52f11ce90c5fe3f1b879d7b7957b12a5fe63a919508acfa3a1d3d2969c1b51"
PRINT_DIGEST = (
    "import hashlib; from clip_export.prompts import prompts;"
    "print(hashlib.sha256(repr(prompts()).encode()).hexdigest())"
)


def test_about_512_and_none_twice() -> None:
    assert len(prompts()) == len(set(prompts())) == 512


@pytest.mark.parametrize("dialect", DIALECTS)
def test_lengths_go_from_one_word_to_beyond_the_context(dialect: Dialect) -> None:
    tokenizer = make_tokenizer(dialect)
    counts = np.array([len(tokenizer.tokens(text)) for text in prompts()])
    assert counts.min() == 2  # start and end
    assert counts.max() > 100
    for low, high in ((3, 5), (6, 9), (10, 15), (16, 25), (26, 40), (41, 60), (61, 77), (78, 200)):
        assert ((low <= counts) & (counts <= high)).sum() >= 12, (low, high)
    ids = tokenizer(prompts(), truncate=True).input_ids
    assert (ids[:, -1] == tokenizer.spec.end_id).sum() >= 16  # every position of the context is used
    assert len(np.unique(ids)) > 1000


def test_scripts_marks_and_cases() -> None:
    together = "".join(prompts())
    missing = [script for script in SCRIPTS if not regex.search(rf"\p{{Script={script}}}", together)]
    assert not missing
    for kind in (r"\p{Emoji_Presentation}", r"\p{N}", r"\p{Sc}", r"\p{Sm}", r"\p{Mn}", r"\s{3}", "<[a-z]+>", r"&\w+;"):
        assert regex.search(kind, together), kind
    assert any(text.isupper() and len(text) > 3 for text in prompts())
    assert any(regex.fullmatch(r"\S+\.jpg", text) for text in prompts())


def test_captions_of_10_to_20_words() -> None:
    words = np.array([len(text.split()) for text in prompts()])
    assert ((words >= 10) & (words <= 20)).sum() >= 80
    assert (words == 1).sum() >= 40


def test_the_same_in_another_process() -> None:
    """Neither the hash seed nor the locale has a say."""
    here = hashlib.sha256(repr(prompts()).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C", "PYTHONUTF8": "0"}
        there = subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here


def test_the_texts_are_the_ones_that_calibrations_were_made_with() -> None:
    """A change of the texts is a change of every engine that is calibrated on them: it should be meant."""
    assert hashlib.sha256("\0".join(prompts()).encode()).hexdigest() == DIGEST
