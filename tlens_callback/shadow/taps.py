"""Taps: reductions of activations, which run inside one forward pass of the shadow."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tlens_callback.probes import ProbeBatch

LOGITS = "logits"
LAST_LOGITS = "last_logits"
OUTPUTS = (LOGITS, LAST_LOGITS)

Taken = Tensor | tuple[Tensor, ...]
"""The result of one reduction, on the CPU, with floating point numbers as float32."""

Reduce = Callable[[Tensor], Taken]
"""Takes the activation of a hook, on the device inside the forward pass; returns few numbers."""


class Hooked(Protocol):
    """The part of a `Shadow` that taps need."""

    bridge: Any

    def hook(self, name: str) -> nn.Module: ...

    def logits(self, tokens: Int[Tensor, "probe pos"]) -> Float[Tensor, "probe pos vocab"]: ...


def run_taps(
    shadow: Hooked,
    batch: ProbeBatch,
    taps: Sequence[Mapping[str, Reduce]],
    on_error: Callable[[int, Exception], None] | None,
) -> list[dict[str, Taken]]:
    """Does what `Shadow.run` says."""
    taken: list[dict[str, Taken]] = [{} for _ in taps]
    failed: set[int] = set()

    def fail(i: int, error: Exception) -> None:
        if on_error is None:
            raise error
        failed.add(i)
        on_error(i, error)

    def take(i: int, name: str, reduce: Reduce, value: Tensor) -> None:
        if i in failed:
            return
        try:
            result = reduce(value)
            if not all(isinstance(t, Tensor) for t in as_tuple(result)):
                raise ValueError(
                    f"The reduction on {name!r} returned {type(result).__name__}; it has to "
                    f"return a tensor or a tuple of tensors."
                )
            taken[i][name] = result
        except Exception as error:
            fail(i, error)

    plan = [(i, name, reduce) for i, tap in enumerate(taps) for name, reduce in tap.items()]
    if not plan:
        return taken
    handles = []
    try:
        for i, name, reduce in plan:
            if name not in OUTPUTS and i not in failed:
                try:
                    point: Any = shadow.hook(name)
                except ValueError as error:
                    fail(i, error)
                    continue
                handles.append((point, point.add_hook(partial(_listen, take, i, name, reduce))))
        if any(name == LOGITS or name.startswith("unembed") for _, name, _ in plan):
            logits = shadow.logits(batch.tokens)
            ends = logits[torch.arange(len(logits), device=logits.device), batch.last]
        else:
            logits = ends = _last_logits(shadow, batch)
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)
    for i, name, reduce in plan:
        if name in OUTPUTS:
            take(i, name, reduce, logits if name == LOGITS else ends)
    for i, name, _ in plan:
        if i not in failed and name not in taken[i]:
            fail(i, ValueError(f"The forward pass never reached the hook point {name!r}."))
    return [
        {} if i in failed else {name: got[name] for name in tap}
        for i, (tap, got) in enumerate(zip(taps, taken, strict=True))
    ]


def _last_logits(shadow: Hooked, batch: ProbeBatch) -> Float[Tensor, "probe vocab"]:
    """Returns the logits at each probe's last token, and computes no others.

    The head gets one row per probe. `logits_to_keep` would take the same positions of every
    probe: [probe, distinct length, vocab].
    """
    model: Any = shadow.bridge.original_model
    head = model.get_output_embeddings()
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)

    def keep_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (hidden[rows, batch.last][:, None], *rest)

    handle = None if head is None else head.register_forward_pre_hook(keep_last)
    try:
        logits = shadow.logits(batch.tokens)
    finally:
        if handle is not None:
            handle.remove()
    # A model that does not call its head through its module has computed all of them.
    return logits[:, 0] if logits.shape[1] == 1 else logits[rows, batch.last]


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns the result of a reduction as a tuple, also if it is a single tensor."""
    return value if isinstance(value, tuple) else (value,)


def _listen(
    take: Callable[..., None], i: int, name: str, reduce: Reduce, value: Any, hook: Any
) -> None:
    """A hook that only reads; it returns nothing, because that would replace the activation."""
    del hook
    take(i, name, reduce, value)
