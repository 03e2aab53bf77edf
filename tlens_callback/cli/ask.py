"""`tlens-callback ask`."""

import click


@click.command()
def ask() -> None:
    """Stub."""
