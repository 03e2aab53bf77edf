"""Saves what instruments keep from earlier observations, in each checkpoint of the run."""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlens_callback.probes import ProbeBatch
from tlens_callback.run import constants
from tlens_callback.run.constants import Constants
from tlens_callback.run.printing import warn
from tlens_callback.store.atomic import write_whole

Baselines = Mapping[str, dict[str, Tensor]]
"""Name of an instrument -> its `baseline`."""

BASELINE = ("baseline", "memory")
"""The attribute of an instrument that holds what it compares with; the second name is the older
one."""


KEPT = "2"
"""The way in which the instruments of this package keep what they compare with. Another number
means that they would not find it, and would measure changes from now on without a word."""

RUN = "run"
"""Metadata of the file: the identity of the run, as sinks are told it."""

_CONSTANT = "constant"
"""Metadata: which tensors are in the file beside it that checkpoints share, with their digests."""


def of(things: Iterable[object]) -> dict[str, dict[str, Tensor]]:
    """Gives the baseline of each instrument that has one, by the instrument's name."""
    found = {}
    for thing in things:
        baseline = next((getattr(thing, what) for what in BASELINE if hasattr(thing, what)), None)
        if isinstance(baseline, dict):
            found[getattr(thing, "name")] = baseline  # noqa: B009
    return found


def conditions(batch: ProbeBatch, dtype: torch.dtype, run: str) -> dict[str, str]:
    """Returns run, probes and precision, each as text that must be equal to resume a comparison.

    Args:
        run: identifies the training run of a checkpoint.
    """
    rows = zip(batch.tokens.tolist(), batch.lengths, strict=True)
    probes = [(probe.name, row[:n]) for probe, (row, n) in zip(batch.probes, rows, strict=True)]
    return {
        "another training run": hashlib.sha256(run.encode()).hexdigest(),
        "other probes": hashlib.sha256(repr(probes).encode()).hexdigest(),
        "another precision": str(dtype),
        "another version of tlens_callback": KEPT,
    }


def run_of(path: Path | None) -> str:
    """Returns the identity of the run that wrote this file; that of a new run if there is no such
    file, or none in it."""
    known: Mapping[str, str] = {}
    if path is not None:
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            known = file.metadata() or {}
    # Not from Python's random numbers, which are the training's.
    return known.get(RUN) or secrets.token_hex(8)


def demand_tensors(held: Baselines) -> None:
    """Checks that baselines hold tensors alone, so that they can be written to a file.

    Raises:
        ValueError: where one holds something else.
    """
    for name, baseline in held.items():
        if wrong := [key for key, value in baseline.items() if not isinstance(value, Tensor)]:
            raise ValueError(
                f"{name!r} has a {type(baseline[wrong[0]]).__name__} in its baseline, as "
                f"{wrong[0]!r}; a baseline holds tensors."
            )


def tensors_of(held: Baselines) -> dict[str, Tensor]:
    """Returns the tensors of all instruments, by the keys that they have in a file."""
    each = ((name, key, one) for name, kept in held.items() for key, one in kept.items())
    return {f"{name}/{key}": tensor for name, key, tensor in each}


def write(
    path: Path, held: Baselines, about: Mapping[str, str], shared: Constants | None = None
) -> None:
    """Writes the baselines to a file, whole or not at all; removes the file if there are none.

    Args:
        about: what `conditions` returned, and the run under `RUN`.
        shared: makes a second file, `<name>.constants`, of what never changes. It is there before
            the first one, which has its digests.

    Raises:
        OSError: if the file cannot be written (the disk is full).
        ValueError: as `demand_tensors`.
    """
    demand_tensors(held)
    tensors = tensors_of(held)
    digests = shared.write(_constants_file(path), tensors) if shared is not None else {}
    # Copied: safetensors refuses tensors that share storage.
    own = {
        key: tensor.detach().to("cpu", copy=True).contiguous()
        for key, tensor in tensors.items()
        if key not in digests
    }
    if tensors:
        write_whole(path, save(own, metadata={**about, _CONSTANT: json.dumps(digests)}))
    else:
        path.unlink(missing_ok=True)


def _constants_file(path: Path) -> Path:
    return path.with_suffix(".constants")


def restore(
    path: Path,
    held: Baselines,
    about: Mapping[str, str],
    device: torch.device,
    shared: Constants | None = None,
) -> frozenset[str]:
    """Fills the baselines from a file, and returns the names of those that the file has.

    If there is no such file, or it is from another run, other probes or another precision, a
    warning is logged: changes are then measured from the first observation after resuming. The same
    holds for the instruments of which the second file has not what was written.

    Args:
        about: what `conditions` returns now.
        shared: goes on with the second file, if there is one.
    """
    if not held:
        return frozenset()
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            known = file.metadata() or {}
            other = [what for what, condition in about.items() if known.get(what) != condition]
            found = {} if other else {key: file.get_tensor(key) for key in file.keys()}
            digests = {} if other else json.loads(known.get(_CONSTANT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        warn(
            "tlens: %s cannot be read (%s). It holds what a resumed run compares its observations "
            "with; without it, changes are measured from this step on. If the trainer's checkpoint "
            "is in another directory, name it in TrainingArguments(resume_from_checkpoint=...).",
            *(path, error),
        )
        return frozenset()
    if other:
        warn(
            "tlens: %s is from %s, so changes are measured from this step on.",
            *(path, " and ".join(other)),
        )
    both, lost = found, set[str]()
    if digests:
        there, why = constants.read(_constants_file(path), digests)
        # Half of what an instrument compares with would give wrong numbers.
        lost = {_name(key) for key in digests.keys() - there.keys()}
        if told := ", ".join(sorted(lost & held.keys())):
            warn(
                "tlens: %s %s, so the changes of %s are measured from this step on.",
                *(_constants_file(path), why, told),
            )
        if not lost and shared is not None:
            shared.resume(_constants_file(path), digests, found)
        both = found | {key: tensor.to(device) for key, tensor in there.items()}
    for key, tensor in both.items():
        name, own = _name(key), key.partition("/")[2]
        if name in held and name not in lost:
            held[name][own] = tensor
    return frozenset(map(_name, both)) | lost


def _name(key: str) -> str:
    """Returns the name of the instrument that a tensor in a file belongs to."""
    return key.partition("/")[0]


def say_new(held: Baselines, recalled: frozenset[str]) -> None:
    """Warns of instruments that keep something for which a resumed run found nothing.

    Args:
        recalled: what `restore` returned.
    """
    for name, one in held.items():
        if recalled and one and name not in recalled:
            warn(
                "tlens: the checkpoint holds nothing for %r, which therefore measures changes from "
                "this step on.",
                name,
            )
