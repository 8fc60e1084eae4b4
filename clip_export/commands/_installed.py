"""What is installed here, read from package metadata alone: nothing that is asked about is imported."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

NAME = "clip-export"
# What a developer needs to work on clip-export itself; nobody who uses it.
_NOT_FOR_USERS = {"dev"}

_REQUIREMENT = re.compile(
    r"\s*(?P<name>[A-Za-z0-9._-]+)\s*(\[[^\]]*\])?\s*\(?(?P<versions>[^;)]*)\)?\s*(;(?P<marker>.*))?"
)
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that clip-export asks for: `needed` is the range of versions, `found` the one here or None."""

    name: str
    needed: str
    found: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that will do."""
        return self.found is not None and version_fits(self.found, self.needed)


def packages() -> dict[str, tuple[Package, ...]]:
    """The packages of the base installation, under "base", and of each extra that is for users."""
    found: dict[str, dict[str, Package]] = {}
    for requirement, extra in _requirements():
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None or extra in _NOT_FOR_USERS:
            continue
        name = match["name"]
        package = Package(name=name, needed=_lowest_first(match["versions"]), found=_version(name))
        found.setdefault(extra, {})[name] = package
    return {extra: tuple(group.values()) for extra, group in found.items()}


def version_fits(version: str, needed: str) -> bool:
    """Whether `version` is in the range `needed`, as in >=2.9,<2.14. Of PEP 440 it knows release numbers alone.

    >>> version_fits("2.13.0+cpu", ">=2.9,<2.14")
    True
    """
    return all(_clause_holds(_release(version), clause) for clause in needed.split(",") if clause)


def _lowest_first(versions: str) -> str:
    """The clauses as people write them: >= before <, whatever order the metadata have."""
    return ",".join(sorted((clause.strip() for clause in versions.split(",")), reverse=True))


def _clause_holds(release: tuple[int, ...], clause: str) -> bool:
    match = re.fullmatch(r"(>=|<=|==|!=|>|<|~=)(.+)", clause)
    if match is None:
        return True
    bound = _release(match[2])
    width = max(len(release), len(bound))
    first, second = ((*numbers, *(0,) * (width - len(numbers))) for numbers in (release, bound))
    return {
        ">=": first >= second,
        "<=": first <= second,
        "==": first == second,
        "!=": first != second,
        ">": first > second,
        "<": first < second,
        "~=": first >= second and release[: len(bound) - 1] == bound[:-1],
    }[match[1]]


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[tuple[str, str]]:
    """(requirement, extra) of every requirement; the extra is "base" for those that are always needed."""
    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return _requirements_of_checkout()
    return [(line.split(";")[0], match[1] if (match := _EXTRA.search(line)) else "base") for line in lines]


def _requirements_of_checkout() -> list[tuple[str, str]]:
    """The same from pyproject.toml, for a checkout that runs through cli.py without being installed."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    if not path.is_file():
        return []
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    groups = {"base": project["dependencies"], **project["optional-dependencies"]}
    return [(line, extra) for extra, lines in groups.items() for line in lines]
