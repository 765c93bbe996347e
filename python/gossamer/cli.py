"""The command ``gossamer``: each module of :mod:`gossamer.commands` is one of its commands."""

from __future__ import annotations

import importlib
import pkgutil

try:
    import rich  # noqa: F401, the tables need it
    import typer
except ImportError as error:
    raise SystemExit(f"gossamer: the command line needs {error.name}; pip install 'gossamer[bench]'") from None

from gossamer import commands

app = typer.Typer(
    help="Sparse compute for PyTorch at the speed of dense.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
for _module in pkgutil.iter_modules(commands.__path__):
    _command = getattr(importlib.import_module(f"gossamer.commands.{_module.name}"), _module.name)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_module.name)
    else:
        app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
