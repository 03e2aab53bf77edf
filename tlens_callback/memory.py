"""What instruments keep from earlier observations, beside each checkpoint of the training run."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlens_callback.probes import ProbeBatch

FILE = "tlens.safetensors"
"""Its name in a checkpoint's directory."""

Memories = Mapping[str, dict[str, Tensor]]
"""Name of an instrument -> its `memory`."""

logger = logging.getLogger("tlens_callback")


def memories(things: Iterable[object]) -> dict[str, dict[str, Tensor]]:
    """The memories of those instruments that have one, by name."""
    return {
        getattr(thing, "name"): memory  # noqa: B009
        for thing in things
        if isinstance(memory := getattr(thing, "memory", None), dict)
    }


def keep(path: Path, of: Memories, batch: ProbeBatch) -> None:
    """Writes the memories to a file, whole or not at all; nothing where nobody remembers a thing.

    Raises:
        OSError: a full disk, say.
    """
    # Cloned: safetensors refuses tensors that share storage.
    tensors = {
        f"{name}|{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, memory in of.items()
        for key, tensor in memory.items()
    }
    if not tensors:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata={"probes": _fingerprint(batch)}))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def recall(path: Path, of: Memories, batch: ProbeBatch, device: torch.device) -> None:
    """Fills the memories from a file, as far as it has them.

    Says so where it cannot: without the file, or with other probes, what is measured against the
    first observation is measured against the first after resuming.
    """
    if not of:
        return
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            if file.metadata().get("probes") != _fingerprint(batch):
                logger.warning(
                    "tlens: the probes are not those of the run that is resumed, so changes are "
                    "measured from here on."
                )
                return
            for key in file.keys():
                name, _, own = key.partition("|")
                if name in of:
                    of[name][own] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "tlens: the first observation of the run that is resumed is not in %s (%s), so changes "
            "are measured from here on.",
            *(path, error),
        )


def _fingerprint(batch: ProbeBatch) -> str:
    rows = zip(batch.tokens.tolist(), batch.lengths, strict=True)
    text = repr([(probe.name, row[:n]) for probe, (row, n) in zip(batch.probes, rows, strict=True)])
    return hashlib.sha256(text.encode()).hexdigest()
