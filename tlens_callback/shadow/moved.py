"""Tells whether a training has changed the weights since they were looked at."""

import torch
from torch import Tensor, nn

_EACH = 16
"""Numbers of each trained parameter that are kept."""


class TrainedSample:
    """Some numbers of every trained parameter, of this process' share where they are spread."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = _sample(model)

    def still(self, model: nn.Module) -> bool:
        """Whether the parameters have these numbers now, to rounding: an optimizer without a
        schedule averages the weights for an evaluation, and back."""
        return torch.allclose(self._kept, _sample(model), rtol=1e-6, atol=1e-9, equal_nan=True)


def _sample(model: nn.Module) -> Tensor:
    found = [torch.zeros(0, dtype=torch.float32)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            of = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps its share there
            of = of.to_local() if hasattr(of, "to_local") else of  # type: ignore[operator]
            found.append(of.reshape(-1)[:_EACH].float())
    device = found[-1].device
    return torch.cat([one.to(device) for one in found]).cpu()
