"""Chooses the default sinks: a local store, and the places where the trainer logs."""

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
    """Returns the local store, and trackio and TensorBoard if `report_to` names them.

    `active_wandb` adds W&B. If a package is not installed, the trainer reports that.
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
    """Returns a sink for the active W&B run; None if there is no run, or the sinks have one."""
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is None or any(isinstance(sink, WandbSink) for sink in sinks):
        return None
    store = next((sink for sink in sinks if isinstance(sink, LocalSink)), None)
    return WandbSink(name=name, store=store)


def outgoing_lines(
    sinks: Sequence[Sink],
    *,
    rows: int,
    args: TrainingArguments | None = None,
    rollouts: bool = False,
) -> list[str]:
    """Says what of the training data, and of the store, goes out, and where it goes.

    Args:
        rows: how many rows of the training data became probes, because no probes were given.
        args: the trainer's; None in a loop without a trainer.
        rollouts: whether prompts and completions of rollouts are written.
    """
    store = next((sink for sink in sinks if isinstance(sink, LocalSink)), None)
    places = [name for kind, name in _PLACES.items() if any(isinstance(s, kind) for s in sinks)]
    # The trainer's own W&B run may start after this line is printed.
    if args is not None and "wandb" in (args.report_to or ()) and "W&B" not in places:
        places.append("W&B")
    lines = []
    if rows and places:
        lines.append(
            f"tlens: no probes were given, so the probes are the beginnings of {rows} rows of the "
            f"training data. Their tokens become labels in {' and in '.join(places)}; to show "
            f"other texts, pass probes=[...]"
        )
    if rollouts:
        others = [type(sink).__name__ for sink in sinks if not isinstance(sink, tuple(_PLACES))]
        lines.append(
            f"tlens: rollouts: their prompts and completions go to "
            f"{' and to '.join([*places, *dict.fromkeys(others)]) or 'no sink'}; to write numbers "
            f"only, pass rollouts=Rollouts(texts=False)"
        )
    if args is not None and args.push_to_hub and store is not None:
        folder = Path(args.output_dir or ".").absolute()
        if folder in store.path.parents:
            lines.append(
                f"tlens: push_to_hub uploads {folder.name}/{store.path.relative_to(folder)} too, "
                f"with the tokens of the probes{' and of rollouts' * rollouts}; to keep it, pass "
                f"sinks=[LocalSink(...)] with another directory"
            )
    return lines


_PLACES: dict[type[Sink], str] = {
    LocalSink: "the local store and its page",
    WandbSink: "W&B",
    TrackioSink: "trackio",
    TensorBoardSink: "TensorBoard",
}


def tensorboard_folder(args: TrainingArguments, name: str) -> Path:
    """Returns the folder `<name>` in the folder where this process's trainer writes its events.

    So TensorBoard lists both together, `<run>` and `<run>/<name>`. The trainer names its folder by
    the time when training begins and does not publish it. It is found by the files in it, which
    have the host and the process id in their names.
    """
    if given := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        return Path(given).expanduser() / name
    runs = Path(args.output_dir or ".") / "runs"
    own = f".{socket.gethostname()}.{os.getpid()}."
    files = [file for file in runs.rglob("events.out.tfevents.*") if own in file.name]
    folders = {file.parent: file.stat().st_mtime for file in files}
    # A folder inside another one belongs to a sink like this one.
    trainers = [folder for folder in folders if folders.keys().isdisjoint(folder.parents)]
    return max(trainers, key=folders.__getitem__, default=runs) / name
