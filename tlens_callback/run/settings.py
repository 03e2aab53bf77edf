"""What `TLensCallback` and `Tracer` are given alike: checked once, before anything runs."""

import logging
import os
import re
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

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
from tlens_callback.run.observer import Observer
from tlens_callback.run.writer import OnError, Writing
from tlens_callback.shadow import Shadow

MANY = 256
"""More probes than this are worth a word."""

logger = logging.getLogger("tlens_callback")


class Arguments:
    """The arguments that everything which watches takes; `TLensCallback` explains them.

    Raises:
        ValueError: for what cannot work, whatever the model; the text says what to do.
    """

    def __init__(
        self,
        probes: Sequence[Probe] | str | os.PathLike[str] | None,
        *,
        instruments: Sequence[Instrument] | None,
        sinks: Sequence[Sink] | None,
        watch: Watch | Literal[False] | None,
        every_n_steps: int,
        repeats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        on_error: OnError,
        writing: Writing,
        name: str,
    ) -> None:
        if not _counts(every_n_steps):
            raise ValueError(f"every_n_steps is a whole number from 1 on, got {every_n_steps!r}.")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error is 'warn' or 'raise', got {on_error!r}.")
        if writing not in ("wait", "drop_old", "inline"):
            raise ValueError(f"writing is 'wait', 'drop_old' or 'inline', got {writing!r}.")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"name is made of letters, digits, - and _, got {name!r}.")
        if isinstance(probes, str | os.PathLike):
            probes = _from_file(probes)
        for what, given in (("probes", probes), ("instruments", instruments), ("sinks", sinks)):
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(f"{what} is a list, got {type(given).__name__}: {what}=[...].")
        for probe in probes or ():
            if not isinstance(probe, Probe):
                raise ValueError(
                    f"Probes are Probe objects, got {type(probe).__name__}: {probe!r}."
                )
        if watch is not None and watch is not False and not isinstance(watch, Watch):
            raise ValueError(f"watch is a Watch, False or None, got {watch!r}.")
        self.watch = Watch() if watch is None else watch or None
        self.instruments = fast() if instruments is None else list(instruments)
        _check_parts(self.instruments, sinks or (), self.watch)
        if device is not None:
            try:
                device = torch.device(device)
            except RuntimeError as error:
                raise ValueError(f"device is one that torch knows: {error}") from error
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is a floating point torch.dtype, got {dtype!r}.")
        self.probes = None if probes is None else list(probes)
        if self.probes and len(self.probes) > MANY:
            logger.warning(
                "tlens: %d probes are many: at every observation each runs, and has readings of "
                "its own. Some dozens are what a page can show; for a test set there are other "
                "tools.",
                len(self.probes),
            )
        self.every_n_steps, self.name = every_n_steps, name
        self.device, self.dtype = device, dtype
        self.on_error: OnError = on_error
        self.writing: Writing = writing
        self.repeats = repeats and any(Needs.BLOCKS in described(i).needs for i in self.instruments)

    def observer(self, sinks: Sequence[Sink]) -> Observer:
        """One that watches as asked for."""
        return Observer(
            self.instruments,
            sinks,
            watch=self.watch,
            device=self.device,
            dtype=self.dtype,
            on_error=self.on_error,
            writing=self.writing,
        )

    def completed(self, probes: Sequence[Probe], shadow: Shadow) -> list[Probe]:
        """The probes, and the repeated blocks beside them unless they hold some."""
        if self.repeats and not any(probe.block for probe in probes):
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
        if not isinstance(memory := getattr(instrument, "memory", {}), dict):
            raise ValueError(f"memory of {instrument.name!r} is a dict of tensors, got {memory!r}.")
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
