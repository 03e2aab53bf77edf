"""`tlens-callback summary`: a run in a few lines."""

import click


@click.command()
@click.argument("store")
def summary(store: str) -> None:
    """Say in a few lines what changed most in a run, when, and what happened.

    Plain text of 72 columns, for a terminal or a commit message. STORE is a directory that
    TLensCallback or a command of this program wrote, or one with such a directory in it.

    \b
    Examples:
      tlens-callback summary out/tlens
      git commit -F <(tlens-callback summary out/tlens)
    """
    from tlens_callback.offline.summary import summary as in_words
    from tlens_callback.store.find import find_store

    opened, earlier = find_store(store)
    if earlier:
        click.echo(f"Of {opened.path}; beside it: {', '.join(earlier)}.", err=True)
    click.echo(in_words(opened))
    if torn := opened.torn:
        click.echo(f"Left out, since their files are torn: steps {list(torn)}.", err=True)
        raise click.exceptions.Exit(3)
