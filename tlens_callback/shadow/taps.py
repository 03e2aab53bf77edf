"""Taps: reductions of activations, which run inside one forward pass of the shadow."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.probes import ProbeBatch
from tlens_callback.shadow.stacks import Gathering, Picks, Stack, StackReduce, Taken, as_tuple
from tlens_callback.shadow.unembed import Unembedded, Unembeds, gap, pieces

LOGITS = "logits"
LAST_LOGITS = "last_logits"
OUTPUTS = (LOGITS, LAST_LOGITS)

Reduce = Callable[[Tensor], Taken]
"""Takes the activation of a hook, on the device inside the forward pass; returns few numbers."""

Taps = Mapping[Any, Reduce | StackReduce | Unembedded]
"""What an instrument reads: names of hook points, or `Stack`s of them, and how each is reduced."""


class Hooked(Unembeds, Protocol):
    """The part of a `Shadow` that taps need."""

    n_layers: int

    @property
    def streamed(self) -> bool: ...

    def hook(self, name: str) -> Any: ...

    def logits(self, tokens: Int[Tensor, "probe pos"]) -> Float[Tensor, "probe pos vocab"]: ...


def run_taps(
    shadow: Hooked,
    batch: ProbeBatch,
    taps: Sequence[Taps],
    on_error: Callable[[int, Exception], None] | None,
) -> list[dict[Any, Taken]]:
    """Does what `Shadow.run` says."""
    run = _Run(shadow, batch, taps, on_error)
    if not any(taps):
        return [{} for _ in taps]
    handles: list[tuple[Any, Any]] = []
    try:
        for name, listeners in run.listeners().items():
            point = shadow.hook(name)
            handles.append((point, point.add_hook(partial(_listen, listeners))))
        if run.reads_all_logits:
            logits = shadow.logits(batch.tokens)
            ends = logits[torch.arange(len(logits), device=logits.device), batch.last]
        else:
            logits = ends = _last_logits(shadow, batch)
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)
    run.take_outputs(logits, ends)
    run.unembed(ends)
    return run.results()


class _Run:
    """The taps of all instruments in one forward pass, and what they have returned so far."""

    def __init__(
        self,
        shadow: Hooked,
        batch: ProbeBatch,
        taps: Sequence[Taps],
        on_error: Callable[[int, Exception], None] | None,
    ) -> None:
        self._shadow, self._batch, self._taps = shadow, batch, taps
        self._on_error = on_error
        self._failed: set[int] = set()
        self._taken: list[dict[Hashable, list[Taken]]] = [{} for _ in taps]
        self._rows: dict[tuple[int, Stack], list[Tensor]] = {}
        """Residual streams that are to be unembedded, by instrument and key."""
        self._gatherings: list[tuple[Gathering, set[int]]] = []
        self._picks = Picks()
        self._end: list[Tensor] = []
        """The last layer's residual stream at the last token of the first probe."""
        self._off = batch.tokens.new_zeros((), dtype=torch.float32)

    @property
    def reads_all_logits(self) -> bool:
        """Whether the logits of every token are asked for."""
        names = [key for tap in self._taps for key in tap if isinstance(key, str)]
        return any(name == LOGITS or name.startswith("unembed") for name in names)

    def listeners(self) -> dict[str, list[Callable[[Tensor], None]]]:
        """Returns hook point -> what is called with its activation."""
        found: dict[str, list[Callable[[Tensor], None]]] = {}
        stacks: dict[tuple[Any, ...], list[tuple[int, Stack, Any]]] = {}
        for i, tap in enumerate(self._taps):
            reduce: Any
            for key, reduce in tap.items():
                if isinstance(key, Stack):
                    kind = key.end, key.layers, key.tokens is None
                    stacks.setdefault(kind, []).append((i, key, reduce))
                elif key not in OUTPUTS and self._there(i, key):
                    found.setdefault(key, []).append(partial(self._take, i, key, reduce))
        for members in stacks.values():
            own = [member for member in members if self._all_there(*member[:2])]
            if own:
                self._gather(own, found)
        last, at = f"blocks.{self._shadow.n_layers - 1}.hook_resid_post", self._batch.lengths[0]
        if [i for i, _ in self._rows if self._there(i, last)]:
            keep = self._end.append
            found.setdefault(last, []).append(lambda resid: keep(resid[:1, at - 1]))
        return found

    def _gather(
        self,
        members: Sequence[tuple[int, Stack, Any]],
        found: dict[str, list[Callable[[Tensor], None]]],
    ) -> None:
        of = [(stack, self._given(i, stack, reduce)) for i, stack, reduce in members]
        one_at_a_time = self._shadow.streamed
        gathering = Gathering(self._batch, of, self._picks, one_at_a_time=one_at_a_time)
        self._gatherings.append((gathering, {i for i, _, _ in members}))

        def take(at: int, value: Tensor) -> None:
            if self._failed.issuperset(i for i, _, _ in members):
                return
            try:
                gathering.take(at, value)
            except Exception as error:
                for i in {i for i, _, _ in members} - self._failed:
                    self._fail(i, error)

        stack = members[0][1]
        for at, hook in enumerate(stack.hooks):
            found.setdefault(hook, []).append(partial(take, at))

    def _given(
        self, i: int, stack: Stack, reduce: StackReduce | Unembedded
    ) -> Callable[[Tensor, slice], None]:
        """Returns what is to be done with each piece of a stack."""
        if not isinstance(reduce, Unembedded):
            return partial(self._take, i, stack, reduce)
        rows = self._rows.setdefault((i, stack), [])
        return lambda piece, part: rows.append(piece)

    def take_outputs(self, logits: Tensor, ends: Tensor) -> None:
        """Reduces the model's output."""
        for i, tap in enumerate(self._taps):
            for name in OUTPUTS:
                if name in tap:
                    reduce: Any = tap[name]
                    self._take(i, name, reduce, logits if name == LOGITS else ends)

    def unembed(self, ends: Float[Tensor, "probe vocab"]) -> None:
        """Reduces the logits of all residual streams that are to be unembedded."""
        asked = [key for key in self._rows if key[0] not in self._failed and self._rows[key]]
        if not asked:
            return
        rows = [torch.cat(self._rows.pop(key)).transpose(0, 1).flatten(0, 1) for key in asked]
        # With the row that is compared in front: alone it would cost as much as many together.
        try:
            for at, part, logits, lse in pieces(self._shadow, [self._end[-1], *rows]):
                if at == 0:
                    self._off = gap(logits, ends[:1])
                    continue
                i, key = asked[at - 1]
                reduce: Any = self._taps[i][key]
                self._take(i, key, reduce.reduce, logits, lse, part)
        except Exception as error:
            for i in {i for i, _ in asked} - self._failed:
                self._fail(i, error)

    def results(self) -> list[dict[Any, Taken]]:
        """Returns for each instrument what its reductions returned, in the order of its taps."""
        for gathering, members in self._gatherings:
            if (name := gathering.lacking) is not None:
                for i in members - self._failed:
                    self._fail(i, _never_reached(name))
        found: list[dict[Any, Taken]] = []
        for i, tap in enumerate(self._taps):
            found.append({})
            try:
                for key in tap if i not in self._failed else ():
                    if key not in self._taken[i]:
                        raise _never_reached(key)
                    joined = _joined(self._taken[i][key])
                    if isinstance(tap[key], Unembedded):
                        joined = (*as_tuple(joined), self._off)
                    found[i][key] = joined
            except Exception as error:
                found[i].clear()
                self._fail(i, error)
        return found

    def _take(self, i: int, key: str | Stack, reduce: Callable[..., Taken], *args: Any) -> None:
        if i in self._failed:
            return
        try:
            result = reduce(*args)
            if not all(isinstance(t, Tensor) for t in as_tuple(result)):
                raise ValueError(
                    f"The reduction on '{key}' returned {type(result).__name__}; it has to "
                    f"return a tensor or a tuple of tensors."
                )
            so_far = self._taken[i].setdefault(key, [])
            if isinstance(key, str):
                so_far.clear()
            so_far.append(result)
        except Exception as error:
            self._fail(i, error)

    def _there(self, i: int, name: str) -> bool:
        """Whether there is a hook point of this name; if not, the instrument has failed."""
        if i in self._failed:
            return False
        try:
            self._shadow.hook(name)
        except ValueError as error:
            self._fail(i, error)
            return False
        return True

    def _all_there(self, i: int, stack: Stack) -> bool:
        if i in self._failed:
            return False
        try:
            stack.demand_places(self._batch)
        except ValueError as error:
            self._fail(i, error)
            return False
        return all(self._there(i, hook) for hook in stack.hooks)

    def _fail(self, i: int, error: Exception) -> None:
        if self._on_error is None:
            raise error
        self._failed.add(i)
        self._on_error(i, error)


def _never_reached(key: object) -> ValueError:
    return ValueError(f"The forward pass never reached the hook point '{key}'.")


def _joined(pieces: Sequence[Taken]) -> Taken:
    """Returns the results of several calls as one, concatenated along the first axis."""
    some = [piece for piece in pieces if piece != ()]
    if len(some) < 2:
        return some[0] if some else ()
    if isinstance(some[0], Tensor):
        return torch.cat(some)  # type: ignore[arg-type]
    return tuple(torch.cat(parts) for parts in zip(*some, strict=True))


def _last_logits(shadow: Hooked, batch: ProbeBatch) -> Float[Tensor, "probe vocab"]:
    """Returns the logits at each probe's last token, and computes no others.

    The head gets one row per probe. `logits_to_keep` would take the same positions of every
    probe: [probe, distinct length, vocab].
    """
    model: Any = shadow.bridge.original_model
    head = model.get_output_embeddings()
    rows = batch.once("rows", lambda: torch.arange(len(batch.tokens), device=batch.tokens.device))

    def keep_last(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
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


def _listen(listeners: Sequence[Callable[[Any], None]], value: Any, hook: Any) -> None:
    """A hook that only reads; it returns nothing, because that would replace the activation."""
    del hook
    for take in listeners:
        take(value)
