"""`tlens-callback replay`: the checkpoints of a training run."""

from typing import Any

import click

from tlens_callback.cli.options import asked, looking


@click.command()
@click.argument("run_dir")
@click.option("--base", metavar="MODEL", help="What was trained; of adapters, where it is now.")
@click.option("--out", metavar="DIR", help="Of the store.  [default: RUN_DIR/tlens-replay]")
@looking
def replay(run_dir: str, base: str | None, out: str | None, **options: Any) -> None:
    """Look at every checkpoint of a training run, as if it had been watched.

    RUN_DIR is a trainer's output directory. Adapters begin with their base at step 0; after full
    fine-tuning --base says what step 0 was. Called again, it goes on where it stopped, and adds
    what has been saved since. Checkpoints that cannot be loaded are left out: exit code 3.

    \b
    Example:
      tlens-callback replay out --prompt "The capital of France is" --target " Paris"
    """
    from tlens_callback.offline.replay import replay

    arguments, loader = asked(**options)
    if replay(run_dir, arguments, loader, base=base, out=out).left_out:
        raise click.exceptions.Exit(3)
