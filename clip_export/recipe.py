"""Everything that `clip-export build` can be told, as one value: from the command line, or from a TOML file.

    checkpoint = "openai/clip-vit-large-patch14"
    engine = "tensorrt-rtx"
    gpu = ["sm_89"]
    batch-profiles = [1, 16]

Keys are the options of the command, and paths are relative to the current directory, as they are there.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_export.bundle import Bundle
from clip_export.choice import CPU_INT8, FP32
from clip_export.compilation import PlanOptions
from clip_export.errors import BundleError, ClipExportError, InputError, SpecError
from clip_export.extension import extend, find_targets
from clip_export.feeds import require_inputs
from clip_export.manifest import MANIFEST
from clip_export.pipeline import ENGINES, build, default_name
from clip_export.precision_map import read_map
from clip_export.progress import Progress, silent
from clip_export.quantization import QUANTIZED, Quantization
from clip_export.spec import Activation, Dialect, Tower, from_dict

DEFAULT_PRECISION = "fp16"  # of an engine; without one, a bundle has its fp32 graphs alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to build. `checkpoint` is a checkpoint or a bundle; None leaves a thing as `build` and `extend` have it."""

    checkpoint: str
    output: str | None = None
    towers: tuple[Tower, ...] | None = None
    outputs: tuple[str, ...] | None = None
    context: bool = False
    activation: Activation | None = None
    tokenizer_dialect: Dialect | None = None
    preprocess_dialect: Dialect | None = None
    precision: tuple[str, ...] | None = None
    engine: str | None = None
    gpu: tuple[str, ...] | None = None
    calibration: tuple[str, ...] | None = None
    calibration_texts: str | None = None
    calibration_method: str | None = None
    min_cosine: float | None = None
    max_recall_drop: float | None = None
    precision_map: str | None = None
    quantize_attention: bool = False
    allow_below_contract: bool = False
    allow_slower: bool = False
    batch_profiles: tuple[int, ...] | None = None
    sequence_profiles: tuple[int, ...] | None = None
    max_batch: int | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: str | None = None
    hardware_compatibility: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False
    tf32: bool = False
    require_fused_attention: bool = False
    jobs: int = 1

    def plan_options(self) -> PlanOptions:
        """Those that plans are compiled with. Raises InputError for what cannot be."""
        return PlanOptions(
            batches=self.batch_profiles,
            lengths=self.sequence_profiles,
            max_batch=self.max_batch,
            workspace_mib=self.workspace_mib,
            optimization_level=self.optimization_level,
            timing_cache=None if self.timing_cache is None else Path(self.timing_cache),
            hardware_compatibility=self.hardware_compatibility,
            version_compatible=self.version_compatible,
            strip_weights=self.strip_weights,
            refit=self.refit,
            tf32=self.tf32,
            require_fused_attention=self.require_fused_attention,
            jobs=self.jobs,
        )

    def quantization(self) -> Quantization:
        """How 8-bit precisions are made. Raises InputError for what cannot be, and for a map that cannot be read."""
        return Quantization(
            method=self.calibration_method,
            min_cosine=self.min_cosine,
            max_recall_drop=self.max_recall_drop,
            precision_map=None if self.precision_map is None else read_map(Path(self.precision_map)),
            quantize_attention=self.quantize_attention,
            allow_below_contract=self.allow_below_contract,
            allow_slower=self.allow_slower,
        )

    def precisions(self, quantization: Quantization) -> tuple[str, ...]:
        """What is to be made: those asked for, that of a map, or the default of an engine."""
        given = quantization.precision_map
        asked = self.precision or (() if given is None else (given.precision,))
        return tuple(dict.fromkeys(asked or ((DEFAULT_PRECISION,) if self.engine is not None else ())))


# What only an export from a checkpoint can do: a bundle has it settled.
_OF_CHECKPOINTS = ("output", "outputs", "context", "activation", "tokenizer_dialect", "preprocess_dialect")
_OF_8_BITS = (
    *("calibration_method", "min_cosine", "max_recall_drop", "precision_map", "quantize_attention"),
    *("allow_below_contract", "allow_slower"),
)
_OF_PLANS = tuple(field.name for field in dataclasses.fields(PlanOptions) if field.name not in ("batches", "lengths"))


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in the TOML file at `path`. Raises InputError naming the file and the key."""
    try:
        plain: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError) as error:  # what it raises for no TOML, no UTF-8, absurd numbers or nesting
        raise InputError(f"{path} is not a TOML file: {error}", hint="see engines/recipes for examples") from error
    try:
        return from_dict(Recipe, {key.replace("-", "_"): value for key, value in plain.items()}, where=str(path))
    except SpecError as error:
        raise InputError(error.message, hint="the keys are the options of clip-export build") from error


def make(recipe: Recipe, *, force: bool = False, progress: Progress = silent) -> Bundle:
    """Build what `recipe` says and return the bundle. Raises what `clip_export.build` and `clip_export.extend` raise.

    Whether its engine can be built here is found out before anything else. A bundle that was built from a checkpoint
    stays where it is when an engine cannot be added to it.
    """
    options, quantization = recipe.plan_options(), recipe.quantization()
    precisions = recipe.precisions(quantization)
    _check_stated(recipe, precisions, force=force)
    for precision in precisions:
        find_targets(recipe.engine, recipe.gpu or (), precision, options)
        quantization.require(precision)
    _check_output(recipe, precisions, force=force)
    bundle = _bundle(recipe, force=force, progress=progress)
    try:
        for precision in precisions:
            bundle = _extended(bundle, recipe, precision, options, quantization, force=force, progress=progress)
    except ClipExportError as error:
        if not is_bundle(recipe.checkpoint):
            named = _named(bundle.path)
            there = f"{named} is built and keeps its fp32 graphs: name it in place of the checkpoint next time"
            error.hint = there if error.hint is None else f"{error.hint}; {there}"
        raise
    return bundle


def _extended(
    bundle: Bundle,
    recipe: Recipe,
    precision: str,
    options: PlanOptions,
    quantization: Quantization,
    *,
    force: bool,
    progress: Progress,
) -> Bundle:
    if precision == "fp32" and recipe.engine is None:
        return bundle
    return extend(
        bundle,
        precision=precision,
        engine=recipe.engine,
        gpus=recipe.gpu or (),
        towers=recipe.towers,
        options=options,
        calibration=recipe.calibration or (),
        calibration_texts=recipe.calibration_texts,
        quantization=quantization,
        force=force,
        progress=progress,
    )


def _check_output(recipe: Recipe, precisions: Sequence[str], *, force: bool) -> None:
    """Raise BundleError for graphs or plans of a checkpoint whose bundle is there: --force would lose those it has."""
    output = Path(recipe.output) if recipe.output is not None else ENGINES / default_name(recipe.checkpoint)
    more = recipe.engine is not None or set(precisions) - {FP32}
    if force or is_bundle(recipe.checkpoint) or not more or not (output / MANIFEST).is_file():
        return
    hint = "in place of the checkpoint; --force builds it anew, without what was added to it"
    hint = f"add to it: name {_named(output)} {hint}"
    raise BundleError(f"{output} already holds a bundle", hint=hint)


def _named(bundle: Path) -> str:
    """How `bundle` is named on a command line, where `demo` is the checkpoint of that name."""
    return "./demo" if os.fspath(bundle) == "demo" else os.fspath(bundle)


def is_bundle(checkpoint: str) -> bool:
    """Whether what was named as a checkpoint is a bundle, to which engines are added; one called demo is ./demo."""
    return checkpoint not in ("", "demo") and (Path(checkpoint) / MANIFEST).is_file()


def _bundle(recipe: Recipe, *, force: bool, progress: Progress) -> Bundle:
    if not is_bundle(recipe.checkpoint):
        return build(
            recipe.checkpoint,
            recipe.output,
            towers=recipe.towers,
            outputs=recipe.outputs,
            context=recipe.context,
            force=force,
            activation=recipe.activation,
            tokenizer_dialect=recipe.tokenizer_dialect,
            preprocess_dialect=recipe.preprocess_dialect,
            progress=progress,
        )
    stated = [_flag(name) for name in _OF_CHECKPOINTS if getattr(recipe, name) not in (None, False)]
    if stated:
        message = f"{recipe.checkpoint} is a bundle, for which {', '.join(stated)} is settled"
        raise InputError(message, hint="build again from its checkpoint, or leave that out")
    if recipe.engine is None and recipe.precision is None and recipe.precision_map is None:
        message = f"{recipe.checkpoint} is a bundle already; there is nothing to add to it"
        raise InputError(message, hint="say what: --precision fp16, or --engine tensorrt-rtx --gpu sm_89")
    return Bundle.open(recipe.checkpoint, check_files=False)


def _check_stated(recipe: Recipe, precisions: Sequence[str], *, force: bool) -> None:
    """Raise InputError for options that nothing would come of."""
    default = {field.name: field.default for field in dataclasses.fields(Recipe)}
    ignored = [] if recipe.engine is not None else ["gpu", "batch_profiles", "sequence_profiles", *_OF_PLANS]
    stated = [_flag(name) for name in ignored if getattr(recipe, name) != default[name]]
    if stated:
        message = f"{', '.join(stated)} is about plans, and no engine to compile them is named"
        raise InputError(message, hint="add --engine tensorrt or --engine tensorrt-rtx")
    if (recipe.calibration or recipe.calibration_texts) and not precisions:
        raise InputError("calibration measures ranges for a precision, and none is named", hint="add --precision fp16")
    stated = [_flag(name) for name in _OF_8_BITS if getattr(recipe, name) != default[name]]
    eight_bits = [name for name in precisions if name in QUANTIZED or name == CPU_INT8]
    if stated and not eight_bits:
        message = f"{', '.join(stated)} is about 8-bit precisions, and none is asked for"
        raise InputError(message, hint="add --precision int8, fp8, auto or int8cpu")
    lacking = [name for name in eight_bits if force or name not in _held(recipe)]
    if lacking and not recipe.calibration and _has_image(recipe):
        raise InputError(
            f"{lacking[0]} is calibrated on real pictures, and none were given",
            hint="--calibration DIRECTORY, with some hundred pictures like those that will be encoded",
        )
    if eight_bits and not is_bundle(recipe.checkpoint):  # of a bundle, that is found out as soon by `extend`
        texts = recipe.calibration_texts
        require_inputs(
            list(map(Path, recipe.calibration or ())),
            None if texts is None else Path(texts),
            image=_has_image(recipe),
            text=recipe.context or "text" in (recipe.towers or ()),
        )


def _held(recipe: Recipe) -> Collection[str]:
    """The precisions that a bundle has graphs of already."""
    if not is_bundle(recipe.checkpoint):
        return ()
    return Bundle.open(recipe.checkpoint, check_files=False).manifest.variants


def _has_image(recipe: Recipe) -> bool:
    """Whether an image tower is to be calibrated, as far as that is known before the checkpoint is read."""
    if is_bundle(recipe.checkpoint):
        return "image" in Bundle.open(recipe.checkpoint, check_files=False).spec.towers
    return not recipe.context and (recipe.towers is None or "image" in recipe.towers)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
