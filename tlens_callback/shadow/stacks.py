"""`Stack`: taps that read an activation of several layers in one tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlens_callback.probes import ProbeBatch

Taken = Tensor | tuple[Tensor, ...]
"""The result of one reduction, on the CPU, with floating point numbers as float32."""

StackReduce = Callable[[Tensor, slice], Taken]
"""Takes [layer, ...] and which of the stack's layers these are; returns few numbers."""

_ON_CPU, _ELSEWHERE = 2**22, 2**28
"""Bytes that are reduced together: on a CPU what its caches hold, else as much as saves kernels."""


@dataclass(frozen=True)
class Stack:
    """A key of `taps` beside the names of hook points: one activation of several layers.

    The reduction gets the activations of some layers in one tensor, [layer, row, ...] or
    [layer, token, ...], and a slice that says which of `layers` they are. It is called for a few
    layers at a time, in order, and must not change the tensor. What it returns is concatenated over
    the calls along the first axis; an empty tuple adds nothing. So a GPU starts few kernels, and
    what several instruments read is gathered once.

    In a shadow with streamed weights each call has one layer, which has its weights then.

    Attributes:
        end: name of the hook point in its layer, such as "attn.hook_pattern"; or several names of
            hook points of one shape, which are stacked, too: [layer, end, ...].
        layers: numbers of layers, ascending.
        rows: rows of the batch; None: all.
        tokens: places of tokens in the flattened batch, probe * width + pos. If they are given, the
            first two axes of the activation, [probe, pos, ...], become [token, ...].
    """

    end: str | tuple[str, ...]
    layers: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None

    @property
    def hooks(self) -> list[str]:
        """Names of the hook points, layer by layer."""
        ends = (self.end,) if isinstance(self.end, str) else self.end
        return [f"blocks.{layer}.{end}" for layer in self.layers for end in ends]

    def demand_places(self, batch: ProbeBatch) -> None:
        """Raises a ValueError if there is nothing to stack, or a place that the batch has not."""
        n = len(_every(self, batch))
        places = _places(self, n)
        if not self.layers or not places or not 0 <= min(places) <= max(places) < n:
            what = "rows" if self.tokens is None else "places of tokens"
            raise ValueError(
                f"A Stack of {self.end!r} needs layers, and {what} from 0 to {n - 1}, got layers "
                f"{self.layers} and {places}."
            )

    def __str__(self) -> str:
        return self.hooks[0].replace(f".{self.layers[0]}.", ".{layer}.")


Member = tuple[Stack, Callable[[Tensor, slice], None]]
"""A stack, and what is to be called with each of its pieces."""


class Gathering:
    """Gathers, for all stacks of one activation, what any of them reads, and gives each its own.

    Args:
        members: stacks of the same activation, layers and kind.
        picks: what all gatherings of a forward pass have picked from one activation.
        one_at_a_time: whether each layer is given out by itself.
    """

    def __init__(
        self, batch: ProbeBatch, members: Sequence[Member], picks: "Picks", *, one_at_a_time: bool
    ) -> None:
        first = members[0][0]
        self.hooks, self.by_token = first.hooks, first.tokens is not None
        self._ends = () if isinstance(first.end, str) else (len(first.end),)
        n = len(_every(first, batch))
        of = tuple(_places(stack, n) for stack, _ in members)
        self._n, self._picked, self._own = batch.once(
            ("gathering", n, of), lambda: _plan(of, n, batch)
        )
        self._give, self._picks = [give for _, give in members], picks
        self._one_at_a_time = one_at_a_time
        self._held: dict[int, Tensor] = {}
        """The activations, of those that are to be given out together, that are there already."""
        self._versions: dict[int, int] = {}
        self._start = self._stop = 0  # the hook points of these

    def take(self, at: int, value: Tensor) -> None:
        """Takes the activation of the `at`-th hook point.

        Raises:
            ValueError: if the layers do not come in order, each once, or one of their activations
                was changed after it was taken.
        """
        if not self._held:
            self._stop = self._start + self._together(value)
        if not self._start <= at < self._stop or at in self._held:
            raise ValueError(
                f"{self.hooks[at]!r} was reached out of order or twice in one forward pass, so "
                f"that the activations of the layers cannot be stacked."
            )
        self._held[at] = self._picks.of(value, self._picked, by_token=self.by_token)
        # What is picked by an index is a copy; anything else is still the model's own.
        if not isinstance(self._picked, Tensor) and not value.is_inference():
            self._versions[at] = value._version
        if len(self._held) == self._stop - self._start:
            self._flush()

    @property
    def lacking(self) -> str | None:
        """Name of the first hook point that was not reached; None if all were."""
        at = (at for at in range(self._start, len(self.hooks)) if at not in self._held)
        return self.hooks[first] if (first := next(at, None)) is not None else None

    def _together(self, value: Tensor) -> int:
        """Returns how many activations are given out together, of whole layers."""
        n_ends, left = math.prod(self._ends), len(self.hooks) - self._start
        limit = _ON_CPU if value.device.type == "cpu" else _ELSEWHERE
        copied = isinstance(self._picked, Tensor)
        one = self._n * value[:1].numel() if copied else value.numel()
        if self.by_token and copied:
            one //= value.shape[1]
        layers = limit // max(1, n_ends * one * value.element_size())
        return min(left, n_ends * max(1, 1 if self._one_at_a_time else layers))

    def _flush(self) -> None:
        held, self._held = [self._held[at] for at in range(self._start, self._stop)], {}
        for at, version in self._versions.items():
            if held[at - self._start]._version != version:
                raise ValueError(f"{self.hooks[at]!r} was changed in place by the model.")
        self._versions.clear()
        n_ends = math.prod(self._ends)
        part = slice(self._start // n_ends, self._stop // n_ends)
        stacked = torch.stack(held) if len(held) > 1 else held[0][None]
        stacked = stacked.unflatten(0, (-1, *self._ends)) if self._ends else stacked
        self._start = self._stop
        for own, give in zip(self._own, self._give, strict=True):
            give(stacked if own is None else _pick(stacked, own, 1 + len(self._ends)), part)


class Picks:
    """Picks places of an activation, once for all that ask for the same ones."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._found: dict[tuple[int, bool], Tensor] = {}

    def of(self, value: Tensor, within: "_Within", *, by_token: bool) -> Tensor:
        if not isinstance(within, Tensor):
            return _pick(value.flatten(0, 1) if by_token else value, within)
        if value is not self._value:
            self._value, self._found = value, {}
        if (key := (id(within), by_token)) not in self._found:
            self._found[key] = _pick(value.flatten(0, 1) if by_token else value, within)
        return self._found[key]


_Within = slice | Tensor | None
"""Where some places are among others: a run of them, an index, or all of them."""


def _every(stack: Stack, batch: ProbeBatch) -> range:
    return range(len(batch.tokens) if stack.tokens is None else batch.tokens.numel())


def _places(stack: Stack, n: int) -> tuple[int, ...]:
    places = stack.tokens if stack.tokens is not None else stack.rows
    return tuple(range(n)) if places is None else places


def _plan(
    of: Sequence[tuple[int, ...]], n: int, batch: ProbeBatch
) -> tuple[int, _Within, list[_Within]]:
    """Returns how many places are read at all, where they are, and where each one's are in them."""
    union = tuple(sorted(set().union(*of)))
    every, device = tuple(range(n)), batch.tokens.device
    # The same index for the same places, so that they are picked once.
    picked = batch.once(("places", n, union), lambda: _within(union, every, device))
    return len(union), picked, [_within(places, union, device) for places in of]


def _within(some: tuple[int, ...], among: tuple[int, ...], device: torch.device) -> _Within:
    if some == among:
        return None
    start = among.index(some[0])
    if among[start : start + len(some)] == some:
        return slice(start, start + len(some))
    where = {place: i for i, place in enumerate(among)}
    return torch.tensor([where[place] for place in some], device=device)


def _pick(value: Tensor, within: _Within, dim: int = 0) -> Tensor:
    if within is None:
        return value
    if isinstance(within, slice):
        return value.narrow(dim, within.start, within.stop - within.start)
    return value.index_select(dim, within)


def as_tuple(value: Taken) -> tuple[Tensor, ...]:
    """Returns the result of a reduction as a tuple, also if it is a single tensor."""
    return value if isinstance(value, tuple) else (value,)
