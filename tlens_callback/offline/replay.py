"""`replay`: a training run, seen from its checkpoints as if it had been watched."""

import logging
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tlens_callback.checkpoints import Checkpoint, Loader, survey
from tlens_callback.checkpoints.adapters import UnknownStart
from tlens_callback.checkpoints.files import precision
from tlens_callback.offline.replay_record import choose, stamp, watched_in
from tlens_callback.offline.stages import Stage, look_at
from tlens_callback.probes import own_tokenizer, token_ids
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import print_lines, sink_lines
from tlens_callback.run.settings import Settings
from tlens_callback.sinks import LocalSink
from tlens_callback.store import Store, read_store

logger = logging.getLogger("tlens_callback")


@dataclass(frozen=True)
class Replay:
    """What came of a replay.

    Attributes:
        store: the store, with every checkpoint that could be loaded.
        left_out: the names of those that could not.
    """

    store: Store
    left_out: tuple[str, ...]


def replay(
    run: str | Path,
    arguments: Settings,
    loader: Loader,
    *,
    base: str | Path | None = None,
    out: str | Path | None = None,
) -> Replay:
    """Observes every `checkpoint-<step>` of a trainer's output directory into one local store.

    Of a run that was watched at each of its saves the readings are the same, but for
    `checkpoint/name`, which a live run has not, `cost/*`, and `fidelity/*`, which is at every
    checkpoint here. Step 0 is the base, below adapters that are not trained yet; after full
    fine-tuning it is there only where `base` says which model that was. What needs rows of training
    data (`TrainedFeatures`) has the probes alone.

    Where `loader` leaves the precision open it is that in which the checkpoints were saved, for the
    base of full fine-tuning too; below adapters that of the base, and a line says so where they
    were, or may have been, trained in another one.

    Called again with the same arguments it goes on where it stopped, whatever stopped it: the store
    is in the end the one that a single call makes. The last checkpoint, which every instrument is
    asked about, is observed anew when there are later ones. Other arguments, or other checkpoints
    under the old names, make a store `<out>-2`, `<out>-3`, ...; only the last of these is gone on
    with. A run that was moved, with its files' times, is the same.

    Args:
        arguments: what to look at; without probes, repeated blocks.
        base: the model that was trained; of adapters, where it is now.
        out: of the store; None: `<run>/tlens-replay`.

    Raises:
        ValueError: where there is no checkpoint, or none that can be loaded; as `look_at`.
        FidelityError: where the shadow is not the model.
    """
    run = Path(run).expanduser()
    stages, broken = _stages(run, base)
    of_last = stages[-1].checkpoint
    if loader.dtype is None and of_last.adapter is None:
        # A base that was saved in another one would differ from them by rounding, not by training.
        loader = Loader(device=loader.device, dtype=precision(of_last.model))
    tokenizer = loader.tokenizer(of_last)
    if not arguments.prompts:
        print_lines(["tlens: no probes are given, so only repeated random blocks are looked at"])
    asked = _asked(run, stages[0], arguments, loader, tokenizer)
    record = choose(Path(out or run / "tlens-replay").expanduser(), asked, stages)
    sink = LocalSink(record.path)
    todo, memory = record.left(stages)
    for name, reason in broken.items():
        logger.warning("tlens: %s is left out: %s", name, reason)
    left_out = [*broken]
    for stage in stages:
        if stage.step and stage not in todo and stage.step not in record.seen:
            logger.warning("tlens: %s is left out: it was when its turn came.", stage.name)
            left_out.append(str(stage.name))
    if not todo:
        sink.page()
        print_lines(["tlens: all checkpoints have been looked at", *sink_lines([sink])])
        return Replay(read_store(record.path), tuple(left_out))
    if memory is not None:
        print_lines([f"tlens: goes on at {todo[0].name}, in {record.path}"])
    why: list[Exception] = []

    def leave_out(stage: Stage, error: Exception) -> None:
        if isinstance(error, UnknownStart):
            print_lines(
                [f"tlens: there is no step 0, so changes are measured from here on: {error}"]
            )
            return
        if stage.step == 0:  # what all changes would have been measured from
            raise error
        logger.warning("tlens: %s is left out: %s", stage.name, error)
        left_out.append(str(stage.name))
        why.append(error)

    def seen(observer: Observer, stage: Stage) -> None:
        if observer.shadow is not None and len(observer.steps) == 1:
            print_lines(_rounding(of_last, observer.shadow.dtype, asked=loader.dtype is not None))
        observer.remember(record.baselines_file(stage.step), step=stage.step + 1, always=True)
        record.add(stage, last=stage is todo[-1])

    record.begin()
    try:
        observer = look_at(
            todo,
            loader,
            arguments,
            [sink],
            tokenizer=tokenizer,
            memory=memory,
            progress="replay",
            leave_out=leave_out,
            seen=seen,
        )
    except KeyboardInterrupt:
        print_lines([f"tlens: interrupted; the same call goes on in {record.path}"])
        raise
    if not record.seen:
        raise ValueError(f"No checkpoint of {run} can be loaded. The last: {why[-1]}") from why[-1]
    print_lines(_summary(observer, sink))
    return Replay(read_store(record.path), tuple(left_out))


def _stages(run: Path, base: str | Path | None) -> tuple[list[Stage], dict[str, str]]:
    """The checkpoints in order, and before them what they were trained from; and why others cannot
    be loaded."""
    found, broken = survey(run, base=base)
    stages = [
        Stage(one.step or 0, one, Path(one.path).name, partial(getattr, one, "logged"))
        for one in found
    ]
    first = found[0]
    if first.step == 0:
        before = []
    elif first.adapter is not None:
        before = [Stage(0, first.before_training, f"{first.model}, not trained")]
    elif base is not None:
        before = [Stage(0, Checkpoint.of(base), str(base))]
    else:
        before = []
        print_lines(
            [
                f"tlens: there is no step 0, so changes are measured from {stages[0].name} on: "
                f"--base (base=) would say which model was trained"
            ]
        )
    return [*before, *stages], {path.name: why for path, why in broken.items()}


def _asked(
    run: Path, first: Stage, arguments: Settings, loader: Loader, tokenizer: Any
) -> dict[str, Any]:
    """What tells a replay from others: the same means the same numbers, up to rounding."""
    own = own_tokenizer(tokenizer)
    probes = [
        [
            probe.name,
            probe.target,
            probe.foil,
            [probe.block, probe.times, probe.seed]
            if probe.block
            else token_ids(probe, own, vocab_size=0),
        ]
        for probe in arguments.prompts or ()
    ]
    return {
        "run": str(run.resolve()),
        "base": stamp(first) if first.step == 0 else None,
        "probes": probes,
        "repeated blocks": arguments.with_blocks,
        "instruments": [_said(instrument) for instrument in arguments.instruments or ()],
        "watch": _said(arguments.watch or None),
        "precision": [str(loader.dtype), str(arguments.dtype)],
        "version": version("tlens-callback"),
    }


def _rounding(of: Checkpoint, now: torch.dtype, *, asked: bool) -> list[str]:
    """Says that the run computed, or may have computed, in another precision than the replay."""

    def short(dtype: object) -> str:
        return str(dtype).removeprefix("torch.")

    if (then := watched_in(Path(of.path))) is not None and then != str(now):
        return [
            f"tlens: the run was watched in {short(then)}, and this computes in {short(now)}: the "
            f"readings differ by rounding. The same ones: --dtype {short(then)} (dtype=)"
        ]
    if then is None and of.adapter is not None and not asked and now.itemsize < 4:
        return [
            f"tlens: this computes in {short(now)}, in which the base was saved. No adapter says "
            f"in which it was trained; TRL loads a model by its name in float32: --dtype float32 "
            f"(dtype=)"
        ]
    return []


def _said(thing: object) -> str:
    """Its repr; the class alone, where that says where in memory it is."""
    plain = type(thing).__repr__ is object.__repr__
    return f"{type(thing).__qualname__} {getattr(thing, 'name', '')}" if plain else repr(thing)


def _summary(observer: Observer, sink: LocalSink) -> list[str]:
    count, seconds = len(observer.steps), observer.cost.seconds
    if not count:
        return sink_lines([sink])
    worst = max(observer.checks.values(), key=lambda check: check.relative)
    return [
        f"tlens: {count} observations in {seconds:.1f} s, loading not counted",
        f"tlens: shadow and model were compared at each; at worst: {worst}",
        *sink_lines([sink]),
        f"tlens: what changed most: tlens-callback summary {sink.path}",
    ]
