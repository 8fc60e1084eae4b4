"""The command line: one file per verb, each of which parses, calls a public function, and prints.

Data goes to stdout, everything else to stderr. Nothing that is slow to import is imported before a command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from clip_export.commands import bench, build, context, doctor, embed, explain, inspect, similarity, verify
from clip_export.commands._group import CommandGroup, ManyValues

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: readable everywhere, the same in every terminal, and quick
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for _command in (build, inspect, verify, bench, explain, embed, similarity, context, doctor):
    _name = _command.__name__.rpartition(".")[2]
    app.command(_name, cls=ManyValues)(getattr(_command, _name))


def _print_version(wanted: bool) -> None:
    if wanted:
        from clip_export import __version__

        typer.echo(f"clip-export {__version__}")
        raise typer.Exit


def _print_cmakedir(wanted: bool) -> None:
    if wanted:
        from clip_export.headers import cmake_dir

        typer.echo(cmake_dir())
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    cmakedir: Annotated[
        bool,
        typer.Option(
            "--cmakedir",
            help="Print where CMake finds the C++ runtime, for -Dclip_export_DIR.",
            callback=_print_cmakedir,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """CLIP out of the notebook: checkpoints become engines that give the same embeddings, and prove it.

    Start with `clip-export build demo`, then `clip-export verify engines/demo`.
    """
