"""`tlens-callback replay`: observes all checkpoints of a training run."""

from typing import Any

import click

from tlens_callback.cli.options import model_options, settings_and_loader


@click.command()
@click.argument("run_dir")
@click.option(
    "--base",
    metavar="MODEL",
    help="The model that was trained. For adapters: where their base model is now.",
)
@click.option(
    "--out",
    metavar="DIR",
    help="Where to write the store.  [default: RUN_DIR/tlens-replay]",
)
@model_options
def replay(run_dir: str, base: str | None, out: str | None, **options: Any) -> None:
    """Look inside every checkpoint of a training run, as if the run had been watched.

    RUN_DIR is a trainer's output directory. For adapters, step 0 is their base model. After full
    fine-tuning there is a step 0 only if --base names the model that was trained. If you run the
    command again, it continues where it stopped and adds the checkpoints that have been saved
    since. Checkpoints that cannot be loaded are left out, and the exit code is then 3.

    \b
    Example:
      tlens-callback replay out --prompt "The capital of France is" --target " Paris"
    """
    from tlens_callback.offline.replay import replay

    arguments, loader = settings_and_loader(**options)
    if replay(run_dir, arguments, loader, base=base, out=out).left_out:
        raise click.exceptions.Exit(3)
