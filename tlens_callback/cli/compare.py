"""`tlens-callback compare`."""

import click


@click.command()
def compare() -> None:
    """Stub."""
