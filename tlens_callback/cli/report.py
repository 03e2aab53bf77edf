"""`tlens-callback report`: the page of a store, as a file or live."""

from pathlib import Path

import click


@click.command()
@click.argument("store", type=click.Path())
@click.option(
    "--out",
    type=click.Path(),
    metavar="FILE",
    help="Where to write it.  [default: STORE/page.html]",
)
@click.option(
    "--most-mb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB",
    help="Size of the file at most, in MB; what had to go is said on it.  [default: 15]",
)
@click.option("--serve", is_flag=True, help="Show it live on this machine, until Ctrl-C.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="For --serve; without it any that is free.",
)
@click.option("--open", "opened", is_flag=True, help="Open it in a browser.")
def report(
    store: str,
    out: str | None,
    most_mb: float | None,
    serve: bool,
    port: int | None,
    opened: bool,
) -> None:
    """Make the page of a store, and print where it is.

    STORE is the directory that a watched run wrote, <output_dir>/tlens, or the output directory
    itself: then its latest run is meant. With --serve the page is shown live, with each step as
    it comes, at an address that only this machine can reach.

    Exit code 3: some steps were cut short, and the page has the others.

    \b
    Examples:
      tlens-callback report out/tlens
      tlens-callback report out --serve --open
    """
    if serve and (out is not None or most_mb is not None):
        raise click.UsageError("--out and --most-mb are of a file, and --serve writes none.")
    if port is not None and not serve:
        raise click.UsageError("--port is for --serve.")
    from tlens_callback.store.find import find_store

    found, others = find_store(store)
    if others:
        click.echo(f"{store} holds {len(others) + 1} stores: {', '.join(others)}, and "
                   f"{found.path.name}, which is taken.", err=True)  # fmt: skip
    torn = found.torn
    if torn:
        click.echo(f"Cut short, and left out: step {', '.join(map(str, torn))}.", err=True)
    if serve:
        from tlens_callback.offline.serve import PageServer

        with PageServer(found, port=port or 0) as server:
            click.echo(server.address)
            click.echo(f"The page of {found.path}. Ctrl-C ends it.", err=True)
            if opened:
                _open(server.address)
            server.run()
        return
    if not found.steps:
        raise ValueError(
            f"{found.path} has no complete step{', all are cut short' if torn else ''}: there is "
            f"nothing to show. If the run goes on, wait for its first observation; if it was "
            f"copied, copy it again, with arrays/ and scores/; tlens-callback replay looks at "
            f"saved checkpoints instead."
        )
    path = Path(out).expanduser() if out else found.path / "page.html"
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory; give the name of a file in it.")
    most_bytes = int((15 if most_mb is None else most_mb) * 1e6)
    found.page(most_bytes=most_bytes).save(path)
    click.echo(path)
    if opened:
        _open(path.absolute().as_uri())
    if torn:
        raise click.exceptions.Exit(3)


def _open(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        click.echo(f"There is no browser to open {address} with.", err=True)
