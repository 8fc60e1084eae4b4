"""Every error that clip-export raises on purpose.

    ClipExportError
    ├── CheckpointError            the checkpoint cannot be read
    │   ├── UnknownCheckpointError     nothing here looks like a known format
    │   ├── UnsupportedModelError      a known format, an architecture that is not supported
    │   ├── AmbiguousCheckpointError   a fact is missing that only an option can give
    │   ├── UnsafeCheckpointError      reading it would run code
    │   └── WeightsError               missing, unexpected or misshapen weights
    ├── ExportError                the graph does not prove itself
    ├── BundleError                the bundle cannot be read or written
    │   ├── BundleNotFoundError        no bundle at this path
    │   ├── BundleSchemaError          the manifest is malformed, or of a newer schema
    │   ├── BundleIntegrityError       a file is changed, missing, truncated or outside the directory
    │   └── BundleBusyError            another process is writing it
    ├── InputError                 what the user handed in cannot be encoded
    │   ├── TextError                  not a string, too long, not encodable
    │   └── ImageError                 unreadable, truncated, empty or too large
    ├── OutputError                a result cannot be written
    ├── BackendError               an engine cannot be opened or has failed
    │   ├── PlanBuildError             a graph cannot be compiled into a plan
    │   │   └── UnsupportedOperatorError   the compiler does not know an operator of the graph
    │   ├── NoPlanError                no plan of the bundle fits this machine
    │   └── DeviceError                no GPU, no driver, or not enough of its memory
    ├── MissingDependencyError     a package is needed that is not installed
    ├── SpecError                  a spec has an unknown key, lacks one, or holds an impossible value
    ├── ContractError              the accuracy contract is not met
    └── SpeedError                 a precision that does not pay: it is not faster than what it replaces

Each carries `message` (what was expected and what was found) and `hint` (what to do next). The command line prints
them as `error: …` and `hint: …` and exits with 1; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class ClipExportError(Exception):
    """Base of all errors raised on purpose: `message` says what is wrong, `hint` what to do next."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class CheckpointError(ClipExportError):
    """The checkpoint cannot be read."""


class UnknownCheckpointError(CheckpointError):
    """Nothing at this path looks like a known checkpoint format."""


class UnsupportedModelError(CheckpointError):
    """The format is known, the architecture in it is not supported."""


class AmbiguousCheckpointError(CheckpointError):
    """The checkpoint leaves a fact open that changes embeddings; an option has to give it."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the checkpoint would run code from it."""


class WeightsError(CheckpointError):
    """Weights are missing, unexpected or misshapen; the message lists them by their names in the checkpoint."""


class ExportError(ClipExportError):
    """An exported graph does not do what its tower does."""


class BundleError(ClipExportError):
    """The bundle cannot be read or written."""


class BundleNotFoundError(BundleError):
    """There is no bundle at this path."""


class BundleSchemaError(BundleError):
    """The manifest is malformed, has unknown keys, or is of a newer schema."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is changed, missing, truncated, or its path leaves the directory."""


class BundleBusyError(BundleError):
    """Another process is building at this path."""


class InputError(ClipExportError):
    """An input cannot be encoded."""


class TextError(InputError):
    """A text is not a string, is too long for the context, or cannot be encoded."""


class ImageError(InputError):
    """An image is unreadable, truncated, empty or too large."""


class OutputError(ClipExportError):
    """A result cannot be written: no such directory, no permission, no space, or a suffix that means no format."""


class BackendError(ClipExportError):
    """An engine cannot be opened, or failed while running."""


class PlanBuildError(BackendError):
    """A graph cannot be compiled into a plan; the message carries what the compiler said."""


class UnsupportedOperatorError(PlanBuildError):
    """The compiler does not know an operator of the graph; `operators` names those that it refused."""

    def __init__(self, message: str, *, operators: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.operators = operators


class NoPlanError(BackendError):
    """No plan of the bundle fits this machine; the message says of each why."""


class DeviceError(BackendError):
    """There is no GPU, no driver, or not enough memory on it."""


class MissingDependencyError(ClipExportError):
    """A package is needed that is not installed; the hint names the extra that brings it."""


class SpecError(ClipExportError):
    """A spec has an unknown key, lacks one, or holds a value that cannot be."""


class ContractError(ClipExportError):
    """The accuracy contract is not met."""


class SpeedError(ClipExportError):
    """A precision does not pay: it is not faster than what it replaces; the message has the measured times."""
