"""`tlens-callback ask`: shows how a saved model answers prompts of your own."""

import sys
import webbrowser
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from tlens_callback.cli.analyze import demand_folder
from tlens_callback.cli.echo import echo
from tlens_callback.cli.options import DTYPES, prompt_probes


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--adapter", metavar="DIR", help="An adapter to put on MODEL.")
@click.option(
    "--base",
    metavar="DIR",
    help="The base model, if MODEL is an adapter whose config does not say where its base is.",
)
@click.option(
    "--tokenizer",
    metavar="NAME",
    help="Directory or hub name of a tokenizer. The default is MODEL's own.",
)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message in a chat.")
@click.option("--target", help="The next token to explain. The default is the likeliest one.")
@click.option(
    "--foil",
    help="The token to compare the target with. The default is the likeliest other token.",
)
@click.option(
    "--out", default="ask", show_default=True, metavar="DIR", help="Where to write the pages."
)
@click.option("--open", "opened", is_flag=True, help="Open each page in the browser.")
@click.option("--device", help="Device to compute on. The default is the GPU, if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Precision to compute in. The default is the precision of the saved weights.",
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
    """Show the likeliest next tokens after a prompt, and make a page that explains them.

    The page has the attention patterns, the logit lens at each token, what each head and MLP writes
    towards the answer, and the neurons that fire. Without PROMPT, each line of the input is a
    prompt: in a terminal until you enter an empty line, from a pipe until its end.

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
        raise ValueError(f"{checkpoint.path} has no tokenizer. Give --tokenizer NAME.")
    name, step = checkpoint.path, checkpoint.step or 0
    asker = Asker(loader.load(checkpoint), own, name=name, step=step)
    answered = refused = 0
    for text in _input_prompts() if prompt is None else (prompt,):
        try:
            (probe,) = prompt_probes([text], chat=chat, target=target, foil=None)
            answer = asker.ask(probe, foil=foil)
        except ValueError as error:
            if prompt is not None:
                raise
            echo(f"Error: {error}", err=True)
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
        raise ValueError("Nothing was answered. Give a PROMPT, or one prompt a line as input.")
    if refused:
        raise click.exceptions.Exit(3)


def _input_prompts() -> Iterator[str]:
    """Reads one prompt a line: in a terminal until an empty line, from a pipe until its end."""
    if not sys.stdin.isatty():
        yield from (line.removesuffix("\n") for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a line to edit
    echo("Enter one prompt a line. An empty line or Ctrl-D ends.", err=True)
    with suppress(EOFError):
        while (line := input("> ")).strip():
            yield line


def unused_page(folder: Path, name: str) -> Path:
    """Returns the first of <name>.html, <name>-2.html, ... that does not exist yet."""
    path, number = folder / f"{name}.html", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.html"
    return path
