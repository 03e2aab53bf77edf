"""Hugging Face's own modules of each family, and activations replaced in them without a bridge.

For one text at a time: activations are [pos, ...].
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny

OUTPUT = {
    **dict.fromkeys(tiny.FAMILIES, "self_attn.o_proj"),
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "gptj": "attn.out_proj",
    "opt": "self_attn.out_proj",
}
"""The output matrix of attention; its input is the heads' z side by side."""

_NORMED = dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), "post_attention_layernorm")
ATTENTION = {name: path.rpartition(".")[0] for name, path in OUTPUT.items()} | _NORMED
"""What attention adds to the residual stream is the output of this module."""

MLP = {
    **dict.fromkeys(tiny.FAMILIES, "mlp"),
    **dict.fromkeys(_NORMED, "post_feedforward_layernorm"),
    "opt": "fc2",
}

Replace = Callable[[Tensor], Tensor]


def layers(model: nn.Module) -> list[Any]:
    (found,) = (
        m
        for n, m in model.named_modules()
        if n.endswith((".layers", ".h")) and len(list(m)) > 1  # type: ignore[arg-type]
    )
    return list(found)  # type: ignore[arg-type]


def module(model: nn.Module, layer: int, path: str) -> Any:
    return layers(model)[layer].get_submodule(path)


def place(family: str, model: nn.Module, part: str, layer: int) -> tuple[nn.Module, bool]:
    """The module, and whether it is its input that counts."""
    if part == "resid":
        return layers(model)[layer], True
    if part == "z":
        return module(model, layer, OUTPUT[family]), True
    return module(model, layer, (ATTENTION if part == "attn" else MLP)[family]), False


@contextmanager
def replaced(
    family: str, model: nn.Module, edits: Mapping[tuple[str, int], Replace]
) -> Iterator[None]:
    """What `(part, layer)` holds goes through a function. Parts: resid (what enters the layer),
    attn and mlp (what they add to it), z (heads side by side)."""
    handles = []

    def changed(value: Tensor, edit: Replace) -> Tensor:
        return edit(value.reshape(-1, value.shape[-1])).reshape(value.shape)

    def before(edit: Replace) -> Callable[..., Any]:
        def hook(_, args, kwargs):
            if args:
                return (changed(args[0], edit), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"], edit)}

        return hook

    def after(edit: Replace) -> Callable[..., Any]:
        def hook(_, args, output):
            if isinstance(output, tuple):
                return (changed(output[0], edit), *output[1:])
            return changed(output, edit)

        return hook

    try:
        for (part, layer), edit in edits.items():
            at, is_input = place(family, model, part, layer)
            handles.append(
                at.register_forward_pre_hook(before(edit), with_kwargs=True)
                if is_input
                else at.register_forward_hook(after(edit))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def kept(
    family: str, model: Any, tokens: Tensor, parts: list[str]
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """The logits [pos, vocab] of tokens [1, pos], and what the parts hold: [pos, width]."""
    got: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Replace:
        def edit(value: Tensor) -> Tensor:
            got[key] = value.clone()
            return value

        return edit

    keys = [(part, i) for part in parts for i in range(len(layers(model)))]
    with replaced(family, model, {key: keep(key) for key in keys}):
        return model(tokens, use_cache=False).logits[0], got
