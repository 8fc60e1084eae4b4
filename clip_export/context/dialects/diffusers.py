"""diffusers: a prompt is plain text; what does not fit is cut, with a warning (encode_prompt of its pipelines).

Textual inversion: the name of an embedding is a word of the vocabulary, found wherever it stands. Written in another
case it is the first of its vectors alone, since the pipeline puts in the others where the name is written as it is.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from clip_export.context.units import Prepared, Token, Unit
from clip_export.spec import ContextSpec

__all__ = ["prepare", "tokens", "zeros"]


def prepare(prompt: str, unit: Unit, *, negative: bool = False) -> Prepared:
    """The prompt in one row."""
    found = tokens(prompt, unit)
    if len(found) > unit.room:
        left_out = "".join(
            unit.word(token).replace("</w>", " ") for token in found[unit.room :] if isinstance(token, int)
        )
        warnings.warn(
            f"diffusers cuts a prompt after {unit.room} tokens; this one has {len(found)}, and this part is left out: "
            f"{left_out.strip()!r}",
            stacklevel=2,
        )
    row = unit.framed(found[: unit.room])
    return Prepared(rows=(row,), combine=lambda states: states[0], pooled=row)


def zeros(negatives: Sequence[str | None], context: ContextSpec) -> list[bool]:
    """Zeros where none is given, for models whose pipeline says so (force_zeros_for_empty_prompt); "" is encoded."""
    return [context.zero_negative and negative is None for negative in negatives]


def tokens(text: str, unit: Unit) -> list[Token]:
    """The tokens of a text, with the vectors of those embeddings that it names."""
    if not unit.embeddings:
        return list(unit.ids(text))
    names = {name.lower(): vectors[:1] for name, vectors in unit.embeddings.items()}
    longest_first = sorted(names, key=len, reverse=True)
    found: list[Token] = []
    for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text, flags=re.IGNORECASE):
        if part in unit.embeddings:
            found += unit.embeddings[part]
        else:
            found += names[part.lower()] if part.lower() in names else unit.ids(part)
    return found
