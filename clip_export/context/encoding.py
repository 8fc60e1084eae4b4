"""Prompts -> Context, through a dialect and one or two text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from clip_export.context.dialects import Dialect, find_dialect
from clip_export.context.layers import Layer, default_layer, find_layer
from clip_export.context.result import Context, Floats
from clip_export.context.units import Prepared, Row, Unit, Vector
from clip_export.context_inputs import VECTOR_ID
from clip_export.errors import InputError

__all__ = ["RunRows", "encode_context"]

_SHOWN = 60  # characters of a prompt in an error

# input_ids, eot_index, layer, attention_mask and inputs_embeds of all rows -> outputs by name, in the same order.
RunRows: TypeAlias = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Prompts of one sign: None for those whose Context is zeros."""

    prompts: tuple[str | None, ...]
    layer: Layer
    negative: bool = False


@dataclass(frozen=True, slots=True)
class _States:
    """What one encoder gives for prompts of one sign: [n, 77 * chunks, width], and [n, dim] or None."""

    hidden_states: Floats
    pooled: Floats | None


def encode_context(
    units: Sequence[Unit],
    runs: Sequence[RunRows],
    prompts: Sequence[str],
    *,
    negative: Sequence[str | None] | None,
    clip_skip: str | None,
    dialect: str,
) -> Context:
    """The Context of `prompts` and of `negative` ones, one for each, as the tool `dialect` makes it.

    Raises InputError for what cannot be: a dialect or a layer that there is not, negatives of another number.
    """
    context, rules = units[0].context, find_dialect(dialect)
    layer = find_layer(clip_skip, context.family)
    asked = [_Asked(_checked(prompts, "prompts"), layer)]
    if negative is not None:
        found = _checked(negative, "negative prompts", none=True)
        if len(found) != len(prompts):
            message = f"expected a negative prompt for each of {len(prompts)} prompts, found {len(found)}"
            raise InputError(message, hint="give as many, or leave them out")
        zeros = rules.zeros(found, context)
        # The pipelines of diffusers skip layers for the prompt alone (encode_prompt).
        own = default_layer(context.family) if dialect == "diffusers" else layer
        kept = tuple(None if zero else text or "" for text, zero in zip(found, zeros, strict=True))
        asked.append(_Asked(kept, own, negative=True))
    parts = [_encode(unit, run, asked, rules, dialect) for unit, run in zip(units, runs, strict=True)]
    joined = _side_by_side(parts)
    positive, other = joined[0], joined[1] if len(joined) > 1 else None
    return Context(
        hidden_states=positive.hidden_states,
        pooled=positive.pooled,
        negative_hidden_states=None if other is None else other.hidden_states,
        negative_pooled=None if other is None else other.pooled,
        dialect=dialect,
        clip_skip=layer.name,
        context_length=units[0].text.context_length,
    )


def unit_depth(layer: Layer, unit: Unit) -> int:
    """The graph's own number of a layer. Raises InputError where the checkpoint does not have it."""
    context = unit.context
    depth, layers = layer.depth - context.missing_blocks, unit.text.transformer.layers
    if 0 <= depth <= layers:
        return depth
    whole = layers + context.missing_blocks
    if depth < 0:
        message = f"clip_skip {layer.name} is a block that this checkpoint does not have: the encoder ends before it"
        raise InputError(message, hint=f"{default_layer(context.family).name} is what the model was trained with")
    message = f"clip_skip {layer.name} is beyond the {whole} layers of the text encoder"
    raise InputError(message, hint=f"from last to last-{whole}, which is the embeddings of its tokens")


def _checked(prompts: object, what: str, *, none: bool = False) -> tuple[str | None, ...]:
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise InputError(
            f"expected a list of {what}, found {type(prompts).__name__}", hint="put it into a list: [text]"
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not (none and prompt is None):
            raise InputError(f"{what} {index} is not a str but {type(prompt).__name__}", hint="give texts")
        try:
            (prompt or "").encode()
        except UnicodeEncodeError as error:
            hint = "decode its bytes with errors='replace', or leave it out"
            raise InputError(f"{what} {index} cannot be encoded: {error}", hint=hint) from error
    if not prompts:
        raise InputError(f"expected {what}, found none", hint='[""] is one empty prompt')
    return tuple(prompts)


def _encode(unit: Unit, run: RunRows, asked: Sequence[_Asked], rules: Dialect, dialect: str) -> list[_States]:
    """All prompts through one encoder, in one call: rows that are equal are encoded once."""
    prepared = [
        [None if prompt is None else rules.prepare(prompt, unit, negative=group.negative) for prompt in group.prompts]
        for group in asked
    ]
    depths = [unit_depth(group.layer, unit) for group in asked]
    pooled_name = _pooled_output(unit, dialect)
    chunks = max(1 if one is None else one.chunks for group in prepared for one in group)
    rows: dict[tuple[Row, int], int] = {}
    for group, depth in zip(prepared, depths, strict=True):
        for row in _rows(group, chunks, unit, pooled=pooled_name is not None):
            rows.setdefault((row, depth), len(rows))
    outputs = run(_feeds(unit, list(rows)))
    pooled = None if pooled_name is None else outputs[pooled_name]
    made = []
    for group, one_asked, depth in zip(prepared, asked, depths, strict=True):
        states = outputs["hidden_states" if one_asked.layer.normalized else "raw_states"]
        found = _states(group, states, pooled, place=_finder(rows, depth), chunks=chunks, unit=unit)
        _require_finite(found, one_asked.prompts)
        made.append(found)
    return made


def _require_finite(found: _States, prompts: Sequence[str | None]) -> None:
    """Raise InputError for a Context with NaN or infinity in it, naming its prompt."""
    for number, prompt in enumerate(prompts):
        arrays = (found.hidden_states[number], *([] if found.pooled is None else [found.pooled[number]]))
        if not all(np.isfinite(array).all() for array in arrays):
            shown = repr(prompt if prompt is None or len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}…")
            raise InputError(
                f"the Context of the prompt {shown} is not finite",
                hint="lower its weights; without weights, another precision of the bundle",
            )


def _finder(rows: Mapping[tuple[Row, int], int], depth: int) -> Callable[[Row], int]:
    return lambda row: rows[row, depth]


def _rows(group: Sequence[Prepared | None], chunks: int, unit: Unit, *, pooled: bool) -> Iterator[Row]:
    """What the encoder is given: the empty prompt only where something has to be made longer with it."""
    for one in group:
        if one is not None:
            yield from one.rows
            if pooled:
                yield one.pooled
            if one.chunks < chunks:
                yield unit.empty


def _feeds(unit: Unit, rows: Sequence[tuple[Row, int]]) -> dict[str, np.ndarray]:
    shape = (len(rows), unit.text.context_length)
    feeds = {
        "input_ids": np.full(shape, VECTOR_ID, np.int32),
        "eot_index": np.array([row.end for row, _ in rows], np.int32),
        "layer": np.array([depth for _, depth in rows], np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "inputs_embeds": np.zeros((*shape, unit.text.transformer.width), np.float32),
    }
    for index, (row, _) in enumerate(rows):
        for place, token in enumerate(row.tokens):
            if isinstance(token, Vector):
                feeds["inputs_embeds"][index, place] = token.values
            else:
                feeds["input_ids"][index, place] = token
        feeds["attention_mask"][index, list(row.hidden)] = 0
    return feeds


def _states(
    group: Sequence[Prepared | None],
    states: np.ndarray,
    pooled: np.ndarray | None,
    *,
    place: Callable[[Row], int],
    chunks: int,
    unit: Unit,
) -> _States:
    """Prompts of one sign, all with as many chunks as the longest; what is shorter goes on with the empty prompt."""
    length, width = unit.text.context_length, unit.text.transformer.width
    whole = np.zeros((len(group), chunks * length, width), np.float32)
    ends = None if pooled is None else np.zeros((len(group), pooled.shape[1]), np.float32)
    for number, one in enumerate(group):
        if one is None:
            continue
        with np.errstate(all="ignore"):  # what comes of it is checked
            own = one.combine([states[place(row)] for row in one.rows])
        whole[number, : len(own)] = own
        if one.chunks < chunks:
            whole[number, len(own) :] = np.tile(states[place(unit.empty)], (chunks - one.chunks, 1))
        if pooled is not None and ends is not None:
            ends[number] = pooled[place(one.pooled)]
    return _States(whole, ends)


def _side_by_side(parts: Sequence[list[_States]]) -> list[_States]:
    """Encoders along the last axis. Both have CLIP's vocabulary, but two cleanings of a text may differ in length."""
    joined = []
    for encoders in zip(*parts, strict=True):
        lengths = {states.hidden_states.shape[1] for states in encoders}
        if len(lengths) > 1:
            raise InputError(
                "the two text encoders split this prompt into different numbers of chunks", hint="shorten it"
            )
        hidden_states = np.concatenate([states.hidden_states for states in encoders], axis=2)
        pooled = [states.pooled for states in encoders if states.pooled is not None]
        joined.append(_States(hidden_states, np.concatenate(pooled, axis=1) if pooled else None))
    return joined


def _pooled_output(unit: Unit, dialect: str) -> str | None:
    """Which of the graph's outputs is this encoder's part of `pooled`, None for no part."""
    family, projected = unit.context.family, unit.text.embedding_dim is not None
    own = "embedding" if projected else "pooled"
    if family == "sdxl":
        return own if unit.number == 1 else None
    if family == "sdxl_refiner":
        return own
    if family == "sd3":  # ComfyUI takes CLIP-L's without its projection (comfy/text_encoders/sd3_clip.py)
        return "pooled" if dialect == "comfyui" and unit.number == 0 else own
    if dialect != "comfyui":
        return None
    return "pooled" if family in ("clip", "sd1") else own
