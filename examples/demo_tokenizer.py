"""CLIP's tokenizer as Hugging Face files, built from the list of merges that open_clip carries.

The vocabulary is CLIP's own: 256 bytes, the same 256 at the end of a word, one token for each of 48 894 merges, and
the two specials; 49 408 in all.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

from transformers import CLIPTokenizer

CONTEXT = 77  # tokens, the two specials included
MERGES = 49152 - 256 - 2  # the first line of the list is a heading, and what follows these is never used
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order in which CLIP numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = len(set(range(256)) - set(printable))  # spaces and controls: given letters from 256 on
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(hidden)]


def read_merges() -> list[tuple[str, str]]:
    """The merges, best first, from the installed open_clip package (which need not be importable)."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SystemExit("building the demo's tokenizer needs the open_clip_torch package installed")
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    return [tuple(line.split()) for line in lines[1 : MERGES + 1]]  # type: ignore[misc]


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer; calling it pads and cuts nothing unless asked to."""
    merges = read_merges()
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), *SPECIALS]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def save_tokenizer(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the former without the white space that doubles its size."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["truncation"] = tree["padding"] = None  # a caller's choice, not the file's
    tree["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]]
    path.write_text(json.dumps(tree, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
