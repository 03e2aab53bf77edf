"""`Holding`: how the shadow holds weights, and how much memory they may take by default."""

from typing import Literal, get_args

import psutil
import torch

Holding = Literal["auto", "resident", "streamed"]
"""How weights are held that cannot be borrowed from the live model."""

SHARE = 1 / 4
"""Share of the free memory that resident copies may take before layers are streamed."""


def demand_holding(weights: object) -> None:
    """Raises a ValueError for anything but one of the words of `Holding`."""
    if weights not in get_args(Holding):
        raise ValueError(f"weights must be 'auto', 'resident' or 'streamed', got {weights!r}.")


def share_of_free_memory(device: torch.device) -> float:
    """Bytes that resident copies may take before layers are streamed."""
    return SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> float:
    """Bytes of the device's memory that nobody uses; as many as one likes where it does not say.

    PyTorch keeps memory that it has freed on a CUDA device; it counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return float("inf")
