"""`tlens-callback report`: makes the page of a store, as a file or live."""

import math
from pathlib import Path

import click

from tlens_callback.cli.echo import echo


@click.command()
@click.argument("store", type=click.Path())
@click.option(
    "--out",
    type=click.Path(),
    metavar="FILE",
    help="Where to write the page.  [default: STORE/page.html]",
)
@click.option(
    "--most-mb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB",
    help="Largest size of the file, in MB. The page says what was left out to keep to it.  "
    "[default: 15, or up to 60 for the scores of all heads at all steps]",
)
@click.option("--serve", is_flag=True, help="Serve the page live on this machine, until Ctrl-C.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port for --serve. The default is any free port.",
)
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
def report(
    store: str,
    out: str | None,
    most_mb: float | None,
    serve: bool,
    port: int | None,
    opened: bool,
) -> None:
    """Make the page of a store, and print where it is.

    STORE is the directory that a watched run wrote, <output_dir>/tlens. If you give the output
    directory itself, the store of its latest run is used. With --serve the page is live: it shows
    each new step as soon as it is written, at an address that only this machine can reach. The
    address has a token in it, so that no other user of the machine can open the page.

    Exit code 3: some steps in the store are incomplete, and the page shows the others.

    \b
    Examples:
      tlens-callback report out/tlens
      tlens-callback report out --serve --open
    """
    if serve and (out is not None or most_mb is not None):
        raise click.UsageError(
            "--out and --most-mb cannot be used with --serve, which writes no file."
        )
    if port is not None and not serve:
        raise click.UsageError("--port can only be used with --serve.")
    from tlens_callback.store.find import find_store

    found, others = find_store(store)
    if others:
        names = ", ".join([*others, found.path.name])
        echo(
            f"{store} holds {len(others) + 1} stores: {names}. The last one, {found.path.name}, "
            f"is used.",
            err=True,
        )
    torn = found.torn
    if torn:
        steps = ", ".join(map(str, torn))
        echo(f"Left out, because their files are incomplete: steps {steps}.", err=True)
    if serve:
        from tlens_callback.offline.serve import PageServer

        with PageServer(found, port=port or 0) as server:
            echo(server.address)
            echo(f"Serving the page of {found.path}. Press Ctrl-C to end.", err=True)
            if opened:
                _open(server.address)
            server.run()
        return
    if not found.steps:
        raise ValueError(
            f"{found.path} has no complete step, so there is nothing to show"
            f"{': all its steps are incomplete' if torn else ''}. If the run is still going on, "
            f"wait for its first observation. If the store was copied, copy it again, with "
            f"arrays/ and scores/. Or use tlens-callback replay to look at saved checkpoints."
        )
    path = Path(out).expanduser() if out else found.path / "page.html"
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory. Give the name of a file in it.")
    if most_mb is not None and not math.isfinite(most_mb):
        raise ValueError(f"--most-mb {most_mb} is no size. Give a number of MB, such as 15.")
    # No page is larger than this, and a number beyond a float's digits is no file size.
    most_bytes = None if most_mb is None else int(min(most_mb, 1e9) * 1e6)
    found.page(most_bytes=most_bytes).save(path)
    echo(path)
    if opened:
        _open(path.absolute().as_uri())
    if torn:
        raise click.exceptions.Exit(3)


def _open(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        echo(f"No browser was found to open {address}.", err=True)
