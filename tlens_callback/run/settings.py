"""`Settings`: the arguments that `TLensCallback`, `Tracer` and the observer share."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from operator import index
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal, SupportsIndex, TypedDict

import torch

from tlens_callback.events import Watch
from tlens_callback.instruments import fast
from tlens_callback.interfaces import Instrument, Sink
from tlens_callback.meaning import Needs, described
from tlens_callback.probes import Probe
from tlens_callback.probes.builtin import repeated_blocks
from tlens_callback.probes.entries import ENDINGS
from tlens_callback.probes.file import read_probes
from tlens_callback.reading import RESERVED
from tlens_callback.rollouts.settings import Rollouts
from tlens_callback.run.baselines import BASELINE
from tlens_callback.run.printing import warn
from tlens_callback.run.writer import OnError, Writing
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.memory import Holding, demand_holding

MANY = 256
"""A warning is logged for more probes than this."""


class Options(TypedDict, total=False):
    """Lists the fields of `Settings` except the probes, for editors and type checkers."""

    instruments: Sequence[Instrument] | None
    sinks: Sequence[Sink | EllipsisType] | None
    watch: Watch | Literal[False] | None
    every_n_steps: int
    budget: float | None
    repeats: bool
    device: torch.device | str | None
    dtype: torch.dtype | None
    weights: Holding
    on_error: OnError
    writing: Writing
    name: str
    rollouts: Rollouts | None


@dataclass(frozen=True)
class Settings:
    """Says what is watched and how; it is checked once, before anything runs.

    Args:
        probes: the texts to run, or the path of a file that `read_probes` reads. None: the first
            rows of the training data.
        instruments: what to measure. None: the fast instruments,
            `tlens_callback.instruments.fast()`, except those that the model has nothing for.
        sinks: where the readings go, in this order. None: a local store `<output_dir>/<name>`, the
            active W&B run if there is one, and in a Hugging Face trainer also trackio and
            TensorBoard if `report_to` names them. TensorBoard's files go to `<name>` in the folder
            of the trainer's own events. `...` in the list stands for these: `[..., mine]` adds one.
        watch: what to raise events about: heads that take or lose a role, collapsing entropy, and
            rules of your own. None: `Watch()`. False: nothing.
        every_n_steps: optimizer steps between two observations.
        budget: limit of the share of training time that watching takes: 0.02 for 2 %. Observations
            are then 2, 4, 8, ... times `every_n_steps` apart where they take more, and a printed
            line says so. The time before the first step is not counted. Step 0, the first multiple
            of `every_n_steps`, from which it learns what an observation takes, and the last step
            are observed in any case. In a run of several processes rank 0's clock decides for all.
            None: no limit.
        repeats: True: repeated random blocks of three lengths are added to the probes if an
            instrument needs them, such as `HeadScores`, and the probes have none. False: they are
            never added.
        device: where to put the shadow. None: on the model's device, where it shares every weight
            that no adapter changes. On another device it is a full copy.
        dtype: precision of the shadow; None: the model's. `torch.float32` for a bfloat16 model
            shows changes below bfloat16's rounding, and takes 4 bytes for every parameter.
        weights: how the shadow holds weights that it cannot share with the model, such as those
            with adapters. "resident": all of them. "streamed": one decoder layer at a time, merged
            anew in each forward pass. "auto": resident, unless they would take more than a quarter
            of the free memory or the base is quantised.
        on_error: "warn": an instrument or sink that fails during training is reported once and not
            used any more. "raise": its error is raised.
        writing: "wait": the sinks write on a thread of their own, and training waits for them only
            if two observations are waiting already. "drop_old": training never waits; the older of
            the two is dropped and counted. "inline": the sinks write on the training thread.
        name: separates several callbacks of one training. It is the directory of the default local
            store, the section in W&B and the other sinks, and the name of the files `<name>.memory`
            and `<name>.constants` in each checkpoint, which a resumed run compares its observations
            with.
        rollouts: which of the completions that a trainer samples are looked at; None: `Rollouts()`,
            if there are any.

    Raises:
        ValueError: if something cannot work with any model; the text says what to do.
    """

    probes: Sequence[Probe] | str | os.PathLike[str] | None = None
    _: KW_ONLY
    instruments: Sequence[Instrument] | None = None
    sinks: Sequence[Sink | EllipsisType] | None = None
    watch: Watch | Literal[False] | None = None
    every_n_steps: int = 100
    budget: float | None = None
    repeats: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    weights: Holding = "auto"
    on_error: OnError = "warn"
    writing: Writing = "wait"
    name: str = "tlens"
    rollouts: Rollouts | None = None

    def __post_init__(self) -> None:
        if not _counts(self.every_n_steps):
            raise ValueError(
                f"every_n_steps must be a whole number, 1 or more, got {self.every_n_steps!r}."
            )
        share: Any = self.budget
        if share is not None and not (_is_number(share) and 0 < share < 1):
            raise ValueError(
                f"budget is a share of training time, more than 0 and less than 1, such as 0.02 "
                f"for 2 %, got {share!r}. For no limit, leave it out."
            )
        demand_holding(self.weights)
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', got {self.on_error!r}.")
        if self.writing not in ("wait", "drop_old", "inline"):
            raise ValueError(
                f"writing must be 'wait', 'drop_old' or 'inline', got {self.writing!r}."
            )
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(
                f"name may only have letters, digits, - and _ in it, got {self.name!r}."
            )
        if re.fullmatch(r"checkpoint-\d+", self.name) or len(self.name.encode()) > 100:
            raise ValueError(
                f"name is the name of a directory beside the trainer's checkpoints, so it must not "
                f"be that of one of them, nor longer than 100 letters, got {self.name!r}."
            )
        probes: Any = self.probes
        if isinstance(probes, str | os.PathLike):
            probes = _from_file(probes)
        for what, given in (
            ("probes", probes),
            ("instruments", self.instruments),
            ("sinks", self.sinks),
        ):
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(
                    f"{what} must be a list, {what}=[...], got {type(given).__name__}."
                )
        for probe in probes or ():
            if not isinstance(probe, Probe):
                raise ValueError(
                    f"probes must be Probe objects, got {type(probe).__name__}: {probe!r}."
                )
        watch: Any = Watch() if self.watch is None else self.watch
        if watch is not False and not isinstance(watch, Watch):
            raise ValueError(f"watch must be a Watch, False or None, got {watch!r}.")
        instruments = fast() if self.instruments is None else list(self.instruments)
        _check_parts(instruments, self.sinks_with(list), watch or None)
        if not isinstance(self.rollouts, Rollouts | None):
            raise ValueError(f"rollouts must be Rollouts(...) or None, got {self.rollouts!r}.")
        device: Any = self.device
        if device is not None:
            try:
                device = torch.device(device)
            except RuntimeError as error:
                raise ValueError(f"torch does not know this device: {error}") from error
        dtype: Any = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating point torch.dtype, got {dtype!r}.")
        if probes and len(probes) > MANY:
            warn(
                "tlens: %d probes are a lot: each one runs at every observation and has its own "
                "readings, and the page can show some dozens. To evaluate on a test set, use "
                "another tool.",
                len(probes),
            )
        # Defaults are chosen here, once: a watch keeps state, so there must be only one.
        chosen = {"instruments": instruments, "watch": watch, "device": device}
        chosen["probes"] = None if probes is None else list(probes)
        for field, value in chosen.items():
            object.__setattr__(self, field, value)

    @property
    def prompts(self) -> list[Probe] | None:
        """The probes that were given, as a list; None if none were given."""
        assert self.probes is None or isinstance(self.probes, list)
        return self.probes

    def sinks_with(self, default: Callable[[], Sequence[Sink]]) -> list[Sink]:
        """Returns the sinks, with the default ones where they belong."""
        found: list[Sink] = []
        for sink in (...,) if self.sinks is None else self.sinks:
            found += default() if sink is ... else [sink]
        return found

    @property
    def has_default_sinks(self) -> bool:
        """Whether the default sinks are among the sinks."""
        return self.sinks is None or ... in self.sinks

    @property
    def with_blocks(self) -> bool:
        """Whether repeated blocks are to be added: an instrument needs them, and they may be."""
        need = (Needs.BLOCKS in described(one).needs for one in self.instruments or ())
        return self.repeats and any(need)

    def completed(self, probes: Sequence[Probe], shadow: Shadow) -> list[Probe]:
        """Returns the probes, followed by the repeated blocks if they are needed and missing."""
        if self.with_blocks and not any(probe.block for probe in probes):
            return [*probes, *repeated_blocks(shadow.context or 2**31)]
        return list(probes)


def _from_file(path: str | os.PathLike[str]) -> list[Probe]:
    named = Path(path).suffix.lower() in ENDINGS
    if isinstance(path, str) and not named and not os.path.exists(path):
        raise ValueError(
            f"probes must be a list of Probe objects or the path of a file of probes "
            f"({', '.join(ENDINGS)}), and there is no file {path!r}. If it is the text of a probe, "
            f"write probes=[Probe('name', {path!r})]."
        )
    return read_probes(path)


def _check_parts(
    instruments: Sequence[Instrument], sinks: Sequence[Sink], watch: Watch | None
) -> None:
    for thing, kind in [(i, Instrument) for i in instruments] + [(s, Sink) for s in sinks]:
        if isinstance(thing, type):
            raise ValueError(f"{thing.__name__} is a class; write {thing.__name__}().")
        if thing is fast or isinstance(thing, list):
            raise ValueError(
                "instruments and sinks must be flat lists; write [*fast(), ...] with the star."
            )
        if not isinstance(thing, kind):
            parts = ("name", "taps", "read") if kind is Instrument else ("write", "close")
            raise ValueError(
                f"{thing!r} is not {'an' if kind is Instrument else 'a'} {kind.__name__}: it has "
                f"no {' and no '.join(p for p in parts if not hasattr(thing, p))}; see "
                f"help(tlens_callback.{kind.__name__})."
            )
    for instrument in instruments:
        if not _counts(every := getattr(instrument, "every", 1)):
            raise ValueError(
                f"every of {instrument.name!r} must be a whole number, 1 or more, got {every!r}."
            )
        for what in BASELINE:
            if not isinstance(kept := getattr(instrument, what, {}), dict):
                raise ValueError(
                    f"{what} of {instrument.name!r} is a dict of tensors, got {kept!r}."
                )
    names = [thing.name for thing in (*instruments, *filter(None, [watch]))]
    if wrong := [one for one in names if not isinstance(one, str) or not one or "/" in one]:
        raise ValueError(
            f"The name of an instrument or a watch is the first segment of its keys, so it must be "
            f"a text without '/' and not empty, got {wrong[0]!r}."
        )
    if twice := {one for one in names if [*names, *RESERVED].count(one) > 1}:
        raise ValueError(
            f"The name {min(twice)!r} is used twice; give one of the two another name=. No "
            f"instrument may have the watch's name, or be named {', '.join(RESERVED)}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _counts(value: Any) -> bool:
    """Whether it is a whole number, 1 or more."""
    whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)
    return whole and index(value) >= 1
