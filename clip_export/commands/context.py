"""clip-export context: prompts become what a diffusion model's cross-attention takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clip_export.commands._group import say
from clip_export.commands._output import print_columns, print_json

if TYPE_CHECKING:
    from clip_export.context import Context

# The dialects there are: importing them here would load what --help must not wait for. A test compares the two.
Dialect = Literal["a1111", "comfyui", "compel", "diffusers"]

# Those to whom (words:1.2) is no weight, and what it is to them.
_OTHER_WEIGHTS = {
    "diffusers": "brackets and all; to comfyui and a1111 it is a weight",
    "compel": "whose weights are written (words)1.2; to comfyui and a1111 it is a weight",
}


def context(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="One that was built with --context.", show_default=False)
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts.", show_default=False)],
    *,
    negative: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT...", help="Negative prompts: one, or one for each.", show_default=False),
    ] = None,
    clip_skip: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="last, penultimate, last-2; or a tool's number with its name: comfyui:-2, diffusers:1, a1111:2.",
            show_default="what the model was trained with",
        ),
    ] = None,
    dialect: Annotated[Dialect, typer.Option(help="Whose prompts these are.")] = "diffusers",
    embedding: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Files of textual inversion, named by their stems.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where it goes (.safetensors).", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="In which precision.", show_default="what is loaded by default")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which backend runs it.", show_default="the best that works here")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu or cuda:0.", show_default="the backend's")
    ] = None,
) -> None:
    """Encode prompts for a diffusion model: Context, as a tool of your choice makes it.

    The file holds prompt_embeds, pooled_prompt_embeds and their negatives, as diffusers' pipelines take them. Their
    shapes are printed on stdout.
    """
    import clip_export
    from clip_export.context.result import require_suffix

    if output is not None:
        require_suffix(output)  # before the work, not after it
    negatives = negative * len(prompts) if negative is not None and len(negative) == 1 else negative
    with clip_export.load(bundle, backend=backend, device=device, precision=precision) as encoder:
        made = encoder.context(
            prompts, negative=negatives, clip_skip=clip_skip, dialect=dialect, embeddings=embedding or ()
        )
    if dialect in _OTHER_WEIGHTS and (weights := _weights([*prompts, *(negative or ())])):
        say(f"note: {weights} is text to the dialect {dialect}, {_OTHER_WEIGHTS[dialect]}")
    if output is not None:
        made.save(output)
    shapes = _shapes(made)
    if json:
        print_json({"dialect": made.dialect, "clip_skip": made.clip_skip, "shapes": shapes})
    else:
        print_columns([(name, f"float32 {shape}") for name, shape in shapes.items()])
    if output is not None:
        say(f"written: {output}")


def _weights(prompts: list[str]) -> str | None:
    """The first `(words:1.2)` of `prompts`, which diffusers' pipelines and compel do not weigh."""
    found = (re.search(r"\([^()]+:\s*[+-]?[\d.]+\)", prompt) for prompt in prompts)
    return next((match.group() for match in found if match), None)


def _shapes(made: Context) -> dict[str, list[int]]:
    arrays = {
        "prompt_embeds": made.hidden_states,
        "pooled_prompt_embeds": made.pooled,
        "negative_prompt_embeds": made.negative_hidden_states,
        "negative_pooled_prompt_embeds": made.negative_pooled,
    }
    return {name: list(array.shape) for name, array in arrays.items() if array is not None}
