"""Where the callback writes when it is not told: a local store, and beside the trainer's logs."""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import TrainingArguments

from tlens_callback.interfaces import Sink
from tlens_callback.sinks import LocalSink, TensorBoardSink, TrackioSink, WandbSink


def default_sinks(args: TrainingArguments, name: str) -> list[Sink]:
    """The local store, and what `report_to` names; W&B comes by `active_wandb`.

    A package that is not there is the trainer's to report.
    """
    store = LocalSink(Path(args.output_dir or ".") / name)
    beside: dict[str, Callable[[], Sink]] = {
        "trackio": lambda: TrackioSink(name=name, store=store),
        "tensorboard": lambda: TensorBoardSink(
            tensorboard_folder(args, name), name=name, store=store
        ),
    }
    sinks: list[Sink] = [store]
    for product, make in beside.items():
        if product in (args.report_to or ()):
            with suppress(ImportError):
                sinks.append(make())
    return sinks


def active_wandb(sinks: Sequence[Sink], name: str) -> WandbSink | None:
    """One for the active W&B run, unless there is none or the sinks have one already."""
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is None or any(isinstance(sink, WandbSink) for sink in sinks):
        return None
    store = next((sink for sink in sinks if isinstance(sink, LocalSink)), None)
    return WandbSink(name=name, store=store)


def tensorboard_folder(args: TrainingArguments, name: str) -> Path:
    """`<name>` in the folder that this process's trainer writes its events to.

    So TensorBoard lists both together, `<run>` and `<run>/<name>`. The trainer chooses that folder
    when training begins, by the clock, and tells nobody: it is known by the files in it, which have
    the host and the process in their names.
    """
    if given := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        return Path(given).expanduser() / name
    runs = Path(args.output_dir or ".") / "runs"
    own = f".{socket.gethostname()}.{os.getpid()}."
    files = [file for file in runs.rglob("events.out.tfevents.*") if own in file.name]
    folders = {file.parent: file.stat().st_mtime for file in files}
    # Those inside another are of sinks like this one.
    trainers = [folder for folder in folders if folders.keys().isdisjoint(folder.parents)]
    return max(trainers, key=folders.__getitem__, default=runs) / name
