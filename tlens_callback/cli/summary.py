"""`tlens-callback summary`: describes a run in a few lines."""

import click

from tlens_callback.cli.echo import echo


@click.command()
@click.argument("store")
def summary(store: str) -> None:
    """Print in a few lines what changed most during a run, when it changed, and the events.

    The summary is plain text of 72 columns, for a terminal or a commit message. STORE is a
    directory that TLensCallback or a command of this program wrote, or a directory that holds one.

    \b
    Examples:
      tlens-callback summary out/tlens
      git commit -F <(tlens-callback summary out/tlens)
    """
    from tlens_callback.offline.summary import summary as summary_text
    from tlens_callback.store.find import find_store

    opened, earlier = find_store(store)
    if earlier:
        echo(
            f"This summary is of {opened.path}. Other stores beside it: {', '.join(earlier)}.",
            err=True,
        )
    echo(summary_text(opened))
    if torn := opened.torn:
        steps = ", ".join(map(str, torn))
        echo(f"Left out, because their files are incomplete: steps {steps}.", err=True)
        raise click.exceptions.Exit(3)
