"""`tlens-callback compare`: compares two saved models, or two watched runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlens_callback.cli.echo import echo
from tlens_callback.cli.options import model_options, settings_and_loader

if TYPE_CHECKING:
    from tlens_callback.offline.compare import Pair


@click.command()
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--base",
    metavar="DIR",
    help="The base model, for an adapter whose config does not say where its base is.",
)
@click.option(
    "--step",
    type=int,
    metavar="N",
    help="Compare two stores at step N. The default is the last observation of each.",
)
@click.option(
    "--out",
    default="tlens-compare",
    show_default=True,
    metavar="DIR",
    help="Where to write the store.",
)
@model_options
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
    """Print how B differs from A, and make a page that shows the differences.

    A and B can be saved models: directories, adapters or hub names. Both are then shown the same
    prompts. Or they can be stores of watched runs, or directories that hold a store: then their
    last observations are compared. A directory that holds both a model and a store counts as a
    model; to compare the store, name the store itself. An adapter alone is compared with its base.

    \b
    Examples:
      tlens-callback compare out/checkpoint-60 --prompt "The capital of France is"
      tlens-callback compare HuggingFaceTB/SmolLM2-135M out/checkpoint-60 \\
        --prompt "The capital of France is" --target " Paris"
      tlens-callback compare first-run second-run
    """
    from tlens_callback.offline.compare import differences, page_address
    from tlens_callback.sinks import LocalSink, read_store

    flags = {one.name: one.opts[0] for one in context.command.params if one.name}
    given = [
        flags[name]
        for name in (*options, "base")
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if b is None:
        a, b = _base_of(a, base), a
    pair = _compare(a, b, base, step, given, options)
    sink = LocalSink(out)
    pair.write(sink)
    store = read_store(sink.path)
    for letter, name in zip("AB", pair.names, strict=True):
        echo(f"{letter}: {name}")
    echo(differences(store))
    echo(f"Page: {page_address(sink, store)}")
    echo(f"tlens: {sink}", err=True)
    for sentence in pair.left_out:
        echo(f"Left out: {sentence}", err=True)
    if pair.left_out:
        raise click.exceptions.Exit(3)


def _base_of(adapter: str, base: str | None) -> str:
    """Finds the base model of an adapter."""
    from tlens_callback.checkpoints import Checkpoint

    checkpoint = Checkpoint.of(adapter, base=base)
    if checkpoint.adapter is None:
        raise ValueError(
            f"{adapter} is a full model, not an adapter, and does not say what it was trained "
            f"from. Give two models to compare."
        )
    return checkpoint.model


def _compare(
    a: str, b: str, base: str | None, step: int | None, given: list[str], options: dict[str, Any]
) -> "Pair":
    from tlens_callback.checkpoints import Checkpoint

    stores = [_is_store(each) for each in (a, b)]
    if all(stores):
        return _compare_stores(a, b, step, given)
    if any(stores):
        # This raises a better error if the other one is not a model at all.
        Checkpoint.of(a if stores[1] else b, base=base)
        kinds = [
            f"{each} is a {'store' if is_ else 'model'}"
            for each, is_ in zip((a, b), stores, strict=True)
        ]
        raise ValueError(
            f"{kinds[0]} and {kinds[1]}. Only two models or two stores can be compared. "
            f"`tlens-callback analyze` makes a store of a model."
        )
    if step is not None:
        raise ValueError("--step can only be used to compare two stores.")
    return _compare_models(a, b, base, options)


def _is_store(given: str) -> bool:
    """Whether a path is or holds a store, and holds no model.

    The loader deals with a path that is neither.
    """
    from tlens_callback.store.format import is_store

    path = Path(given).expanduser()
    if is_store(path):
        return True
    model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    return path.is_dir() and not model and any(map(is_store, path.iterdir()))


def _compare_stores(a: str, b: str, step: int | None, given: list[str]) -> "Pair":
    from dataclasses import replace

    from tlens_callback.meaning import Quantity
    from tlens_callback.offline.compare_stores import compare_stores
    from tlens_callback.store.find import find_store

    if given:
        raise ValueError(
            f"{', '.join(given)} can only be used to compare models. A store holds observations "
            f"that are already made."
        )
    stores = [find_store(each)[0] for each in (a, b)]
    pair = compare_stores(*stores, step=step)
    answers = Quantity.ANSWER_PROBABILITY
    if any(reading.meaning.quantity is answers for reading in pair.first):
        note = (
            "Stores do not record the targets and foils of their probes, so these are taken to be "
            "the same in both."
        )
        echo(note, err=True)
    torn = tuple(f"incomplete steps {list(s.torn)} of {s.path}." for s in stores if s.torn)
    return replace(pair, left_out=(*pair.left_out, *torn))


def _compare_models(a: str, b: str, base: str | None, options: dict[str, Any]) -> "Pair":
    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.offline.compare import compare_models

    first, last = (Checkpoint.of(each, base=base) for each in (a, b))
    arguments, loader = settings_and_loader(**options)
    return compare_models(first, last, loader, arguments, names=(a, b))
