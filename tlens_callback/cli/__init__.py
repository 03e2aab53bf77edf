"""The command line: each command imports what it needs only when it runs.

Exit codes: 0, the command is done; 1, it failed while it ran; 2, it cannot do what was asked; 3, it
did only a part of it; 130, it was interrupted.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from tlens_callback.cli.analyze import analyze
from tlens_callback.cli.ask import ask
from tlens_callback.cli.compare import compare
from tlens_callback.cli.echo import echo
from tlens_callback.cli.replay import replay
from tlens_callback.cli.report import report
from tlens_callback.cli.summary import summary
from tlens_callback.cli.workspace import workspace


class Commands(click.Group):
    """The group of all commands, which prints an error as one line instead of a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Lists the commands in the order in which they were added, not by the alphabet."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Prints a whole sentence for each command; click's own list would cut it to one line."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, one.get_short_help_str(limit=200)) for name, one in self.commands.items()]
            )

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; the docstring of the module explains the exit codes."""
        try:
            with _no_bars_without_terminal(), warnings.catch_warnings():
                # Libraries address these warnings to programmers, not to a user of this command.
                warnings.simplefilter("ignore", FutureWarning)
                result = super().invoke(ctx)
                # Flush here: a later flush could fail where no handler catches the error.
                sys.stdout.flush()
                return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            # click itself handles a pipe that nobody reads any more (`| head`).
            raise
        except KeyboardInterrupt:
            echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if not _is_for_user(error):
                raise
            if ctx.params["debug"]:
                traceback.print_exception(error)
            echo(f"Error: {str(error) or type(error).__name__}", err=True)
            code = 2 if isinstance(error, ValueError) else 1
            raise click.exceptions.Exit(code) from error


def _is_for_user(error: Exception) -> bool:
    """Whether the text of an error is written for the user, so that no traceback is needed."""
    # FidelityError cannot have been raised before its module is imported, and importing the
    # module here would take seconds.
    fidelity = sys.modules.get("tlens_callback.shadow.fidelity")
    ours = () if fidelity is None else (fidelity.FidelityError,)
    return isinstance(error, (ValueError, ImportError, OSError, *ours))


@contextmanager
def _no_bars_without_terminal() -> Iterator[None]:
    """Switches off the progress bars of transformers and the hub where they would fill a log.

    These libraries read the variable when they are imported, and a command imports them only when
    it runs.
    """
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    if name in os.environ or sys.stderr.isatty():
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tlens-callback")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Look inside language models: at saved models, and at training runs that were watched.

    Exit codes: 0 the command is done, 1 it failed while it ran, 2 it cannot do what was asked,
    3 it did only a part of it, 130 it was interrupted.

    \b
    Example:
      tlens-callback analyze out/checkpoint-60 --prompt "The capital of France is"
    """


for command in (analyze, replay, compare, report, summary, ask, workspace):
    main.add_command(command)
