"""Every attribute of TensorRT that our code touches exists in the real module.

No GPU is needed for that, and no call is made: the sources are read, not run. Names of variables are the types: a
TensorRT object is called what TYPES says, and what is not in TYPES may not be one.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import clip_export.backends

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SOURCES = sorted(Path(clip_export.backends.__file__).parent.glob("_trt_*.py"))

# What a variable of this name is, in every module; a leading underscore and `self.` do not matter.
TYPES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "host_memory": "IHostMemory",
    "inspector": "EngineInspector",
    "logger": "ILogger",
    "monitor": "IProgressMonitor",
    "network": "INetworkDefinition",
    "network_layer": "ILayer",
    "network_tensor": "ITensor",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "runtime_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
    "timing_cache": "ITimingCache",
}
# Of our own on TensorRT's objects, or only in full TensorRT: with the reason.
ELSEWHERE = {
    ("ILogger", "messages"): "ours: what Library.logger() has collected",
    ("ILogger", "layers"): "ours: the list of an engine's layers, from the log",
    ("BuilderFlag", "FP16"): "only in TensorRT 10: where it is, networks may be weakly typed",
}
# Looked up by a name that is made at run time: every name it can be.
MADE_NAMES = {
    ("_trt_compile.py", "BuilderFlag"): ("VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT"),
    ("_trt_compile.py", "ComputeCapability"): ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
}


class Touches(ast.NodeVisitor):
    """Collects (owner, attribute, line) of every attribute of TensorRT in one source, and what it cannot follow.

    `owner` is a class of TensorRT, or "" for the module.
    """

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self.found: list[tuple[str, str, int]] = []
        self.lost: list[tuple[str, int]] = []
        self.made: list[tuple[str, int]] = []
        self._scopes: list[dict[str, str | None]] = [{}]  # variable: its class, or None where it is none of TensorRT's

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope: dict[str, str | None] = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            annotation = argument.annotation
            if annotation is not None and not (isinstance(annotation, ast.Name) and annotation.id == "Any"):
                scope[argument.arg] = None  # one of our types
        self._scopes.append(scope)
        self._learn_assignments(node)
        self.generic_visit(node)
        self._scopes.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.owner(node.value)
        if owner is not None:
            self.found.append((owner, node.attr, node.lineno))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in {"getattr", "hasattr"}:
            owner = self.owner(node.args[0])
            if owner is not None and isinstance(node.args[1], ast.Constant):
                self.found.append((owner, str(node.args[1].value), node.lineno))
            elif owner is not None:
                self.made.append((owner, node.lineno))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # trt.Enumeration.__members__["MEMBER"]
        inner = node.value
        if isinstance(inner, ast.Attribute) and inner.attr == "__members__" and isinstance(node.slice, ast.Constant):
            owner = self.owner(inner.value)
            if owner is not None:
                self.found.append((owner, str(node.slice.value), node.lineno))
        self.generic_visit(node)

    def owner(self, node: ast.expr) -> str | None:
        """The class whose attributes `node` has, "" for the module itself, None for what is none of TensorRT's."""
        name = _last_name(node)
        if name in {"trt", "_trt"}:
            return ""
        if isinstance(node, ast.Name):
            for scope in reversed(self._scopes):
                if node.id in scope:
                    return scope[node.id]
        if isinstance(node, ast.Attribute) and self.owner(node.value) == "":
            return node.attr if isinstance(getattr(self.trt, node.attr, None), type) else None
        return None if name is None else TYPES.get(name.lstrip("_"))

    def _learn_assignments(self, function: ast.FunctionDef) -> None:
        scope = self._scopes[-1]
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                for target, value in _pairs(node.targets[0], node.value):
                    if isinstance(target, ast.Name):
                        self._learn(scope, target, value, function)

    def _learn(
        self, scope: dict[str, str | None], target: ast.Name, value: ast.expr, function: ast.FunctionDef
    ) -> None:
        if isinstance(value, ast.Attribute) and self.owner(value.value) == "":
            scope[target.id] = self.owner(value)  # flags = trt.BuilderFlag
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
            return
        giver = self.owner(value.func.value)
        if giver == "":
            scope[target.id] = value.func.attr  # parser = trt.OnnxParser(...)
        elif giver is not None and self.owner(target) is None and _has_attributes(function, target.id):
            self.lost.append((target.id, target.lineno))


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value


def _has_attributes(function: ast.FunctionDef, name: str) -> bool:
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute))
    return any(isinstance(node.value, ast.Name) and node.value.id == name for node in nodes)


def touches(source: str, trt: ModuleType = tensorrt_rtx) -> Touches:
    found = Touches(trt)
    found.visit(ast.parse(source))
    return found


def problems(source: str, name: str, trt: ModuleType = tensorrt_rtx) -> list[str]:
    found = touches(source, trt)
    said = [f"{name}:{line}: {_path(*rest)} does not exist" for *rest, line in found.found if not _exists(trt, *rest)]
    said += [f"{name}:{line}: {variable} is TensorRT's: call it by a name in TYPES" for variable, line in found.lost]
    said += [
        f"{name}:{line}: {owner} is asked for a name made at run time: list it in MADE_NAMES"
        for owner, line in found.made
        if (name, owner) not in MADE_NAMES
    ]
    return said


def _exists(trt: ModuleType, owner: str, attribute: str) -> bool:
    holder: Any = getattr(trt, owner, None) if owner else trt
    return hasattr(holder, attribute) or (owner, attribute) in ELSEWHERE


def _path(owner: str, attribute: str) -> str:
    return f"{owner}.{attribute}" if owner else f"trt.{attribute}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_attribute_exists(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8"), path.name) == []


@pytest.mark.skipif("tensorrt" not in sys.modules and not importlib.util.find_spec("tensorrt"), reason="no tensorrt")
def test_every_attribute_of_full_tensorrt_exists_or_is_asked_for_first() -> None:
    """Where full TensorRT is installed: the classes that both have, with an `hasattr` before what only RTX has."""
    trt = importlib.import_module("tensorrt")
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        missing = [(owner, name) for owner, name, _ in touches(source, trt).found if not _exists(trt, owner, name)]
        assert all(f'"{name}"' in source for _, name in missing), missing


def test_the_types_exist_and_are_met() -> None:
    assert [name for name in TYPES.values() if not hasattr(tensorrt_rtx, name)] == []
    met = {owner for path in SOURCES for owner, _, _ in touches(path.read_text(encoding="utf-8")).found}
    assert len(met) > 15, "the sources are read, and understood"
    assert {"Builder", "IBuilderConfig", "OnnxParser", "BuilderFlag", "EngineInspector"} <= met


def test_names_made_at_run_time_exist() -> None:
    for (_, owner), names in MADE_NAMES.items():
        assert [name for name in names if not hasattr(getattr(tensorrt_rtx, owner), name)] == []


def test_no_exception_is_kept_that_exists_by_now() -> None:
    real = [key for key in ELSEWHERE if hasattr(getattr(tensorrt_rtx, key[0]), key[1])]
    assert real == []


def test_what_the_libraries_must_have_exists() -> None:
    from clip_export.backends import _trt_library

    assert [path for path in _trt_library.REQUIRED if not _trt_library._has(tensorrt_rtx, path)] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size does not exist"),
        ("self._engine.get_binding_name(0)", "ICudaEngine.get_binding_name does not exist"),
        ("trt.BuilderFlag.INT8", "BuilderFlag.INT8 does not exist"),
        ("plan.trt.NoSuchThing", "trt.NoSuchThing does not exist"),
        ("hasattr(trt.BuilderFlag, 'FP8')", "BuilderFlag.FP8 does not exist"),
        ("getattr(context, 'execute_async', None)", "IExecutionContext.execute_async does not exist"),
        ("trt.TensorIOMode.__members__['BOTH']", "TensorIOMode.BOTH does not exist"),
        ("trt.IRuntimeCache.forget", "IRuntimeCache.forget does not exist"),
        ("flags = trt.BuilderFlag; flags.FP4", "BuilderFlag.FP4 does not exist"),
        ("cache = config.get_timing_cache(); cache.combine()", "cache is TensorRT's: call it by a name in TYPES"),
        ("a, cache = 1, config.get_timing_cache(); cache.combine()", "cache is TensorRT's"),
        ("getattr(trt.BuilderFlag, name)", "BuilderFlag is asked for a name made at run time"),
        ("parser = trt.OnnxParserRefitter(); parser.parse()", "OnnxParserRefitter.parse does not exist"),
    ],
)
def test_a_wrong_attribute_is_found(line: str, words: str) -> None:
    (problem,) = problems(f"def f(self, trt, config, context):\n    {line}\n", "made.py")
    assert words in problem


@pytest.mark.parametrize(
    "source",
    [
        "def f(profile: Profile):\n    profile.items()\n",
        "def f(self):\n    parser = self._trt.OnnxParserRefitter()\n    parser.refit_from_file('')\n",
        "def f(self):\n    plan = self.build()\n    plan.anything\n",
        "def f(builder):\n    text = builder.create_network()\n    print(text)\n",
    ],
)
def test_what_is_right_or_not_tensorrts_passes(source: str) -> None:
    assert problems(source, "made.py") == []
