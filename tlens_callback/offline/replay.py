"""`replay` observes the checkpoints of a training run, as if the run had been watched."""

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
from tlens_callback.offline.stages import Stage, observe_stages
from tlens_callback.probes import own_tokenizer, token_ids
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import print_lines, sink_lines
from tlens_callback.run.settings import Settings
from tlens_callback.sinks import LocalSink
from tlens_callback.store import Store, read_store

logger = logging.getLogger("tlens_callback")


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    Attributes:
        store: the store, with every checkpoint that could be loaded.
        left_out: the names of the checkpoints that could not be loaded.
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

    If the run was watched at each of its saves, the replay gives the same readings, except
    `checkpoint/name`, which a live run does not have, `cost/*`, and `fidelity/*`, which a replay
    has at every checkpoint. Step 0 is the base with adapters that are not trained yet. After full
    fine-tuning there is a step 0 only if `base` names the model that was trained. Instruments that
    need rows of training data (`TrainedFeatures`) get the probes instead; `TokenChange` has nothing
    to say of them.

    If `loader` sets no precision, it is the precision in which the checkpoints were saved, also for
    the base of full fine-tuning. For adapters it is the precision of the base; a line is printed if
    the adapters were, or may have been, trained in another one.

    A second call with the same arguments continues where the first one stopped, for whatever
    reason; the final store equals that of a single call. Every instrument measures at the last
    checkpoint, so this one is observed again once there are later ones. Other arguments, or other
    checkpoints under the old names, make a store `<out>-2`, `<out>-3`, ...; only the last of these
    can be continued. A run that was moved counts as the same if its files kept their times.

    Args:
        arguments: settings of the observer; without probes, only repeated blocks are shown.
        base: the model that was trained; for adapters, where their base is now.
        out: directory of the store; None: `<run>/tlens-replay`.

    Raises:
        ValueError: if there is no checkpoint that can be loaded, and as `observe_stages`.
        FidelityError: if the shadow does not compute what the model computes.
    """
    run = Path(run).expanduser()
    stages, broken = _stages(run, base)
    last = stages[-1].checkpoint
    if loader.dtype is None and last.adapter is None:
        # A base that was saved in another precision than the checkpoints would differ from them by
        # rounding, not by training.
        loader = Loader(device=loader.device, dtype=precision(last.model))
    tokenizer = loader.tokenizer(last)
    if not arguments.prompts:
        print_lines(["tlens: no probes are given, so the models see only repeated random blocks"])
    asked = _request(run, stages[0], arguments, loader, tokenizer)
    record = choose(Path(out or run / "tlens-replay").expanduser(), asked, stages)
    sink = LocalSink(record.path)
    todo, baselines_file = record.remaining(stages)
    for name, reason in broken.items():
        logger.warning("tlens: %s is left out: %s", name, reason)
    left_out = [*broken]
    for stage in stages:
        if stage.step and stage not in todo and stage.step not in record.seen:
            logger.warning("tlens: %s is left out, as it was in the earlier call.", stage.name)
            left_out.append(str(stage.name))
    if not todo:
        sink.page()
        print_lines(["tlens: all checkpoints have been observed already", *sink_lines([sink])])
        return Replay(read_store(record.path), tuple(left_out))
    if baselines_file is not None:
        print_lines([f"tlens: continuing at {todo[0].name}, in {record.path}"])
    errors: list[Exception] = []

    def leave_out(stage: Stage, error: Exception) -> None:
        if isinstance(error, UnknownStart):
            print_lines(
                [
                    "tlens: there is no step 0, so changes are measured from the first "
                    f"checkpoint on: {error}"
                ]
            )
            return
        if stage.step == 0:  # all changes would be measured from this step
            raise error
        logger.warning("tlens: %s is left out: %s", stage.name, error)
        left_out.append(str(stage.name))
        errors.append(error)

    def written(observer: Observer, stage: Stage) -> None:
        if observer.shadow is not None and len(observer.steps) == 1:
            dtype = observer.shadow.dtype
            print_lines(_precision_lines(last, dtype, given=loader.dtype is not None))
        observer.remember(record.baselines_file(stage.step), step=stage.step + 1)
        record.add(stage, last=stage is todo[-1])

    record.begin()
    try:
        observer = observe_stages(
            todo,
            loader,
            arguments,
            [sink],
            tokenizer=tokenizer,
            baselines_file=baselines_file,
            progress="replay",
            leave_out=leave_out,
            written=written,
        )
    except KeyboardInterrupt:
        print_lines([f"tlens: interrupted; the same call continues in {record.path}"])
        raise
    if not record.seen:
        raise ValueError(
            f"No checkpoint of {run} can be loaded. The last error: {errors[-1]}"
        ) from errors[-1]
    print_lines(_summary(observer, sink))
    return Replay(read_store(record.path), tuple(left_out))


def _stages(run: Path, base: str | Path | None) -> tuple[list[Stage], dict[str, str]]:
    """The stages in order, with the model before training as the first one.

    Also returns, by name, why other checkpoints cannot be loaded.
    """
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
                f"tlens: there is no step 0, so changes are measured from {stages[0].name} on; "
                f"name the model that was trained with --base (base=)"
            ]
        )
    return [*before, *stages], {path.name: why for path, why in broken.items()}


def _request(
    run: Path, first: Stage, arguments: Settings, loader: Loader, tokenizer: Any
) -> dict[str, Any]:
    """Describes what a replay was asked for.

    Two replays with equal descriptions give equal numbers, up to rounding.
    """
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
        "instruments": [_stable_repr(one) for one in arguments.instruments or ()],
        "watch": _stable_repr(arguments.watch or None),
        "precision": [str(loader.dtype), str(arguments.dtype)],
        "version": version("tlens-callback"),
    }


def _precision_lines(of: Checkpoint, now: torch.dtype, *, given: bool) -> list[str]:
    """Tells the user if the run computed, or may have computed, in another precision."""

    def short(dtype: object) -> str:
        return str(dtype).removeprefix("torch.")

    if (then := watched_in(Path(of.path))) is not None and then != str(now):
        return [
            f"tlens: the run was watched in {short(then)}, and the replay computes in {short(now)},"
            f" so the readings differ by rounding; use --dtype {short(then)} (dtype=) to get the "
            f"same ones"
        ]
    if then is None and of.adapter is not None and not given and now.itemsize < 4:
        return [
            f"tlens: the replay computes in {short(now)}, in which the base was saved; adapters do "
            f"not record the precision in which they were trained. If TRL loaded the model by its "
            f"name, that was float32: use --dtype float32 (dtype=)"
        ]
    return []


def _stable_repr(thing: object) -> str:
    """The repr of an object, or its class and name if the repr would contain a memory address."""
    plain = type(thing).__repr__ is object.__repr__
    return f"{type(thing).__qualname__} {getattr(thing, 'name', '')}" if plain else repr(thing)


def _summary(observer: Observer, sink: LocalSink) -> list[str]:
    count, seconds = len(observer.steps), observer.cost.seconds
    if not count:
        return sink_lines([sink])
    worst = max(observer.checks.values(), key=lambda check: check.relative)
    return [
        f"tlens: {count} observations in {seconds:.1f} s, without loading the models",
        f"tlens: shadow and model were compared at each checkpoint; at worst: {worst}",
        *sink_lines([sink]),
        f"tlens: to see what changed most: tlens-callback summary {sink.path}",
    ]
