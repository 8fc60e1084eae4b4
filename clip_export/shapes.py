"""Which profiles a plan gets: batch ranges and, for a text that may be trimmed, ranges of its length.

A profile is what kernels are chosen for, and they are chosen for its `opt` shape: a range whose optimum is far from
what is asked runs slowly. So each range ends at its optimum, and the next begins where it ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from clip_export.backends.building import Profile, ShapeRange
from clip_export.errors import InputError
from clip_export.spec import ModelSpec, Tower

DEFAULT_BATCHES = (1, 8, 64)
MAX_BATCH = 4096  # beyond it, the input of one tower alone is gigabytes
CAPTION_TOKENS = 16  # most captions have no more, start and end included; the rest of the context costs five times that


def batch_bounds(batches: Sequence[int] | None, max_batch: int | None) -> tuple[int, ...]:
    """The largest batch of each profile, ascending: those asked for, or the default's cut or extended to `max_batch`.

    >>> batch_bounds(None, 32)
    (1, 8, 32)
    """
    for name, value in (*(("a batch profile", batch) for batch in batches or ()), ("max batch", max_batch)):
        if value is not None and not (type(value) is int and 1 <= value <= MAX_BATCH):
            raise InputError(f"expected {name} from 1 to {MAX_BATCH}, found {value!r}", hint="for example 1,8,64")
    asked = sorted(set(batches if batches is not None else DEFAULT_BATCHES))
    if not asked:
        raise InputError("expected at least one batch profile, found none", hint="for example 1,8,64")
    if max_batch is None:
        return tuple(asked)
    if batches is not None and asked[-1] > max_batch:
        message = f"batch profile {asked[-1]} is above the max batch {max_batch}"
        raise InputError(message, hint="give one of --batch-profiles and --max-batch")
    return (*(batch for batch in asked if batch < max_batch), max_batch)


def profiles(
    spec: ModelSpec,
    tower: Tower,
    *,
    sequence_dynamic: bool,
    batches: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> tuple[Profile, ...]:
    """One profile for each range of `batches` and, where the sequence is dynamic, of `lengths`.

    `lengths` are the largest number of tokens of each range, 16 and the context by default. Raises InputError for a
    length outside 1..context_length.
    """
    batch_ranges = _ranges(batches)
    if tower == "image":
        assert spec.image is not None
        size = spec.image.image_size
        return tuple({"pixels": _shapes((low, high), (3, 3), (size, size), (size, size))} for low, high in batch_ranges)
    assert spec.text is not None
    context = spec.text.context_length
    sequences = _ranges(_lengths(context, lengths)) if sequence_dynamic else [(context, context)]
    made: list[Profile] = [
        {"input_ids": _text_shapes(batch, sequence), "eot_index": _text_shapes(batch)}
        for batch in batch_ranges
        for sequence in sequences
    ]
    if spec.context is not None:
        made = [_with_context(profile, spec.text.transformer.width) for profile in made]
    return tuple(made)


def _with_context(profile: Profile, width: int) -> Profile:
    """The profile of a graph that gives Context: its other inputs go with token ids, or with end positions."""
    ids = profile["input_ids"]
    vectors = ShapeRange(min=(*ids.min, width), opt=(*ids.opt, width), max=(*ids.max, width))
    return {**profile, "layer": profile["eot_index"], "attention_mask": ids, "inputs_embeds": vectors}


def _text_shapes(batch: tuple[int, int], *axes: tuple[int, int]) -> ShapeRange:
    """Made for a batch of one, a profile takes two as well: TensorRT-RTX 1.7 has no kernel for fused causal attention
    where the batch can only be one. Kernels are chosen for one all the same."""
    made = _shapes(batch, *axes)
    if batch != (1, 1):
        return made
    return ShapeRange(min=made.min, opt=made.opt, max=(2, *made.max[1:]))


def _lengths(context: int, lengths: Sequence[int] | None) -> list[int]:
    """Up to the whole context always: a long text must not find an engine that cannot take it."""
    for length in lengths or ():
        if not (type(length) is int and 1 <= length <= context):
            hint = f"the model's context has {context} tokens"
            raise InputError(f"sequence profile {length!r} is outside 1..{context}", hint=hint)
    shorter = lengths if lengths is not None else (CAPTION_TOKENS,)
    return sorted({*(length for length in shorter if length < context), context})


def _ranges(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """1..first, first + 1..second, and so on.

    >>> _ranges((1, 8, 64))
    [(1, 1), (2, 8), (9, 64)]
    """
    return [(low + 1, high) for low, high in zip((0, *bounds), bounds, strict=False)]


def _shapes(*axes: tuple[int, int]) -> ShapeRange:
    low, high = zip(*axes, strict=True)
    return ShapeRange(min=low, opt=high, max=high)
