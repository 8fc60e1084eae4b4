"""Where exceptions become text: the one place, for every command, in a terminal and under Typer's CliRunner alike.

A ClipExportError is `error: …`, a blank line and `hint: …` on stderr, and exit code 1. A disk that is full or may not
be written is the same, wherever it happens. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from clip_export.commands._output import printable
from clip_export.errors import ClipExportError
from clip_export.output_file import hint_for, reason

NOT_MEASURED = 2  # something that was asked of verify, bench or explain could not be measured
INTERRUPTED = 130  # what a shell gives for a process that SIGINT ended


class CommandGroup(TyperGroup):
    """A group of commands whose errors and warnings are lines of text on stderr."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments. --help and --version print while this goes on, so its errors become text as well."""
        with _errors_as_text():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for. Raises typer.Exit(1) after an error that has been printed."""
        with _errors_as_text(), _warnings_as_lines():
            return super().invoke(ctx)


class ManyValues(TyperCommand):
    """A command whose repeatable options take several values after one flag, as in `--images A B --texts x y`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args` with `--images A B` written as `--images A --images B`."""
        flags = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, spread(args, flags))


def spread(args: Sequence[str], flags: set[str]) -> list[str]:
    """`args` with a flag of `flags` before each of its values, which is what click can parse.

    The value next to a flag is taken whatever it is. Those after it go on up to an argument that begins with a dash, so
    a mistyped option is an error and not one more value; a single dash is a value.

    >>> spread(["--images", "a", "b", "--json"], {"--images"})
    ['--images', 'a', '--images', 'b', '--json']
    """
    result: list[str] = []
    current: str | None = None
    rest = iter(args)
    for arg in rest:
        name, equals, _ = arg.partition("=")
        if arg == "--":
            return [*result, arg, *rest]
        if name in flags:
            current = name
            result.append(arg)
            if not equals:
                result += [value for value in [next(rest, None)] if value is not None]
        elif current is not None and (arg == "-" or not arg.startswith("-")):
            result += [current, arg]
        else:
            current = None
            result.append(arg)
    return result


def say(line: str) -> None:
    """A line for people, on stderr, without characters that would move their cursor."""
    typer.echo(printable(line), err=True)


@contextlib.contextmanager
def surviving_readers() -> Iterator[None]:
    """Print inside: a reader who goes early, as head does, changes no exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed at the end


@contextlib.contextmanager
def _errors_as_text() -> Iterator[None]:
    try:
        yield
    except ClipExportError as error:
        say_error(error.message, error.hint)
        raise typer.Exit(1) from error
    except BrokenPipeError:
        raise  # whoever read our output has had enough: Typer ends quietly
    except OSError as error:
        hint = hint_for(error)
        if hint is None:
            raise
        say_error(f"{os.fsdecode(error.filename) + ': ' if error.filename else ''}{reason(error)}", hint)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        say("interrupted; nothing half-written was left")
        raise typer.Exit(INTERRUPTED) from error


def say_error(message: str, hint: str | None) -> None:
    """An error as every command prints it."""
    say(f"error: {message}")
    if hint is not None:
        say(f"\nhint: {hint}")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Each warning that Python would show is one line, and is shown once."""
    shown: set[str] = set()

    def show(message: Warning | str, *_place: Any, **_more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            say(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
