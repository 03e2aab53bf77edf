"""`tlens-callback analyze`: one saved model."""

from typing import Any

import click

from tlens_callback.cli.options import asked, looking


@click.command()
@click.argument("model")
@click.option("--adapter", metavar="DIR", help="An adapter over MODEL.")
@click.option("--base", metavar="DIR", help="The base, where MODEL is an adapter that cannot tell.")
@click.option("--out", default="tlens", show_default=True, metavar="DIR", help="Of the store.")
@looking
def analyze(model: str, adapter: str | None, base: str | None, out: str, **options: Any) -> None:
    """Look inside a saved model: a directory or a hub name, with or without an adapter.

    \b
    Example:
      tlens-callback analyze out/checkpoint-60 --prompt "The capital of France is"
    """
    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.offline import Stage, look_at
    from tlens_callback.sinks import LocalSink
    from tlens_callback.terminal import print_lines, summary

    checkpoint = Checkpoint.of(model, adapter, base=base)
    arguments, loader = asked(**options)
    sink = LocalSink(out)
    tokenizer = loader.tokenizer(checkpoint)
    observer = look_at([Stage(0, checkpoint)], loader, arguments, [sink], tokenizer=tokenizer)
    print_lines(summary(observer))
