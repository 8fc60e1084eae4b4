"""Golden samples in the files of NVIDIA's Polygraphy, whose `polygraphy run` then compares a runner with the reference.

    text.inputs.json       what --load-inputs takes: one iteration per golden sample, each a batch of one
    text.reference.json    what --load-outputs takes: the reference's float32 outputs, as RunResults

One sample an iteration, because Polygraphy compares whole outputs: the cosine of an iteration is that of one embedding,
and its threshold means what the accuracy contract means.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from clip_export.backends.building import Profile
from clip_export.bundle import Bundle
from clip_export.context_inputs import sampled_feeds
from clip_export.errors import InputError, MissingDependencyError, OutputError
from clip_export.golden import ImageGolden, TextGolden
from clip_export.output_file import staged_file, writing
from clip_export.spec import Tower
from clip_export.verification import CONTRACTS

__all__ = ["INSTALL", "REFERENCE", "TENSORRT", "command_lines", "write"]

INSTALL = "pip install 'clip-export[polygraphy]'"
REFERENCE = "clip-export float32 reference"  # the runner's name in Polygraphy's output

# Environment that chooses the library behind Polygraphy's --trt.
TENSORRT = {"tensorrt": {}, "tensorrt-rtx": {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}}


def write(
    bundle: Bundle | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    force: bool = False,
) -> tuple[Path, ...]:
    """Write inputs and reference outputs of each tower of `bundle` to `directory`, which is made if it is missing.

    Returns the files: TOWER.inputs.json and TOWER.reference.json. They hold the outputs that the graph of `precision`
    has. Either all are written or none. Raises MissingDependencyError without Polygraphy, BundleError where there is no
    such graph, OutputError where a file is there already and `force` is False, or where nothing can be written.
    """
    tools = _polygraphy()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    target = Path(directory)
    makers = dict(_makers(bundle, target, precision, tools))
    existing = [path for path in makers if path.exists()]
    if existing and not force:
        names = ", ".join(map(str, existing))
        raise OutputError(f"there already: {names}", hint="choose another directory, or remove these files first")
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, make in makers.items():
            file = stack.enter_context(staged_file(path))
            with writing(path):
                file.write(make().encode())
    return tuple(makers)


def command_lines(
    bundle: Bundle,
    directory: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    backends: Sequence[str] = ("onnxruntime",),
    profiles: Mapping[Tower, Sequence[Profile]] | None = None,
) -> tuple[str, ...]:
    """The command lines that compare each tower's `precision` graph with the files that `write` left in `directory`.

    `backends` are among onnxruntime, tensorrt and tensorrt-rtx; `profiles` are shape ranges for the last two, which
    build for the shapes of the inputs without them. The threshold is that of the accuracy contract. Raises InputError
    for fp32 on TensorRT, whose Attention operator has no fp32 kernel.
    """
    unknown = sorted(set(backends) - {"onnxruntime", *TENSORRT})
    if unknown or not backends:
        found = ", ".join(unknown) or "none"
        raise InputError(f"expected backends among onnxruntime, {', '.join(TENSORRT)}, found {found}")
    if precision == "fp32" and set(backends) & TENSORRT.keys():
        message = "TensorRT has no fp32 kernel for the Attention operator that the fp32 graphs use"
        raise InputError(message, hint="compare the fp16 graphs: --precision fp16")
    limit = ["--compare", "cosine_similarity", "--cosine-similarity-threshold", str(_threshold(precision))]
    lines = []
    for tower in bundle.spec.towers:
        inputs, reference = (str(Path(directory, name)) for name in _names(tower))
        files = ["--load-inputs", inputs, "--load-outputs", reference]
        for backend in backends:
            runner = _runner(backend, (profiles or {}).get(tower, ()))
            words = ["polygraphy", "run", str(bundle.graph_path(tower, precision)), *runner, *files, *limit]
            environment = [f"{name}={value}" for name, value in TENSORRT.get(backend, {}).items()]
            lines.append(" ".join([*environment, shlex.join(words)]))
    return tuple(lines)


def _runner(backend: str, profiles: Sequence[Profile]) -> list[str]:
    """The words that choose the runner."""
    return ["--onnxrt"] if backend == "onnxruntime" else ["--trt", "--strongly-typed", *_shape_flags(profiles)]


def _shape_flags(profiles: Sequence[Profile]) -> Iterator[str]:
    """`--trt-min-shapes input_ids:[1,77] eot_index:[1]` and so on, each flag once per profile."""
    for profile in profiles:
        for bound in ("min", "opt", "max"):
            yield f"--trt-{bound}-shapes"
            for name, shapes in profile.items():
                yield f"{name}:[{','.join(map(str, getattr(shapes, bound)))}]"


def _threshold(precision: str) -> float:
    if precision not in CONTRACTS:
        raise InputError(f"expected a precision among {', '.join(CONTRACTS)}, found {precision!r}")
    return CONTRACTS[precision]


def _names(tower: Tower) -> tuple[str, str]:
    return f"{tower}.inputs.json", f"{tower}.reference.json"


def _makers(bundle: Bundle, directory: Path, precision: str, tools: _Tools) -> Iterator[tuple[Path, Callable[[], str]]]:
    """Each file with the function that makes its text."""
    golden = bundle.golden()
    samples: dict[Tower, TextGolden | ImageGolden | None] = {"text": golden.text, "image": golden.image}
    for tower in bundle.spec.towers:
        graph, sample = bundle.graph(tower, precision), samples[tower]
        assert sample is not None
        inputs, reference = _names(tower)
        given = {name: array for name in graph.inputs if (array := getattr(sample, name, None)) is not None}
        feeds = given if bundle.spec.context is None else sampled_feeds(given, bundle.spec)
        outputs = {name: sample.outputs[name] for name in graph.outputs}
        yield directory / inputs, lambda feeds=feeds: tools.inputs(_iterations(feeds))  # type: ignore[misc]
        yield directory / reference, lambda outputs=outputs: tools.results(_iterations(outputs))  # type: ignore[misc]


def _iterations(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """One dict for each row of `arrays`, as batches of one."""
    count = len(next(iter(arrays.values())))
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]


class _Tools:
    """What is needed of Polygraphy: its own classes, so that the format is whatever its version reads."""

    def __init__(self, json: ModuleType, comparator: ModuleType) -> None:
        self._json, self._comparator = json, comparator

    def inputs(self, iterations: list[dict[str, np.ndarray]]) -> str:
        """Feeds as JSON."""
        return str(self._json.to_json(iterations))

    def results(self, iterations: list[dict[str, np.ndarray]]) -> str:
        """RunResults of one runner as JSON."""
        results: Any = self._comparator.RunResults()
        results.add(iterations, runner_name=REFERENCE)
        return str(results.to_json())


def _polygraphy() -> _Tools:
    try:
        json = importlib.import_module("polygraphy.json")
        comparator = importlib.import_module("polygraphy.comparator")
    except ImportError as error:
        raise MissingDependencyError(f"Polygraphy cannot be imported: {error}", hint=INSTALL) from error
    if not hasattr(comparator, "CosineSimilarityCompareFunc"):
        message = "this Polygraphy has no comparison by cosine alone; 0.53 has it"
        raise MissingDependencyError(message, hint=f"{INSTALL} --upgrade")
    return _Tools(json, comparator)
