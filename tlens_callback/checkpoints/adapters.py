"""Puts a saved adapter on its base, and fails unless every tensor finds its place.

PEFT alone ignores tensors that have no place, and leaves places without a tensor at random values.
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
"""The prefix of every name in an adapter's file."""

_CHANGES_BASE = "pissa_niter", "corda", "lora_ga"
"""Initialisations of LoRA that change the base and cannot be repeated; PEFT 0.21 gives no hint."""

Kind = tuple[dict[str, Any], dict[str, tuple[int, ...]]]


class UnknownStart(ValueError):
    """Raised if the saved files do not determine the model before training."""


def adapter_kind(adapter: str) -> Kind:
    """Returns what decides which model an adapter fits: its config and its shapes.

    Two adapters of one kind fit the same model: either can be loaded in the place of the other.

    Raises:
        ValueError: if the adapter is incomplete.
    """
    return comparable(_config(adapter).to_dict()), shapes(adapter_weights(adapter))


def add_adapter(model: Any, adapter: str) -> tuple[PeftModel, bool]:
    """Adds an untrained adapter of the saved adapter's kind to a model.

    Draws from the global random states.

    Returns:
        The adapted model; and whether its embeddings were resized to the rows in the adapter's
        file, which has more of them if there are new tokens.

    Raises:
        ValueError: if PEFT cannot add the adapter, or the result would not be the model that was
            trained; and as `refusals.refuse`.
    """
    config = _config(adapter)
    init = str(getattr(config, "init_lora_weights", None))
    if init.startswith(_CHANGES_BASE):
        raise ValueError(
            f"The adapter {adapter!r} was initialised with init_lora_weights={init!r}. This "
            f"subtracts something from the base that depends on data or on chance, and does not "
            f"save it, so base and adapter do not add up to the model that was trained. Save such "
            f"adapters with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            f"or merged."
        )
    config.inference_mode = False
    config.base_model_name_or_path = None  # otherwise PEFT warns if the base has another name
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
            "tlens: if the base is below float32, PEFT trains AdaLoRA's ranknum and does not save "
            "it, so what is loaded from %s differs from the trained model by the ranknum.",
            adapter,
        )
    # Refuse here, before `fill` reports tensors as missing that PEFT only keeps in another form.
    refuse(adapted)
    return adapted.eval(), resized


def misfit(adapter: str, why: object) -> ValueError:
    """Makes the error for an adapter that does not fit its base."""
    text = " ".join(str(why).split())
    return ValueError(
        f"The adapter {adapter!r} does not fit its base: {text[:300]} If it was trained on "
        f"another base, or another version of it, name that one with --base (base=)."
    )


@torch.no_grad()
def fill(model: PeftModel, adapter: str, *, resized: bool) -> None:
    """Writes every tensor of the adapter into the model, in place.

    Args:
        resized: as `add_adapter` returned it.

    Raises:
        ValueError: if a tensor has no place in the model or does not have the shape of its place,
            or a trained parameter has no tensor.
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
    if homeless := sorted(n for n in result.unexpected_keys if not _is_duplicate(n, weights)):
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
                    f"The adapter {adapter!r} was trained with tokens that its base does not have, "
                    f"and their rows of {name.removeprefix(_IN_FILE)} were not saved with it. Save "
                    f"such a model with save_embedding_layers=True, or merged."
                )


@torch.no_grad()
def fill_untrained(model: PeftModel, adapter: str, *, resized: bool) -> None:
    """Writes only the saved tensors that were not trained: rows of new tokens, frozen projections.

    Raises:
        ValueError: as `fill`.
        UnknownStart: if the rows of new tokens were trained.
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
def sample_logits(model: nn.Module) -> Float[Tensor, "pos vocab"]:
    """The logits of a few fixed tokens, by which two models can be told apart."""
    tokens = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    return model(input_ids=tokens, use_cache=False).logits[0].float()


def equal_to_rounding(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results of `sample_logits` differ only by rounding in this precision."""
    n = min(one.shape[-1], other.shape[-1])  # without new tokens
    rounding = 1e-5 if dtype.itemsize > 2 else 2e-2
    return bool((one[:, :n] - other[:, :n]).abs().max() <= rounding * one.abs().max())


@contextmanager
def random_states_kept(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Seeds the random states inside the block, and restores them at its end."""
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
            f"PEFT cannot read {file}: {error!r}. A later version of peft may be able to."
        ) from error


def _is_duplicate(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is in the file under another name as well.

    PEFT 0.21 saves trained resized embeddings a second time, under their names inside the wrapper,
    and saves tied ones twice.
    """
    if not {"modules_to_save", "token_adapter"}.intersection(name.split(".")):
        return False
    return any(torch.equal(t, weights[name]) for n, t in weights.items() if n != name)


def _embeddings(model: Any) -> list[nn.Module]:
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    return [part for part in parts if part is not None]


def _names_of_embeddings(model: Any) -> set[str]:
    """The names that an adapter's file may use for the weights of the embeddings."""
    embeddings = _embeddings(model)
    paths = [path for path, part in model.named_modules() if part in embeddings]
    ends = "weight", "base_layer.weight", "token_adapter.base_layer.weight"
    return {f"{_IN_FILE}{path}.{end}" for path in paths for end in ends}
