"""The command line. What a command needs is imported when it runs.

Exit codes: 0, done; 1, it failed on the way; 2, what was asked for cannot be done as it stands;
3, done in part; 130, interrupted.
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
from tlens_callback.cli.replay import replay
from tlens_callback.cli.report import report
from tlens_callback.cli.summary import summary
from tlens_callback.cli.workspace import workspace


class Commands(click.Group):
    """Says in one line what is wrong, and why, instead of where it came up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added, not by their letters."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences; click's own list cuts them to a line."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, one.get_short_help_str(limit=200)) for name, one in self.commands.items()]
            )

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; see the module for exit codes."""
        try:
            with _bars_only_on_a_terminal(), warnings.catch_warnings():
                # Libraries' words to those who call them, who is not the user here.
                warnings.simplefilter("ignore", FutureWarning)
                result = super().invoke(ctx)
                # What is still held back would fail where nobody can answer for it.
                sys.stdout.flush()
                return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            # A pipe that nobody reads any more (`| head`) is an end that click knows.
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if not _foreseen(error):
                raise
            if ctx.params["debug"]:
                traceback.print_exception(error)
            click.echo(f"Error: {str(error) or type(error).__name__}", err=True)
            code = 2 if isinstance(error, ValueError) else 1
            raise click.exceptions.Exit(code) from error


def _foreseen(error: Exception) -> bool:
    """Whether its text is for the user."""
    # Where it was not imported nobody raised it, and importing it takes seconds.
    fidelity = sys.modules.get("tlens_callback.shadow.fidelity")
    ours = () if fidelity is None else (fidelity.FidelityError,)
    return isinstance(error, (ValueError, ImportError, OSError, *ours))


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """Progress bars of transformers and the hub ("Loading weights") would fill a log with lines.

    They read the variable when they are imported, which no command does before it runs.
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
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def main(debug: bool) -> None:
    """Look inside language models: at saved checkpoints, and at what TLensCallback saw.

    Exit codes: 0 done, 1 failed on the way, 2 cannot be done as asked, 3 done in part,
    130 interrupted.

    \b
    Example:
      tlens-callback analyze out/checkpoint-60 --prompt "The capital of France is"
    """


for command in (analyze, replay, compare, report, summary, ask, workspace):
    main.add_command(command)
