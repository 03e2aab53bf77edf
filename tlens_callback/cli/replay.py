"""`tlens-callback replay`."""

import click


@click.command()
def replay() -> None:
    """Stub."""
