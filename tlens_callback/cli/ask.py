"""`tlens-callback ask`: one's own prompts on one's own checkpoint."""

import sys
import webbrowser
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from tlens_callback.cli.analyze import demand_folder
from tlens_callback.cli.options import DTYPES, given_prompts


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--adapter", metavar="DIR", help="An adapter over MODEL.")
@click.option("--base", metavar="DIR", help="The base, where MODEL is an adapter that cannot tell.")
@click.option("--tokenizer", metavar="NAME", help="Directory or hub name; MODEL's own by default.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message, not plain text.")
@click.option("--target", help="The next token to explain; the likeliest by default.")
@click.option("--foil", help="The token to set it against; the likeliest other one by default.")
@click.option("--out", default="ask", show_default=True, metavar="DIR", help="Of the pages.")
@click.option("--open", "opened", is_flag=True, help="Open each page in the browser.")
@click.option("--device", help="Where to compute; the GPU, if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Precision to compute in. Without it, that in which the weights were saved.",
)
def ask(
    model: str,
    prompt: str | None,
    adapter: str | None,
    base: str | None,
    tokenizer: str | None,
    chat: bool,
    target: str | None,
    foil: str | None,
    out: str,
    opened: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    """See why a model goes on as it does: likely next tokens, and a page for the prompt.

    The page has the attention patterns, the logit lens at each token, what each head and MLP writes
    towards the answer, and the neurons that fire. Without PROMPT, prompts are read one a line: from
    the terminal until an empty line, from a pipe to its end, empty lines left out.

    \b
    Examples:
      tlens-callback ask out/checkpoint-60 "The capital of France is"
      tlens-callback ask out/checkpoint-60 --chat < questions.txt
    """
    import torch

    from tlens_callback.checkpoints import Checkpoint, Loader
    from tlens_callback.offline.ask import Asker
    from tlens_callback.run.printing import print_lines

    folder = Path(out).expanduser().absolute()
    demand_folder(folder)
    checkpoint = Checkpoint.of(model, adapter, base=base)
    loader = Loader(device=device, dtype=getattr(torch, dtype) if dtype else None)
    own = loader.tokenizer(checkpoint, tokenizer)
    if own is None:
        raise ValueError(f"{checkpoint.path} comes without a tokenizer: give --tokenizer NAME.")
    name, step = checkpoint.path, checkpoint.step or 0
    asker = Asker(loader.load(checkpoint), own, name=name, step=step)
    answered = refused = 0
    for text in _typed() if prompt is None else (prompt,):
        try:
            (probe,) = given_prompts([text], chat=chat, target=target, foil=None)
            answer = asker.ask(probe, foil=foil)
        except ValueError as error:
            if prompt is not None:
                raise
            click.echo(f"Error: {error}", err=True)
            refused += 1
            continue
        if not answered:
            print_lines([f"tlens: the shadow agrees with the model: {answer.fidelity}"])
        answered += 1
        page = answer.save(unused_page(folder, answer.probe.name))
        print_lines([*answer.lines(), f"  page: {page}"])
        if opened:
            webbrowser.open(page.as_uri())
    if not answered:
        raise ValueError("Nothing was answered: give a PROMPT, or lines to read.")
    if refused:
        raise click.exceptions.Exit(3)


def _typed() -> Iterator[str]:
    """Lines from the terminal, until an empty one or the end; all from a pipe but empty ones."""
    if not sys.stdin.isatty():
        yield from (line.removesuffix("\n") for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a line to edit
    click.echo("A prompt a line; an empty line or Ctrl-D ends.", err=True)
    with suppress(EOFError):
        while (line := input("> ")).strip():
            yield line


def unused_page(folder: Path, name: str) -> Path:
    """The first of <name>.html, <name>-2.html, ... that is not there."""
    path, number = folder / f"{name}.html", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.html"
    return path
