"""Captions per second of each dialect against its original, and how far the two agree.

    python benchmarks/tokenizer.py                 # speed
    python benchmarks/tokenizer.py --parity        # ids on the hand-picked strings and on Django's catalogues
    python benchmarks/tokenizer.py --json          # either one as JSON

The two sides take turns on the same captions, and the median of the rounds counts. Each side returns an integer array
[n, 77]: int32 ours, int64 the originals. Both have seen the captions once before, so that all caches are warm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
from corpus import HAND_PICKED, sentences, sentences_by_script
from tokenizer_oracles import DIALECTS, frozen_merges, make_tokenizer, original

from clip_export.spec import Dialect
from clip_export.text_cleaning import is_plain
from clip_export.tokenizer import Tokenizer

UNUSED_ID = -1  # as padding it lets rows of different dialects be compared, and tokens be counted

TEMPLATES = (
    "a photo of a {} {}",
    "a painting of the {} with a {} {}",
    "two {} running through the {}",
    "A {} of fresh {} on a wooden table.",
    "an old red {} parked beside a {}, 1984",
    "a woman holding a {} in the {} {}",
    "close-up of {} {} and {}, high resolution, 4k",
    "that's the {} near the {} harbour at night",
    "a group of {} playing {} in {}",
    "the skyline of {}, seen from {} above",
    "stock photo: {} {} {} {}",
    "IMG_2041 {} {}",
)
PLAIN_ENDINGS = (*[""] * 20, " at sunset", " in winter", "!", ".")
WEB_ENDINGS = (*PLAIN_ENDINGS, " in São Paulo", " — “golden hour”", " &amp; more")  # one caption in nine needs cleaning


def captions(count: int, endings: Sequence[str]) -> list[str]:
    """Captions of natural length, words by Zipf's law from CLIP's own vocabulary, and one of `endings`.

    CLIP's merges were learned from captions, so the words among them, in their order, are the words of captions.
    """
    draw = random.Random(2026)
    parts = (line.split(" ") for line in frozen_merges())
    words = [left + right.removesuffix("</w>") for left, right in parts if right.endswith("</w>")]
    words = [word for word in words if len(word) > 2 and word.isascii() and word.isalpha()]
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
    made = []
    for _ in range(count):
        template = draw.choice(TEMPLATES)
        filling = draw.choices(words, cum_weights=weights, k=template.count("{}"))
        made.append(template.format(*filling) + draw.choice(endings))
    return made


def speed(count: int, rounds: int) -> dict[str, Any]:
    """Captions per second of both sides in each dialect, and their ratio, for two kinds of captions."""
    kinds = {"plain": captions(count, PLAIN_ENDINGS), "web": captions(count, WEB_ENDINGS)}
    rows = [row for name, texts in kinds.items() for row in timed(name, texts, rounds)]
    return {"speed": rows, "captions": [described(*kind) for kind in kinds.items()], "cpus": os.cpu_count()}


def described(name: str, texts: list[str]) -> dict[str, Any]:
    ids = make_tokenizer("openai", pad_id=UNUSED_ID)(texts).input_ids
    words = {word for text in texts for word in text.split()}
    share = sum(map(is_plain, texts)) / len(texts)
    facts = {"count": len(texts), "words": len(words), "tokens": float((ids != UNUSED_ID).sum(axis=1).mean())}
    return {"captions": name, **facts, "plain": share}


def timed(name: str, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dialect in DIALECTS:
        sides = {"ours": ids_of(make_tokenizer(dialect)), "original": original(dialect)}
        assert np.array_equal(*(side(texts) for side in sides.values())), f"{dialect}: ids differ"
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, tokenize in sides.items():
                start = time.perf_counter()
                tokenize(texts)
                times[side].append(time.perf_counter() - start)
        rate = {side: len(texts) / statistics.median(values) for side, values in times.items()}
        rows.append({"captions": name, "dialect": dialect, **rate, "ratio": rate["ours"] / rate["original"]})
    return rows


def ids_of(tokenizer: Tokenizer) -> Callable[[Sequence[str]], np.ndarray]:
    return lambda texts: tokenizer(texts).input_ids


def parity() -> dict[str, Any]:
    """Differing strings by dialect and corpus, and how many hand-picked strings tell two dialects apart."""
    hand_picked = [text for text in HAND_PICKED.values() if not any("\ud800" <= char <= "\udfff" for char in text)]
    by_script = sentences_by_script()
    balanced = [text for texts in by_script.values() for text in texts]
    corpora = {"hand-picked": hand_picked, f"{len(by_script)} scripts": balanced, "all of Django": list(sentences())}
    rows = [compared(dialect, name, texts) for dialect in DIALECTS for name, texts in corpora.items()]
    ids = {d: make_tokenizer(d, pad_id=UNUSED_ID)(hand_picked, truncate=True).input_ids for d in DIALECTS}
    apart = {f"{a} / {b}": differing(ids[a], ids[b]) for a, b in itertools.combinations(DIALECTS, 2)}
    return {"parity": rows, "apart": apart, "hand_picked": len(hand_picked)}


def compared(dialect: Dialect, corpus: str, texts: list[str]) -> dict[str, Any]:
    ours, theirs = make_tokenizer(dialect)(texts, truncate=True).input_ids, original(dialect)(texts)
    counts = {"strings": len(texts), "ids": ours.size, "differing_ids": int((ours != theirs).sum())}
    return {"dialect": dialect, "corpus": corpus, **counts, "differing_strings": differing(ours, theirs)}


def differing(one: np.ndarray, other: np.ndarray) -> int:
    return int((one != other).any(axis=1).sum())


def print_speed(result: dict[str, Any]) -> None:
    for facts in result["captions"]:
        print("{captions}: {count} captions, {words} words, {tokens:.1f} tokens, {plain:.1%} plain".format(**facts))
    print(
        f"{'captions':9s} {'dialect':12s} {'ours/s':>10s} {'original/s':>11s} {'ratio':>7s}   ({result['cpus']} cores)"
    )
    for row in result["speed"]:
        print("{captions:9s} {dialect:12s} {ours:10,.0f} {original:11,.0f} {ratio:6.1f}x".format(**row))


def print_parity(result: dict[str, Any]) -> None:
    print(f"{'dialect':12s} {'corpus':14s} {'strings':>8s} {'ids':>10s} {'differing':>10s}")
    for row in result["parity"]:
        print("{dialect:12s} {corpus:14s} {strings:8,d} {ids:10,d} {differing_ids:10d}".format(**row))
    for pair, count in result["apart"].items():
        print(f"{pair}: {count} of {result['hand_picked']} hand-picked strings get other ids")


def main() -> int:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="captions in the batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result: Any = parity() if options.parity else speed(options.count, options.rounds)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    print_parity(result) if options.parity else print_speed(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
