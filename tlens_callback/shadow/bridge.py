"""Builds TransformerLens's bridge; no other module imports TransformerLens."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

# Importing the bridge sets the logger "transformers" to ERROR and adds a warning filter
# (transformer-lens 4.3.0). Both belong to the training process, so they are restored here.
# get_verbosity() makes transformers configure its logger first, so that there is a level to save.
transformers.logging.get_verbosity()
_level = logging.getLogger("transformers").level
_filters = list(warnings.filters)
try:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.generalized_components.normalization import (
        NormalizationBridge,
    )
    from transformer_lens.model_bridge.sources import build_bridge_from_module
finally:
    logging.getLogger("transformers").setLevel(_level)
    warnings.filters[:] = _filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]

__all__ = [
    "SplitCopy",
    "TransformerBridge",
    "build",
    "quieten_norms",
    "round_rotated",
    "split_copies",
]


class SplitCopy(NamedTuple):
    """`copy` holds `source[rows]`, both of one layer, and must follow when `source` changes."""

    layer: int
    copy: Tensor
    source: Tensor
    rows: Tensor


def build(skeleton: nn.Module, device: torch.device) -> TransformerBridge:
    """Builds a raw bridge over `skeleton`, and leaves the random states as they were.

    Splitting a fused QKV constructs linear layers, which draw from the global generators.

    Raises:
        ValueError: if the bridge has no adapter for the class of the skeleton.
    """
    with _random_state_kept(device), _no_library_demanded():
        name = type(skeleton).__name__
        try:
            return build_bridge_from_module(skeleton, name, hf_config=skeleton.config)
        except ValueError as error:
            if "Unsupported architecture" not in str(error):
                raise
            raise ValueError(
                f"transformer-lens {version('transformer-lens')} has no adapter for this class."
            ) from error


def round_rotated(bridge: TransformerBridge, dtype: torch.dtype) -> None:
    """Rounds rotated queries and keys to the model's precision, as OLMo 2 does.

    OLMo 2's rotary embedding computes in float32 and rounds afterwards. The bridge does not round,
    and then cannot multiply queries and keys with values in half precision (transformer-lens
    4.3.0).
    """
    if dtype != torch.float32:
        for name, point in bridge.hook_dict.items():
            if name.endswith(("attn.hook_rot_q", "attn.hook_rot_k")):
                point.add_hook(lambda tensor, hook: tensor.to(dtype), is_permanent=True)


def quieten_norms(bridge: TransformerBridge) -> None:
    """Lets a norm compute what its hook points show only where somebody listens to them.

    The bridge's norms compute scale and normalised input in any case, beside the output, which is
    the norm's own: ten kernels a layer more than the model has (transformer-lens 4.3.0).
    """
    for norm in bridge.modules():
        if isinstance(norm, NormalizationBridge):
            with_hooks = norm._hf_autograd_forward_with_hooks
            quiet = partial(_quiet_norm, norm, with_hooks)
            object.__setattr__(norm, "_hf_autograd_forward_with_hooks", quiet)


def _quiet_norm(
    norm: NormalizationBridge, with_hooks: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    own = norm.original_component
    points = norm.hook_scale, norm.hook_normalized
    if own is None or any(point.fwd_hooks or point.bwd_hooks for point in points):
        return with_hooks(x)
    result = own(x)
    return result if result.dtype == x.dtype else result.to(x.dtype)


def split_copies(bridge: TransformerBridge) -> list[SplitCopy]:
    """Finds the split query, key and value tensors that are copies of a fused tensor, not views.

    The bridge of GPT-NeoX and Falcon interleaves heads when it splits, and so has to copy. The
    row order is learned by splitting a layer whose rows are numbered.
    """
    copies: list[SplitCopy] = []
    for layer, block in bridge.blocks_with("attn"):
        attn = block.attn
        if not hasattr(attn, "split_qkv_matrix"):
            continue
        fused = attn.qkv.original_component
        storages = {
            t.untyped_storage().data_ptr() for t in (fused.weight, fused.bias) if t is not None
        }
        split = [attn.q.original_component, attn.k.original_component, attn.v.original_component]
        if all(part.weight.untyped_storage().data_ptr() in storages for part in split):
            continue
        with _random_state_kept(fused.weight.device):
            numbered = attn.split_qkv_matrix(_parent_of(attn.qkv.name, _row_numbers(fused)))
        for part, numbers in zip(split, numbered, strict=True):
            rows = numbers.weight[:, 0].round().long().to(fused.weight.device)
            copies.append(SplitCopy(layer, part.weight, fused.weight, rows))
            if part.bias is not None:
                copies.append(SplitCopy(layer, part.bias, fused.bias, rows))
    return copies


def refresh(copies: Iterable[SplitCopy]) -> None:
    """Brings every split copy up to date, with one gather each and no allocation."""
    for _, own, source, rows in copies:
        torch.index_select(source.detach(), 0, rows, out=own.detach())


@contextmanager
def _no_library_demanded() -> Iterator[None]:
    """Puts aside that adapters for images and text demand libraries that load images.

    The adapters of Qwen's models want torchvision (transformer-lens 4.3.0), which neither the live
    model nor a text needs.
    """
    name = "_check_required_libraries"
    demand = vars(ArchitectureAdapter).get(name)
    if demand is None:
        yield
        return
    setattr(ArchitectureAdapter, name, lambda self: None)
    try:
        yield
    finally:
        setattr(ArchitectureAdapter, name, demand)


def _row_numbers(fused: nn.Module) -> nn.Module:
    """A layer shaped like `fused` whose row i is filled with i."""
    layer = copy.copy(fused)
    layer.__dict__ = dict(fused.__dict__)
    weight = fused._parameters["weight"]
    assert weight is not None
    rows = torch.arange(weight.shape[0], dtype=torch.float64, device=weight.device)
    parameters = {"weight": rows[:, None].expand(weight.shape).contiguous(), "bias": rows.clone()}
    layer.__dict__["_parameters"] = {
        name: None if old is None else nn.Parameter(parameters[name], requires_grad=False)
        for name, old in fused._parameters.items()
    }
    return layer


def _parent_of(name: str, child: nn.Module) -> nn.Module:
    parent = nn.Module()
    setattr(parent, name, child)
    return parent


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
