"""`echo`: prints a line of a command; names of probes, events and stores are shown, not obeyed."""

import click

from tlens_callback.visible import visible


def echo(text: object, *, err: bool = False) -> None:
    """Prints a text, on the standard error with `err`; what a terminal would obey becomes an
    escape."""
    click.echo(visible(str(text)), err=err)
