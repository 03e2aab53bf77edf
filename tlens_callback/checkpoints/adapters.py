"""A saved adapter put over its base: every tensor in its place, or none.

PEFT passes over tensors that have no place, and leaves at random what has no tensor.
"""

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from tlens_callback.checkpoints.files import (
    ADAPTER_CONFIG,
    adapter_config,
    adapter_weights,
    comparable,
    find,
    shapes,
    tensors,
)
from tlens_callback.shadow.refusals import refuse

logger = logging.getLogger("tlens_callback")

_IN_FILE = "base_model.model."
"""Before every name in an adapter's file."""

_TAKES_OUT = "pissa_niter", "corda", "lora_ga"
"""Ways to begin LoRA that change the base as nobody can again; PEFT 0.21 does not say so."""

Kind = tuple[dict[str, Any], dict[str, tuple[int, ...]]]


class UnknownStart(ValueError):
    """Nothing that was saved tells what the model was before training."""


def kind(adapter: str) -> Kind:
    """What two adapters over one base have in common where the one can take the other's place.

    Raises:
        ValueError: for an adapter that is not whole.
    """
    return comparable(_config(adapter).to_dict()), shapes(adapter_weights(adapter))


def put_over(model: Any, adapter: str) -> tuple[PeftModel, bool]:
    """The model with an adapter of this kind, untrained, on it. Draws from the global states.

    Returns:
        It; and whether its embeddings got as many rows as the adapter's file has: of new tokens.

    Raises:
        ValueError: where PEFT cannot do it, or not so that it comes to what was trained; and as
            `refusals.refuse`.
    """
    config = _config(adapter)
    init = str(getattr(config, "init_lora_weights", None))
    if init.startswith(_TAKES_OUT):
        raise ValueError(
            f"The adapter {adapter!r} was begun with init_lora_weights={init!r}. That takes "
            f"something out of the base, by data or by chance, and does not save it: base and "
            f"adapter do not add up to the model that was trained. Save such adapters with "
            f"save_pretrained(..., path_initial_model_for_weight_conversion=...), or merged."
        )
    config.inference_mode = False
    config.base_model_name_or_path = None  # PEFT warns of a base that has another name here.
    names = _names_of_embeddings(model)
    held = shapes(adapter_weights(adapter))
    rows = {shape[0] for name, shape in held.items() if name in names}
    try:
        resized = bool(rows) and rows != {model.get_input_embeddings().weight.shape[0]}
        if resized:
            model.resize_token_embeddings(max(rows), mean_resizing=False)
        adapted: Any = get_peft_model(model, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise misfit(adapter, error) from error
    if any(".ranknum." in n and p.requires_grad for n, p in adapted.named_parameters()):
        logger.warning(
            "tlens: over a base below float32 PEFT trains AdaLoRA's ranknum and does not save it: "
            "what is loaded from %s differs from the trained model by that.",
            adapter,
        )
    refuse(adapted)  # before what PEFT keeps in another way is found to be missing
    return adapted.eval(), resized


def misfit(adapter: str, why: object) -> ValueError:
    """Of an adapter and a base."""
    text = " ".join(str(why).split())
    return ValueError(
        f"The adapter {adapter!r} does not go over its base: {text[:300]} If it was trained over "
        f"another one, or another version, say where that is with --base (base=)."
    )


@torch.no_grad()
def fill(model: PeftModel, adapter: str, *, resized: bool) -> None:
    """Writes every tensor of the adapter into the model, in place.

    Args:
        resized: as `put_over` returned it.

    Raises:
        ValueError: where a tensor has no place in the model, another shape than its place, or
            something that is trained has no tensor.
    """
    device = next(model.parameters()).device
    weights = tensors(adapter_weights(adapter), device)
    try:
        result = set_peft_model_state_dict(model, weights)
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:
        raise misfit(adapter, f"its file lacks {error}.") from error
    except Exception as error:
        raise misfit(adapter, error) from error
    if homeless := sorted(n for n in result.unexpected_keys if not _twice(n, weights)):
        raise misfit(
            adapter, f"{len(homeless)} of its tensors have no place there, such as {homeless[0]}."
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(named[name]) for name in named.keys() - set(result.missing_keys)}
    # PEFT 0.21 never saves AdaLoRA's ranknum.
    must = {n for n, p in named.items() if p.requires_grad and ".ranknum." not in n}
    if empty := sorted(name for name in must if id(named[name]) not in filled):
        raise misfit(adapter, f"it has no tensor for {len(empty)} places, such as {empty[0]}.")
    if resized:
        held = {id(p) for part in _embeddings(model) for p in part.parameters()}
        for name, parameter in named.items():
            if id(parameter) in held - filled and ".original_module." not in name:
                raise ValueError(
                    f"The adapter {adapter!r} was trained with tokens that its base has not, and "
                    f"their rows of {name.removeprefix(_IN_FILE)} were not saved with it. Save "
                    f"such a model with save_embedding_layers=True, or merged."
                )


@torch.no_grad()
def fill_untrained(model: PeftModel, adapter: str, *, resized: bool) -> None:
    """Writes what was saved and not trained: the rows of new tokens, frozen projections.

    Raises:
        ValueError: as `fill`.
        UnknownStart: where the rows of new tokens were trained.
    """
    if resized and any(p.requires_grad for part in _embeddings(model) for p in part.parameters()):
        raise UnknownStart(
            "the embeddings of new tokens were trained, and what they started from was not saved."
        )
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    fill(model, adapter, resized=resized)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.copy_(trained[name])


@torch.no_grad()
def glance(model: nn.Module) -> Float[Tensor, "pos vocab"]:
    """The logits of a few tokens."""
    tokens = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    return model(input_ids=tokens, use_cache=False).logits[0].float()


def alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two glances differ by no more than rounding in a model of this precision."""
    n = min(one.shape[-1], other.shape[-1])  # without new tokens
    rounding = 1e-5 if dtype.itemsize > 2 else 2e-2
    return bool((one[:, :n] - other[:, :n]).abs().max() <= rounding * one.abs().max())


@contextmanager
def drawing_nothing(device: torch.device, seed: int = 0) -> Iterator[None]:
    """The random states are those of a seed inside, and outside as if nothing was drawn."""
    others = random.getstate(), np.random.get_state()
    devices = [device] if device.type in ("cuda", "xpu") else []
    kind_of_device = device.type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices, device_type=kind_of_device):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])


def _config(adapter: str) -> PeftConfig:
    adapter_config(adapter)
    file = find(adapter, ADAPTER_CONFIG)
    assert file is not None
    try:
        return PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:
        raise ValueError(
            f"PEFT cannot read {file}: {error!r}. A later version of peft may."
        ) from error


def _twice(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether it is in the file under another name as well: PEFT 0.21 saves resized embeddings
    that are trained under the names that they have inside, too, and tied ones twice.
    """
    if not {"modules_to_save", "token_adapter"}.intersection(name.split(".")):
        return False
    return any(torch.equal(t, weights[name]) for n, t in weights.items() if n != name)


def _embeddings(model: Any) -> list[nn.Module]:
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    return [part for part in parts if part is not None]


def _names_of_embeddings(model: Any) -> set[str]:
    """Of their weights, as an adapter's file names them."""
    embeddings = _embeddings(model)
    paths = [path for path, part in model.named_modules() if part in embeddings]
    ends = "weight", "base_layer.weight", "token_adapter.base_layer.weight"
    return {f"{_IN_FILE}{path}.{end}" for path in paths for end in ends}
