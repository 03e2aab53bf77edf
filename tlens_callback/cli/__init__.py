"""The command line. What a command needs is imported when it runs.

Exit codes: 0, done; 1, it failed on the way; 2, what was asked for cannot be done as it stands;
3, done in part; 130, interrupted.
"""

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

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; see the module for exit codes."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if ctx.params["debug"] or not _foreseen(error):
                raise
            failure = click.ClickException(str(error))
            failure.exit_code = 2 if isinstance(error, ValueError) else 1
            raise failure from error


def _foreseen(error: Exception) -> bool:
    """Whether its text is for the user."""
    from tlens_callback.fidelity import FidelityError

    return isinstance(error, ValueError | FidelityError | ImportError | OSError)


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
