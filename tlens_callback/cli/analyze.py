"""`tlens-callback analyze`: one saved model."""

import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlens_callback.cli.options import asked, looking

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.interfaces import Instrument, Sink
    from tlens_callback.probes import Probe
    from tlens_callback.sinks import LocalSink


@click.command()
@click.argument("model")
@click.option("--adapter", metavar="DIR", help="An adapter over MODEL.")
@click.option("--base", metavar="DIR", help="The base, where MODEL is an adapter that cannot tell.")
@click.option("--tokenizer", metavar="NAME", help="Directory or hub name; MODEL's own by default.")
@click.option("--out", default="tlens", show_default=True, metavar="DIR", help="Of the store.")
@click.option("--wandb", "project", metavar="PROJECT", help="Make a W&B run with the page, too.")
@looking
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

    Makes a store with a page in --out; where that holds one already, beside it. Without --prompt
    and --probes the model sees repeated random blocks alone, which is enough for head scores.

    \b
    Example:
      tlens-callback analyze out/checkpoint-60 --prompt "The capital of France is"
    """
    from tlens_callback.checkpoints import Checkpoint
    from tlens_callback.offline.stages import Stage, look_at
    from tlens_callback.run.printing import print_lines
    from tlens_callback.run.terminal import saved_model_lines
    from tlens_callback.sinks import LocalSink, read_store

    checkpoint = Checkpoint.of(model, adapter, base=base)
    arguments, loader = asked(**options)
    probes = arguments.prompts or []
    kept = of_one_look(arguments.instruments or (), checkpoint, probes)
    arguments = replace(arguments, instruments=kept)
    own = loader.tokenizer(checkpoint, tokenizer)
    if own is None:
        demand_ids(checkpoint, probes)
    store = LocalSink(unused_store(Path(out)))
    with wandb_run(project, checkpoint, probes, store) as beside:
        stage = Stage(checkpoint.step or 0, checkpoint, logged=checkpoint.logged)
        if not probes:
            print_lines(["tlens: no prompt is given: repeated random blocks alone"])
        observer = look_at([stage], loader, arguments, [store, *beside], tokenizer=own)
        (step,) = observer.steps
        readings = {reading.key: reading for reading in read_store(store.path).readings(step)}
        over = f" over {checkpoint.model}" if checkpoint.adapter else ""
        print_lines(saved_model_lines(observer, readings, name=checkpoint.path + over))


def of_one_look(
    given: "Sequence[Instrument]", checkpoint: "Checkpoint", probes: "Sequence[Probe]"
) -> "list[Instrument]":
    """Those given without the default ones that only compare with an earlier observation, or
    measure what is not there."""
    from tlens_callback.meaning import Needs
    from tlens_callback.offline.stages import with_what_is_there

    there = Needs.BLOCKS
    if checkpoint.adapter is not None:
        there |= Needs.ADAPTER
    if any(probe.target is not None for probe in probes):
        there |= Needs.TARGET
    return with_what_is_there(given, there)


def demand_ids(checkpoint: "Checkpoint", probes: "Sequence[Probe]") -> None:
    """Refuses probes that need a tokenizer."""
    for probe in probes:
        ids = not isinstance(probe.content, str) and isinstance(next(iter(probe.content), 0), int)
        if not ids or isinstance(probe.target, str) or isinstance(probe.foil, str):
            raise ValueError(
                f"{checkpoint.path} comes without a tokenizer, and the probe {probe.name!r} needs "
                f"one: give --tokenizer NAME, or the probe as token ids in --probes FILE."
            )


def unused_store(out: Path) -> Path:
    """The first of `out`, `out-2`, `out-3`, ... where a run can begin at whatever step.

    Raises:
        ValueError: where nothing can be written.
    """
    from tlens_callback.store.format import is_store
    from tlens_callback.store.numbered import newest, unused

    out = out.expanduser().absolute()
    number, path = newest(out, is_store)
    # A sink goes on with the last of the numbered ones, where the step is not 0.
    while is_store(newest(path, is_store)[1]):
        path, number = unused(out, number), number + 1
    demand_folder(path)
    return path


def demand_folder(path: Path) -> None:
    """Refuses a directory that cannot be made, or written to."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"--out {path} cannot be a directory: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out {path}: {there} may not be written to.")


@contextmanager
def wandb_run(
    project: str | None, checkpoint: "Checkpoint", probes: "Sequence[Probe]", store: "LocalSink"
) -> "Iterator[list[Sink]]":
    """The sink of a W&B run that gets the page as an artifact at the end; none without a project.

    Raises:
        ValueError: where W&B cannot begin one: nobody is logged in, say.
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
            f"W&B did not begin a run: {error} Without an account, WANDB_MODE=offline keeps it "
            f"on disk, for `wandb sync`."
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
