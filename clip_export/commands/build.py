"""clip-export build: a checkpoint becomes a bundle, and a bundle gets engines."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from clip_export.commands import _eight_bits
from clip_export.commands._group import say
from clip_export.commands._output import size_text
from clip_export.commands._progress import Bar
from clip_export.spec import TOWERS, Activation, Dialect, Tower

if TYPE_CHECKING:
    from clip_export.bundle import Bundle
    from clip_export.plans import Plan
    from clip_export.recipe import Recipe

_ENGINES = "Engines"
_PROFILES = "Shapes and precision of engines"
_QUANTIZATION = "8-bit precisions"
_COMPILER = "How plans are compiled"


def build(
    invocation: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A directory, a file, a Hugging Face hub id, or demo; a BUNDLE to add engines to; or a RECIPE.toml.",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the bundle goes.", show_default="engines/NAME")
    ] = None,
    towers: Annotated[
        str | None, typer.Option(metavar="text,image", help="The towers to export.", show_default="all there are")
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Any of embedding, pooled and hidden_states, with commas.", show_default="embedding"
        ),
    ] = None,
    context: Annotated[
        bool,
        typer.Option(
            "--context", help="Text encoders that give a diffusion model its Context, for any dialect of prompts."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there: bundle, graphs or plans.")] = False,
    activation: Annotated[
        Activation | None, typer.Option(help="State the activation where the checkpoint does not.", show_default=False)
    ] = None,
    tokenizer_dialect: Annotated[
        Dialect | None, typer.Option(help="Whose tokenizer to match.", show_default="the checkpoint's own")
    ] = None,
    preprocess_dialect: Annotated[
        Dialect | None, typer.Option(help="Whose preprocessing to match.", show_default="the checkpoint's own")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compile plans with tensorrt, on the GPU they are for, or with tensorrt-rtx, anywhere.",
            show_default="graphs alone",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="sm_NN",
            help="The GPU to compile for, or portable (sm_80 and later). May be repeated.",
            show_default="the GPU here",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="fp32, fp16, bf16, int8, fp8, int8cpu, auto or autofp8 (as much int8 or fp8 as the contract allows). "
            "May be repeated.",
            show_default="fp16 with an engine",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Plans built at once, if memory allows.", rich_help_panel=_ENGINES)
    ] = 1,
    batch_profiles: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="Largest batch of each profile.",
            show_default="1,8,64",
            rich_help_panel=_PROFILES,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Largest batch of the last profile.", show_default=False, rich_help_panel=_PROFILES
        ),
    ] = None,
    sequence_profiles: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="Most tokens of each text profile.",
            show_default="16 and the context",
            rich_help_panel=_PROFILES,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Pictures to measure ranges on, files or a directory; 8 bits need them. May be repeated.",
            show_default=False,
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    calibration_texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts for the same, one a line.",
            show_default="the pictures' captions, or built-in prompts",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    calibration_method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How ranges are found: mse, minmax, percentile or entropy.",
            show_default="mse",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The least cosine to fp32 that is published.",
            show_default="0.99",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    max_recall_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="The most that R@1 may fall, on pictures with captions.csv or captions.jsonl.",
            show_default="measured, not required",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    precision_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The exact mix of an earlier build: its PRECISION.map.json.",
            show_default=False,
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    quantize_attention: Annotated[
        bool,
        typer.Option("--quantize-attention", help="The products inside attention too.", rich_help_panel=_QUANTIZATION),
    ] = False,
    allow_below_contract: Annotated[
        bool,
        typer.Option(
            "--allow-below-contract",
            help="Publish what misses its contract, marked as such.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = False,
    allow_slower: Annotated[
        bool,
        typer.Option(
            "--allow-slower", help="Publish what is not faster than what it replaces.", rich_help_panel=_QUANTIZATION
        ),
    ] = False,
    workspace_mib: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Scratch memory that kernels may use.", show_default=False, rich_help_panel=_COMPILER
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            metavar="0..5", help="How long to search for kernels.", show_default=False, rich_help_panel=_COMPILER
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where kernel timings are kept.",
            show_default="beside the bundle",
            rich_help_panel=_COMPILER,
        ),
    ] = None,
    hardware_compatibility: Annotated[
        bool,
        typer.Option("--hardware-compatibility", help="Plans for every GPU from sm_80 on.", rich_help_panel=_COMPILER),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Plans that later TensorRT versions take too.", rich_help_panel=_COMPILER
        ),
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights", help="Plans without weights, refitted when they are loaded.", rich_help_panel=_COMPILER
        ),
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Plans whose weights can be replaced.", rich_help_panel=_COMPILER)
    ] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Allow 10-bit mantissas in fp32 layers.", rich_help_panel=_COMPILER)
    ] = False,
    require_fused_attention: Annotated[
        bool,
        typer.Option(
            "--require-fused-attention",
            help="Fail, naming the layers, where attention is not one kernel.",
            rich_help_panel=_COMPILER,
        ),
    ] = False,
) -> None:
    """Turn a checkpoint into a bundle of engines, or add engines to a bundle.

    They give the same embeddings as the original: a bundle is published only once its engines have replayed its golden
    samples, and a precision that misses its accuracy contract not at all. Its path is printed on stdout.
    """
    from clip_export import recipe

    base = recipe.read_recipe(checkpoint) if checkpoint.endswith(".toml") else recipe.Recipe(checkpoint=checkpoint)
    _make(dataclasses.replace(base, **_stated(invocation)), force=force)


def _stated(invocation: typer.Context) -> dict[str, Any]:
    """What stands on the command line, as fields of a recipe: it goes before what a recipe says."""
    values = {
        name: value
        for name, value in invocation.params.items()
        if name not in ("checkpoint", "force")
        and getattr(invocation.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    return {name: _PARSERS.get(name, _plain)(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """Paths as text and lists as tuples, as a recipe holds them."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return os.fspath(value) if isinstance(value, Path) else value


def _make(recipe: Recipe, *, force: bool) -> None:
    from clip_export.recipe import make

    started, start_time = time.perf_counter(), time.time()
    with Bar() as progress:
        bundle = make(recipe, force=force, progress=progress)
    place = _shortest(bundle.path)
    total = size_text(sum(entry.size for entry in bundle.manifest.files.values()))
    # Files that were there before are shared with the bundle as it was, and are older.
    new = [plan for plan in bundle.manifest.plans if bundle.plan_path(plan).stat().st_mtime >= start_time]
    if recipe.engine is not None and not new:
        say("the plans were there already; --force builds them again")
    made = [precision for precision in bundle.manifest.variants if _is_new(bundle, precision, start_time)]
    took = f"{time.perf_counter() - started:.1f} s"
    towers = " and ".join(bundle.manifest.spec.towers)
    if "fp32" in made:
        say(f"built {towers} in {took}, {total}")
    elif made or new:
        added = [f"{', '.join(made)} graphs of {towers}"] * bool(made) + [_count(new)] * bool(new)
        say(f"added {' and '.join(added)} in {took}; the bundle has {total}")
    elif recipe.engine is None:
        say("the graphs were there already; --force makes them again")
    for line in _exactness(bundle, made):
        say(line)
    for plan in new:
        say(_plan_line(bundle, plan))
    say(f"next: clip-export verify {shlex.quote(place)}")
    typer.echo(place)


def _exactness(bundle: Bundle, made: Sequence[str]) -> Iterator[str]:
    """How close the precisions that were made are to fp32, and what of 8-bit ones is in 8 bits."""
    from clip_export.manifest import SECOND  # here: it loads numpy, for which --help must not wait

    for precision, report in bundle.report().get("precisions", {}).items():
        if precision not in made:
            continue
        if precision in bundle.manifest.contracts:
            yield from _eight_bits.lines(precision, report)
            if (second := bundle.second) is not None:
                yield from _eight_bits.lines(f"{precision} {SECOND}", second.report()["precisions"][precision])
            continue
        for row in report["agreement"]:
            cosines = f"min cosine {row['min_cosine']:.7f}, required {row['required_cosine']:.7g}"
            yield f"  {precision} {row['tower']} {row['output']}: {cosines} over {row['samples']} golden samples"


def _is_new(bundle: Bundle, precision: str, start_time: float) -> bool:
    graphs = bundle.manifest.variants[precision].values()
    return all((bundle.path / graph.file).stat().st_mtime >= start_time for graph in graphs)


def _count(plans: Sequence[Plan]) -> str:
    return "a plan" if len(plans) == 1 else f"{len(plans)} plans"


def _plan_line(bundle: Bundle, plan: Plan) -> str:
    size = size_text(bundle.manifest.files[plan.file].size)
    made = (
        f"{size}, built in {plan.seconds:.1f} s, peak memory {plan.peak_memory_mib} MiB, {_ATTENTION[plan.attention]}"
    )
    return f"  {plan.backend} {plan.version} {plan.compute_capability} {plan.precision} {plan.tower}: {made}"


_ATTENTION = {
    "operator": "attention fused",  # the operator has no decomposition: without a fused kernel the build fails
    "inspector": "attention fused, says the engine's inspector",
    None: "attention not known to be fused",
}


def _names(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _numbers(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        message = f"expected whole numbers with commas, as in 1,8,64, found {value!r}"
        raise typer.BadParameter(message, param_hint="'--batch-profiles', '--sequence-profiles'") from error


def _towers(value: str) -> tuple[Tower, ...]:
    names = _names(value)
    unknown = [name for name in names if name not in TOWERS]
    if unknown or not names:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise typer.BadParameter(f"expected {' or '.join(TOWERS)}, found {found}", param_hint="'--towers'")
    return cast("tuple[Tower, ...]", names)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "towers": _towers,
    "outputs": _names,
    "batch_profiles": _numbers,
    "sequence_profiles": _numbers,
}


def _shortest(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return os.fspath(path.relative_to(here) if path.is_relative_to(here) else path)
