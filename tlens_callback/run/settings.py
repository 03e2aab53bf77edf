"""`Settings`: what `TLensCallback`, `Tracer` and the observer are given alike."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from operator import index
from pathlib import Path
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
from tlens_callback.run.baselines import BASELINE
from tlens_callback.run.writer import OnError, Writing
from tlens_callback.shadow import Shadow

MANY = 256
"""More probes than this are worth a word."""

logger = logging.getLogger("tlens_callback")


class Options(TypedDict, total=False):
    """The fields of `Settings` but the probes, for editors and type checkers."""

    instruments: Sequence[Instrument] | None
    sinks: Sequence[Sink] | None
    watch: Watch | Literal[False] | None
    every_n_steps: int
    repeats: bool
    device: torch.device | str | None
    dtype: torch.dtype | None
    on_error: OnError
    writing: Writing
    name: str


@dataclass(frozen=True)
class Settings:
    """What is watched, and how: checked once, before anything runs.

    Args:
        probes: what to ask, or the path of a file that `read_probes` reads. None: the first rows
            of the training data.
        instruments: what to measure. None: the fast ones, `tlens_callback.instruments.fast()`,
            as far as the model has what they read.
        sinks: where readings go, in this order. None: a local store `<output_dir>/<name>`, the
            active W&B run if there is one, and in a Hugging Face trainer trackio and TensorBoard
            where `report_to` has them; for TensorBoard `<name>` in the folder of the trainer's own
            events.
        watch: what to raise events about: heads that take or lose a role, collapsing entropy, and
            rules of your own. None: `Watch()`. False: nothing.
        every_n_steps: optimizer steps between two observations.
        repeats: False leaves out the repeated random blocks of three lengths that are added for
            instruments that need them, such as `HeadScores`, unless there are repeated blocks among
            the probes.
        device: where to put the shadow. None: beside the model, sharing every weight that no
            adapter changes. Another device holds a full copy.
        dtype: precision of the shadow; None: the model's. `torch.float32` for a bfloat16 model
            shows changes below bfloat16's rounding, at 4 bytes for every parameter.
        on_error: "warn": an instrument or sink that fails during training is reported once and
            set aside. "raise": it raises.
        writing: "wait": the sinks write on a thread of their own, and training waits for them only
            where two observations wait already. "drop_old": it never waits, and the older of the
            two is dropped and counted. "inline": the sinks write on the training thread.
        name: tells several watchers of one training apart: it is the directory of the default
            local store, the section in W&B and the others, and the file `<name>.memory` in each
            checkpoint, with what later observations of a resumed run are compared with.

    Raises:
        ValueError: for what cannot work, whatever the model; the text says what to do.
    """

    probes: Sequence[Probe] | str | os.PathLike[str] | None = None
    _: KW_ONLY
    instruments: Sequence[Instrument] | None = None
    sinks: Sequence[Sink] | None = None
    watch: Watch | Literal[False] | None = None
    every_n_steps: int = 100
    repeats: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    on_error: OnError = "warn"
    writing: Writing = "wait"
    name: str = "tlens"

    def __post_init__(self) -> None:
        if not _counts(self.every_n_steps):
            raise ValueError(
                f"every_n_steps is a whole number from 1 on, got {self.every_n_steps!r}."
            )
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"on_error is 'warn' or 'raise', got {self.on_error!r}.")
        if self.writing not in ("wait", "drop_old", "inline"):
            raise ValueError(f"writing is 'wait', 'drop_old' or 'inline', got {self.writing!r}.")
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"name is made of letters, digits, - and _, got {self.name!r}.")
        probes: Any = self.probes
        if isinstance(probes, str | os.PathLike):
            probes = _from_file(probes)
        for what, given in (
            ("probes", probes),
            ("instruments", self.instruments),
            ("sinks", self.sinks),
        ):
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(f"{what} is a list, got {type(given).__name__}: {what}=[...].")
        for probe in probes or ():
            if not isinstance(probe, Probe):
                raise ValueError(
                    f"Probes are Probe objects, got {type(probe).__name__}: {probe!r}."
                )
        watch: Any = Watch() if self.watch is None else self.watch
        if watch is not False and not isinstance(watch, Watch):
            raise ValueError(f"watch is a Watch, False or None, got {watch!r}.")
        instruments = fast() if self.instruments is None else list(self.instruments)
        _check_parts(instruments, self.sinks or (), watch or None)
        device: Any = self.device
        if device is not None:
            try:
                device = torch.device(device)
            except RuntimeError as error:
                raise ValueError(f"device is one that torch knows: {error}") from error
        dtype: Any = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is a floating point torch.dtype, got {dtype!r}.")
        if probes and len(probes) > MANY:
            logger.warning(
                "tlens: %d probes are many: at every observation each runs, and has readings of "
                "its own. Some dozens are what a page can show; for a test set there are other "
                "tools.",
                len(probes),
            )
        # What was left open is chosen here, once: a watch has a baseline.
        chosen = {"instruments": instruments, "watch": watch, "device": device}
        chosen["probes"] = None if probes is None else list(probes)
        for field, value in chosen.items():
            object.__setattr__(self, field, value)

    @property
    def prompts(self) -> list[Probe] | None:
        """The probes that were given, as a list; None where none were."""
        assert self.probes is None or isinstance(self.probes, list)
        return self.probes

    @property
    def with_blocks(self) -> bool:
        """Whether an instrument needs repeated blocks, and they may be added."""
        need = (Needs.BLOCKS in described(one).needs for one in self.instruments or ())
        return self.repeats and any(need)

    def completed(self, probes: Sequence[Probe], shadow: Shadow) -> list[Probe]:
        """The probes, and the repeated blocks beside them unless they hold some."""
        if self.with_blocks and not any(probe.block for probe in probes):
            return [*probes, *repeated_blocks(shadow.context or 2**31)]
        return list(probes)


def _from_file(path: str | os.PathLike[str]) -> list[Probe]:
    named = Path(path).suffix.lower() in ENDINGS
    if isinstance(path, str) and not named and not os.path.exists(path):
        raise ValueError(
            f"probes is a list of Probe objects or a file of them ({', '.join(ENDINGS)}), and "
            f"there is no file {path!r}. For a text: probes=[Probe('name', {path!r})]."
        )
    return read_probes(path)


def _check_parts(
    instruments: Sequence[Instrument], sinks: Sequence[Sink], watch: Watch | None
) -> None:
    for thing, kind in [(i, Instrument) for i in instruments] + [(s, Sink) for s in sinks]:
        if isinstance(thing, type):
            raise ValueError(f"{thing.__name__} is a class; write {thing.__name__}().")
        if thing is fast or isinstance(thing, list):
            raise ValueError("A list stands in the list; write [*fast(), ...] with its star.")
        if not isinstance(thing, kind):
            raise ValueError(
                f"{thing!r} is not {'an' if kind is Instrument else 'a'} {kind.__name__}: it "
                f"lacks the methods of tlens_callback.interfaces.{kind.__name__}."
            )
    for instrument in instruments:
        if not _counts(every := getattr(instrument, "every", 1)):
            raise ValueError(
                f"every of {instrument.name!r} is a whole number from 1 on, got {every!r}."
            )
        for what in BASELINE:
            if not isinstance(kept := getattr(instrument, what, {}), dict):
                raise ValueError(
                    f"{what} of {instrument.name!r} is a dict of tensors, got {kept!r}."
                )
    names = [thing.name for thing in (*instruments, *filter(None, [watch]))]
    if wrong := [one for one in names if not isinstance(one, str) or not one or "/" in one]:
        raise ValueError(
            f"The name of an instrument or of the watch is the first segment of its keys, without "
            f"a '/', got {wrong[0]!r}."
        )
    if twice := {one for one in names if [*names, *RESERVED].count(one) > 1}:
        raise ValueError(
            f"Two instruments are named {min(twice)!r}; give one of them another name=. "
            f"{', '.join(RESERVED)} and the watch's name are taken."
        )


def _counts(value: Any) -> bool:
    """Whether it is a whole number from 1 on."""
    whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)
    return whole and index(value) >= 1
