"""`tlens-callback report`."""

import click


@click.command()
def report() -> None:
    """Stub."""
