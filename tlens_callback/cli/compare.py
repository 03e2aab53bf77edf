"""`tlens-callback compare`: two saved models, or two watched runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlens_callback.cli.options import asked, looking

if TYPE_CHECKING:
    from tlens_callback.offline.compare import Pair


@click.command()
@click.argument("a")
@click.argument("b", required=False)
@click.option("--base", metavar="DIR", help="The base, where an adapter cannot tell.")
@click.option("--step", type=int, metavar="N", help="Of two runs: this one, not the last of each.")
@click.option(
    "--out", default="tlens-compare", show_default=True, metavar="DIR", help="Of the store."
)
@looking
@click.pass_context
def compare(
    context: click.Context,
    a: str,
    b: str | None,
    base: str | None,
    step: int | None,
    out: str,
    **options: Any,
) -> None:
    """Say what B does that A does not, and make a page of it.

    A and B are saved models (directories, adapters, hub names), which are asked the same prompts;
    or stores of watched runs, or directories with one, whose last observations are compared. A
    directory that holds a model is one; name the store in it to compare stores. An adapter alone is
    compared with its own base.

    \b
    Examples:
      tlens-callback compare out/checkpoint-60 --prompt "The capital of France is"
      tlens-callback compare HuggingFaceTB/SmolLM2-135M out/checkpoint-60 \\
        --prompt "The capital of France is" --target " Paris"
      tlens-callback compare first-run second-run
    """
    from tlens_callback.offline.compare import differences, page_address
    from tlens_callback.sinks import LocalSink, read_store

    asking = {one.name: one.opts[0] for one in context.command.params if one.name}
    given = [
        asking[name]
        for name in (*options, "base")
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if b is None:
        a, b = _own_base(a, base), a
    pair = _pair(a, b, base, step, given, options)
    sink = LocalSink(out)
    pair.write(sink)
    store = read_store(sink.path)
    for letter, name in zip("AB", pair.names, strict=True):
        click.echo(f"{letter}: {name}")
    click.echo(differences(store))
    click.echo(f"Page: {page_address(sink, store)}")
    click.echo(f"tlens: {sink}", err=True)
    for sentence in pair.left_out:
        click.echo(f"Left out: {sentence}", err=True)
    if pair.left_out:
        raise click.exceptions.Exit(3)


def _own_base(adapter: str, base: str | None) -> str:
    """What an adapter goes over."""
    from tlens_callback.checkpoints import Checkpoint

    checkpoint = Checkpoint.of(adapter, base=base)
    if checkpoint.adapter is None:
        raise ValueError(
            f"{adapter} has all weights and does not say what it was trained from: name both."
        )
    return checkpoint.model


def _pair(
    a: str, b: str, base: str | None, step: int | None, given: list[str], options: dict[str, Any]
) -> "Pair":
    from tlens_callback.checkpoints import Checkpoint

    stores = [_is_store(each) for each in (a, b)]
    if all(stores):
        return _of_stores(a, b, step, given)
    if any(stores):
        # What is neither of them is to be told so.
        Checkpoint.of(a if stores[1] else b, base=base)
        said = [
            f"{each} is a {'store' if is_ else 'model'}"
            for each, is_ in zip((a, b), stores, strict=True)
        ]
        raise ValueError(
            f"{said[0]} and {said[1]}: two models are compared, or two stores. "
            f"`tlens-callback analyze` makes a store of a model."
        )
    if step is not None:
        raise ValueError("--step is of two stores; a model has none.")
    return _of_models(a, b, base, options)


def _is_store(given: str) -> bool:
    """Whether it is no model and a store is in it; what is neither is left to the loader."""
    from tlens_callback.store.format import is_store

    path = Path(given).expanduser()
    if is_store(path):
        return True
    model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    return path.is_dir() and not model and any(map(is_store, path.iterdir()))


def _of_stores(a: str, b: str, step: int | None, given: list[str]) -> "Pair":
    from dataclasses import replace

    from tlens_callback.meaning import Quantity
    from tlens_callback.offline.compare_stores import compare_stores
    from tlens_callback.store.find import find_store

    if given:
        raise ValueError(
            f"{', '.join(given)}: nothing is asked of stores, which hold what was seen."
        )
    stores = [find_store(each)[0] for each in (a, b)]
    pair = compare_stores(*stores, step=step)
    answers = Quantity.ANSWER_PROBABILITY
    if any(reading.meaning.quantity is answers for reading in pair.first):
        said = (
            "Taken to be the same in both, since stores do not say: the probes' targets and foils."
        )
        click.echo(said, err=True)
    torn = tuple(f"torn steps {list(s.torn)} of {s.path}." for s in stores if s.torn)
    return replace(pair, left_out=(*pair.left_out, *torn))


def _of_models(a: str, b: str, base: str | None, options: dict[str, Any]) -> "Pair":
    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.offline.compare import compare_models

    first, last = (Checkpoint.of(each, base=base) for each in (a, b))
    arguments, loader = asked(**options)
    return compare_models(first, last, loader, arguments, names=(a, b))
