"""One object of a JSON config, read with the types that its keys must have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from clip_export.errors import CheckpointError, UnsupportedModelError

_UNSET: Any = object()


@dataclass(frozen=True, slots=True)
class Section:
    """The `values` of a config object; `where` names it in errors, such as "config.json: text_config".

    A reader takes the key's value, or `default` if the key is missing or null. Without a default that raises
    CheckpointError, as does a value of another type.
    """

    values: Mapping[str, Any]
    where: str

    def with_defaults(self, defaults: Mapping[str, Any]) -> Section:
        """The same section with `defaults` for the keys that are missing; a key that is null keeps its null."""
        return Section({**defaults, **self.values}, self.where)

    def get(self, key: str, default: Any = _UNSET) -> Any:
        """The value of `key` as it stands."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _UNSET:
            raise CheckpointError(f"{self.where}: missing key {key}", hint="the config may be of another model family")
        return default

    def section(self, key: str, default: Any = _UNSET) -> Section:
        """The object under `key`."""
        value = self.get(key, default)
        return (
            Section(value, f"{self.where}: {key}") if isinstance(value, dict) else self._fail(key, "an object", value)
        )

    def integer(self, key: str, default: Any = _UNSET) -> int:
        """A whole number above 0: sizes and counts are all that configs hold as integers here."""
        value = self.get(key, default)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return value if whole else self._fail(key, "a positive integer", value)  # type: ignore[no-any-return]

    def number(self, key: str, default: Any = _UNSET) -> float:
        """A number."""
        value = self.get(key, default)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if numeric else self._fail(key, "a number", value)

    def boolean(self, key: str, default: Any = _UNSET) -> bool:
        """true or false."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else self._fail(key, "true or false", value)

    def choice(self, key: str, supported: Collection[str], default: Any = _UNSET) -> str:
        """One of the `supported` words. Raises UnsupportedModelError for another."""
        value = self.get(key, default)
        if value not in supported:
            raise UnsupportedModelError(f"{self.where}: {key} is {value!r}, supported: {', '.join(supported)}")
        return str(value)

    def square(self, key: str) -> int:
        """A side in pixels, written as one number or as two equal ones. A rectangle raises UnsupportedModelError."""
        value = self.get(key)
        if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value):
            if value[0] != value[1]:
                raise UnsupportedModelError(f"{self.where}: {key} is {value}, supported are squares")
            value = value[0]
        return Section({key: value}, self.where).integer(key)

    def triple(self, key: str, default: Any = _UNSET) -> tuple[float, float, float]:
        """Three numbers, one for each channel; a single one stands for all three."""
        value = self.get(key, default)
        parts = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        if len(parts) != 3 or not all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in parts):
            return self._fail(key, "three numbers", value)  # type: ignore[no-any-return]
        return float(parts[0]), float(parts[1]), float(parts[2])

    def require_values(self, supported: Mapping[str, Collection[Any]]) -> None:
        """Raise UnsupportedModelError for a key with a value other than those that are `supported`."""
        for key, values in supported.items():
            if key in self.values and self.values[key] not in values:
                words = " or ".join(repr(value) for value in values)
                raise UnsupportedModelError(f"{self.where}: {key} is {self.values[key]!r}, supported: {words}")

    def reject_unknown(self, known: Collection[str]) -> None:
        """Raise UnsupportedModelError for a key that is not `known`: what it changes is not known either."""
        unknown = sorted(set(self.values) - set(known))
        if unknown:
            found = ", ".join(f"{key} ({self.values[key]!r})" for key in unknown)
            raise UnsupportedModelError(
                f"{self.where}: unknown key {found}", hint="it may change embeddings, so it is not passed over"
            )

    def _fail(self, key: str, expected: str, value: Any) -> Any:
        raise CheckpointError(f"{self.where}: {key}: expected {expected}, found {value!r}")
