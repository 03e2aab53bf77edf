"""`tlens-callback summary`."""

import click


@click.command()
def summary() -> None:
    """Stub."""
