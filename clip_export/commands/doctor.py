"""clip-export doctor: what is installed, what works here, and what to install for the rest."""

from __future__ import annotations

import os
import platform
import sys
from typing import Annotated, Any

import typer

from clip_export.commands._installed import Package, packages
from clip_export.commands._output import print_columns, print_json

# What each extra is for, in the words of somebody who wonders whether they need it.
_PURPOSE = {
    "export": "to build bundles from checkpoints",
    "cpu": "to run bundles on any CPU",
    "cuda": "to run bundles on an NVIDIA GPU, instead of cpu",
    "tensorrt": "to build and run TensorRT plans, on the GPU that they are for",
    "tensorrt-rtx": "to build TensorRT-RTX plans anywhere, and to run them",
    "polygraphy": "to hand golden samples to NVIDIA's polygraphy",
    "parquet": "to write OUT.parquet",
}


# Both install the same module, and each overwrites the other: whoever has one needs no advice to add the other.
_EITHER = {"cpu", "cuda"}


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what works here and what to install.

    Lists what is installed, which backends work here and why the others do not. The exit code is 0 whatever is found.
    """
    report = _report()
    if json:
        print_json(report)
    else:
        _print(report)


def _report() -> dict[str, Any]:
    from clip_export import __version__

    extras = packages()
    return {
        "clip_export": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": {"system": platform.platform(), "machine": platform.machine(), "cpus": _cpus()},
        "packages": {extra: [_package(package) for package in group] for extra, group in extras.items()},
        "extras": {extra: _missing(group) for extra, group in extras.items() if extra != "base"},
        "backends": _backends(),
    }


def _cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _package(package: Package) -> dict[str, Any]:
    return {"name": package.name, "needed": package.needed, "found": package.found, "fits": package.fits}


def _missing(group: tuple[Package, ...]) -> list[str]:
    return [package.name for package in group if not package.fits]


def _backends() -> list[dict[str, Any]]:
    try:
        from clip_export import backends
    except ImportError as error:  # a base package is missing: just when a doctor is called
        return [{"name": "any", "works": False, "version": None, "reason": str(error), "install": None}]
    found = [backends.status(name) for name in backends.names()]
    return [
        {"name": s.name, "works": s.works, "version": s.version, "reason": s.reason, "install": s.install}
        for s in found
    ]


def _print(report: dict[str, Any]) -> None:
    python, system = report["python"], report["platform"]
    typer.echo(f"clip-export {report['clip_export']}")
    print_columns(
        [
            ("python", f"{python['version']}, {python['executable']}"),
            ("platform", f"{system['system']}, {system['cpus']} CPUs for this process"),
        ]
    )
    for extra, group in report["packages"].items():
        typer.echo(f"\n{_title(extra, report['extras'].get(extra, []))}")
        print_columns([(p["name"], p["found"] or "not installed", _verdict(p)) for p in group])
    typer.echo("\nbackends")
    print_columns([(b["name"], b["version"] or "", _backend_verdict(b)) for b in report["backends"]])
    _print_advice(report)


def _title(extra: str, missing: list[str]) -> str:
    if extra == "base":
        return "base"
    return f"extra {extra} ({_PURPOSE.get(extra, 'optional')}): {'incomplete' if missing else 'complete'}"


def _verdict(package: dict[str, Any]) -> str:
    if package["fits"]:
        return ""
    return f"needs {package['name']}{package['needed']}"


def _backend_verdict(backend: dict[str, Any]) -> str:
    return f"{'works' if backend['works'] else 'does not work'}: {backend['reason']}"


def _print_advice(report: dict[str, Any]) -> None:
    incomplete = {extra for extra, missing in report["extras"].items() if missing}
    if not incomplete >= _EITHER:
        incomplete -= _EITHER
    advice = [(_PURPOSE.get(extra, extra), f"pip install 'clip-export[{extra}]'") for extra in sorted(incomplete)]
    if any(not package["fits"] for package in report["packages"].get("base", [])):
        advice.insert(0, ("to run at all", "pip install clip-export"))
    said = {install for _, install in advice}
    broken = [
        (f"for {b['name']}", b["install"])
        for b in report["backends"]
        if not b["works"] and b["install"] and b["install"] not in said
    ]
    typer.echo("\nwhat to install")
    print_columns(advice + broken or [("nothing", "every extra is complete and every backend works")])
