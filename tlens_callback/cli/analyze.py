"""`tlens-callback analyze`: looks inside one saved model."""

import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlens_callback.cli.options import model_options, settings_and_loader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.interfaces import Instrument, Sink
    from tlens_callback.probes import Probe
    from tlens_callback.sinks import LocalSink


@click.command()
@click.argument("model")
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
@click.option(
    "--out", default="tlens", show_default=True, metavar="DIR", help="Where to write the store."
)
@click.option(
    "--wandb", "project", metavar="PROJECT", help="Also make a W&B run in PROJECT, with the page."
)
@model_options
def analyze(
    model: str,
    adapter: str | None,
    base: str | None,
    tokenizer: str | None,
    out: str,
    project: str | None,
    **options: Any,
) -> None:
    """Look inside a saved model: a directory or a hub name, with or without an adapter.

    Writes a store with a page to --out, or beside it (tlens-2, ...) if --out holds a store already.
    Without --prompt and --probes the model sees only repeated random blocks, which are enough for
    head scores.

    \b
    Example:
      tlens-callback analyze out/checkpoint-60 --prompt "The capital of France is"
    """
    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.offline.stages import Stage, observe_stages
    from tlens_callback.run.printing import print_lines
    from tlens_callback.run.terminal import saved_model_lines
    from tlens_callback.sinks import LocalSink, read_store

    checkpoint = Checkpoint.of(model, adapter, base=base)
    arguments, loader = settings_and_loader(**options)
    probes = arguments.prompts or []
    kept = usable_instruments(arguments.instruments or (), checkpoint, probes)
    arguments = replace(arguments, instruments=kept)
    own = loader.tokenizer(checkpoint, tokenizer)
    if own is None:
        demand_ids(checkpoint, probes)
    store = LocalSink(unused_store(Path(out)))
    with wandb_run(project, checkpoint, probes, store) as beside:
        stage = Stage(checkpoint.step or 0, checkpoint, logged=checkpoint.logged)
        if not probes:
            print_lines(["tlens: no prompt is given, so the model sees random blocks only"])
        observer = observe_stages([stage], loader, arguments, [store, *beside], tokenizer=own)
        (step,) = observer.steps
        readings = {reading.key: reading for reading in read_store(store.path).readings(step)}
        over = f" over {checkpoint.model}" if checkpoint.adapter else ""
        print_lines(saved_model_lines(observer, readings, name=checkpoint.path + over))


def usable_instruments(
    given: "Sequence[Instrument]", checkpoint: "Checkpoint", probes: "Sequence[Probe]"
) -> "list[Instrument]":
    """Leaves out the default instruments that cannot measure anything in a single observation.

    These only compare with an earlier observation, or need an adapter or a target that is missing.
    """
    from tlens_callback.meaning import Needs
    from tlens_callback.offline.stages import without_unmet_needs

    available = Needs.BLOCKS
    if checkpoint.adapter is not None:
        available |= Needs.ADAPTER
    if any(probe.target is not None for probe in probes):
        available |= Needs.TARGET
    return without_unmet_needs(given, available)


def demand_ids(checkpoint: "Checkpoint", probes: "Sequence[Probe]") -> None:
    """Raises a ValueError for the first probe that needs a tokenizer."""
    for probe in probes:
        ids = not isinstance(probe.content, str) and isinstance(next(iter(probe.content), 0), int)
        if not ids or isinstance(probe.target, str) or isinstance(probe.foil, str):
            raise ValueError(
                f"{checkpoint.path} has no tokenizer, and the probe {probe.name!r} needs one. "
                f"Give --tokenizer NAME, or write the probe as token ids in --probes FILE."
            )


def unused_store(out: Path) -> Path:
    """Finds the first of `out`, `out-2`, `out-3`, ... where a new store can begin at any step.

    Raises:
        ValueError: if the directory cannot be made or written to.
    """
    from tlens_callback.store.format import is_store
    from tlens_callback.store.numbered import newest, unused

    out = out.expanduser().absolute()
    number, path = newest(out, is_store)
    # A sink that begins after step 0 goes on with the store of the highest number, so the path
    # must have no numbered stores beside it.
    while is_store(newest(path, is_store)[1]):
        path, number = unused(out, number), number + 1
    demand_folder(path)
    return path


def demand_folder(path: Path) -> None:
    """Raises a ValueError for a directory that cannot be made or written to."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {path} cannot be a directory, because {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise ValueError(
            f"--out {path} cannot be written: you have no permission to write to {existing}."
        )


@contextmanager
def wandb_run(
    project: str | None, checkpoint: "Checkpoint", probes: "Sequence[Probe]", store: "LocalSink"
) -> "Iterator[list[Sink]]":
    """Makes a sink for a new W&B run, which gets the page as an artifact at the end.

    Without a project the list of sinks is empty.

    Raises:
        ValueError: if W&B cannot begin a run, for example because nobody is logged in.
    """
    if project is None:
        yield []
        return
    import wandb
    from wandb.errors import Error

    from tlens_callback.sinks import WandbSink

    about = {
        "model": checkpoint.model,
        "adapter": checkpoint.adapter,
        "probes": [
            {"name": p.name, "content": p.content, "target": p.target, "foil": p.foil}
            for p in probes
        ],
    }
    try:
        run = wandb.init(project=project, job_type="analyze", config=about)
    except Error as error:
        raise ValueError(
            f"W&B did not begin a run: {error} Without an account, set WANDB_MODE=offline: the "
            f"run is then kept on disk, and `wandb sync` can send it later."
        ) from error
    failed = True
    try:
        yield [WandbSink(run, store=store)]
        name = re.sub(r"[^\w.-]+", "-", Path(checkpoint.path).name, flags=re.ASCII)[-100:]
        page = wandb.Artifact(f"tlens-page-{name}", type="tlens-page")
        page.add_file(str(store.page()))
        run.log_artifact(page)
        failed = False
    finally:
        run.finish(exit_code=int(failed))
