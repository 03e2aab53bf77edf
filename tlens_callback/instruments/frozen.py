"""Checks whether frozen weights have changed, and how far."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.sources import Weight
from tlens_callback.shadow.weights import adapted_leaves

_STEP = -7046029254386353131
"""The odd number nearest to 2^64 divided by the golden ratio, as a signed number."""

_SAMPLE = 4096
"""Most entries of a weight that are kept, to tell how far it has moved."""

_WRITTEN = (
    "frozen weights of the base model have changed since the start: something writes to weights "
    "that should not be trained"
)

_DRIFTED = (
    "frozen weights of the base model, all of them under adapters, have moved by more than "
    "rounding: this is what remains after the adapters have been merged into them and taken out "
    "again many times, as TRL does for generation with vLLM. frozen_weights/largest_change says "
    "how far; base weights in float32 move far less"
)

_SUM, _ENTRIES = "words of ", "entries of "
"""What the keys of a weight's checksum and of its entries in the baseline begin with."""

_IN_CACHE = 2**15
"""Words of eight bytes that are summed at a time on a CPU: 256 KiB."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class FrozenWeights:
    """Counts the frozen weights whose bits have changed since the first observation, and measures
    how far they have moved.

    Frozen are the live model's own parameters with requires_grad False: the base weights under
    adapters, but not the adapters themselves. A checksum of each weight's bits is compared with
    that at the first observation at which the weight was frozen. Let x[r, c] be the bits of a
    weight's matrix (leading dimensions flattened), eight bytes at a time, as signed integers; or
    one entry at a time, if a row has not a multiple of eight bytes. Let g be the odd number nearest
    to 2^64 divided by the golden ratio, m_i = 1 + 2 i g mod 2^64, and mix(s) = s xor (s >> 32). The
    checksum is the two numbers

        sum_r m_r mix(sum_c x[r, c]),  sum_c m_c mix(sum_r x[r, c])  mod 2^64.

    One changed entry always changes the first number, since mix is one-to-one and m_r is odd. A
    change that keeps the sum of every row and of every column is not seen; any other change is
    missed with a chance of about 2^-64. NaN and -0 are compared by their bits like other numbers.

    How far a changed weight has moved is measured on a sample of its entries: of n > 4096 entries
    those with the numbers (i g) mod n, i = 0..4095, where i g is a signed number of 64 bits that
    wraps around; else all. Over the sample, with w the weight now, w0 the weight at the first
    observation at which it was frozen, and s the root mean square of w0 (of w if w0 is zero),

        change = max_i |w_i - w0_i| / s.

    The sample can miss a change of a few entries, which the checksum finds: then the weight counts
    as changed, and its change is 0.

    Some trainers merge adapters into the base weights and take them out again, as TRL does for
    generation with vLLM. Each time rounds the base weights. So a change looks like merging if all
    changed weights have adapters, at least half of the weights with adapters have changed, and no
    adapter is merged at this moment. Then a changed weight counts as rounded if all entries of its
    sample satisfy

        |w_i - w0_i| <= sqrt(eps) / 4 * max(|w0_i|, s),

    else as drifted; eps is that of the weight's dtype. Merging once moves an entry by about eps at
    most. Merging k times, with training in between, moves it by about sqrt(k) eps: in bfloat16
    (eps 8e-3) ten times can be more than rounding, and the drift goes on; in float32 (eps 1e-7) it
    takes at least thousands. If the changes do not look like merging, all changed weights count as
    written. Rounding raises no event. Drifted weights raise one that names the merging, and written
    weights raise another.

    While adapters are merged into base weights, these count as changed and as written.

    Layers may be trained in turns (LISA, gradual unfreezing), also between two observations. Once
    a weight that was frozen has been seen to be trained, the weights of the same name in all layers
    are no longer watched.

    Args:
        every: measure at every n-th observation.

    Keys:
        frozen_weights/changed: [], count, 0..watched
        frozen_weights/watched: [], count, 0..number of parameters
        frozen_weights/first_changed: [rank], index, -1..number of parameters - 1; the first five
            of the changed weights, in the order of the modules, -1 where there are fewer; the
            texts are their names
        frozen_weights/largest_change: [], fraction, 0..inf; the largest change of any weight
        frozen_weights/drifted: [], count, 0..changed
        frozen_weights/written: [], count, 0..changed; changed - drifted - written are rounded

    Reads:
        The live model's parameters; no activations.

    Cost:
        Every frozen weight is read once; 2 integers for each leave the device, and 2 floats for
        each that has changed. Up to 4096 entries of each frozen weight are kept on the shadow's
        device and beside checkpoints, in the weight's dtype: 16 KiB a matrix in float32, 8 KiB in
        bfloat16 (3.4 MiB in float32 for the 272 weights of SmolLM2-135M).

    Source:
        This project.

    Raises:
        ValueError: every < 1.
    """

    description: ClassVar[Description] = Description(
        title="Frozen weights",
        group="Weights",
        needs=Needs.EARLIER | Needs.TRAINING,
        measures={
            "changed": Meaning(
                title="Frozen weights that have changed",
                axes=(),
                headline=True,
                of_run=True,
                better="lower",
            ),
            "watched": Meaning(title="Number of frozen weights watched", axes=(), of_run=True),
            "first_changed": Meaning(
                title="Frozen weights that have changed", axes=("rank",), of_run=True
            ),
            "largest_change": Meaning(
                title="Largest change of a frozen weight, relative to its size",
                axes=(),
                headline=True,
                of_run=True,
                better="lower",
                explanation="Merging adapters into the base weights and taking them out again "
                "rounds these; in half precision they drift further each time.",
            ),
            "drifted": Meaning(
                title="Frozen weights that merging has moved by more than rounding",
                axes=(),
                of_run=True,
                better="lower",
                alarm=_DRIFTED,
            ),
            "written": Meaning(
                title="Frozen weights that something other than merging has changed",
                axes=(),
                of_run=True,
                better="lower",
                alarm=_WRITTEN,
            ),
        },
    )

    every: int = 10
    name: str = "frozen_weights"
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        demand_numbers(self, every=1)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Returns no reductions: this instrument reads weights alone."""
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields how many weights have changed and how far, and the names of the first."""
        weights = list(shadow.mirror.weights())
        # Adapters may separate tied weights, which are one parameter of the live model.
        tied: dict[int, list[int]] = {}
        for i, weight in enumerate(weights):
            tied.setdefault(id(weight.live), []).append(i)
        names = self._always_frozen([weights[first] for first, *_ in tied.values()])
        frozen = {
            at[0]: {weights[i].name for i in at}
            for at in tied.values()
            if weights[at[0]].name in names
        }
        changed = self._changed(shadow, {i: weights[i] for i in frozen})
        merging = bool(changed) and _looks_like_merging(shadow, frozen, changed.keys())
        shown = [*list(changed)[:5], *[-1] * (5 - len(changed))]
        yield self._count("changed", len(changed))
        yield self._count("watched", len(frozen))
        yield Reading(
            key=f"{self.name}/first_changed",
            values=np.array(shown),
            axes=("rank",),
            unit="index",
            texts=np.array(["" if i < 0 else weights[i].name for i in shown]),
        )
        # The maximum of numpy is NaN if one of the numbers is.
        largest = np.max([share for share, _ in changed.values()], initial=0.0)
        yield Reading(key=f"{self.name}/largest_change", values=largest, unit="fraction")
        drifted = sum(beyond for _, beyond in changed.values())
        yield self._count("drifted", int(drifted) if merging else 0)
        yield self._count("written", 0 if merging else len(changed))

    def _changed(
        self, shadow: Shadow, frozen: Mapping[int, Weight]
    ) -> dict[int, tuple[float, float]]:
        """Returns what `_distance` says of each of the frozen weights that has changed."""
        if not frozen:
            return {}
        values = shadow.mirror.live_values(frozen.values())
        found = {weight.name: _look(live, shadow.device) for weight, live in values}
        looks = {i: found[weight.name] for i, weight in frozen.items()}
        for i, (total, entries) in looks.items():
            self.baseline.setdefault(_SUM + frozen[i].name, total)
            # A checkpoint of an older version has no entries; they begin here.
            self.baseline.setdefault(_ENTRIES + frozen[i].name, entries)
        now = torch.stack([total for total, _ in looks.values()])
        first = torch.stack([self.baseline[_SUM + weight.name] for weight in frozen.values()])
        differ = (now.to(first.device) != first).any(1).tolist()
        changed = [i for i, other in zip(frozen, differ, strict=True) if other]
        moved = [_distance(looks[i][1], self.baseline[_ENTRIES + frozen[i].name]) for i in changed]
        numbers = torch.stack(moved).tolist() if moved else []
        return {i: (far, beyond) for i, (far, beyond) in zip(changed, numbers, strict=True)}

    def _always_frozen(self, weights: Sequence[Weight]) -> set[str]:
        """Returns the names of the weights that are frozen and not among those trained in turns."""
        in_turns = "trained in turns: "
        for weight in weights:
            if weight.live.requires_grad and _SUM + weight.name in self.baseline:
                self.baseline[in_turns + _in_all_layers(weight.name)] = torch.tensor(True)
        return {
            weight.name
            for weight in weights
            if not weight.live.requires_grad
            and in_turns + _in_all_layers(weight.name) not in self.baseline
        }

    def _count(self, measure: str, number: int) -> Reading:
        return Reading(key=f"{self.name}/{measure}", values=np.array(number), unit="count")


def _in_all_layers(name: str) -> str:
    """Returns the name that this weight has in every layer."""
    return re.sub(r"\d+", "*", name)


def _look(live: Tensor, device: torch.device) -> tuple[Int[Tensor, "2"], Float[Tensor, " entry"]]:
    """Reads one live weight: its checksum, and a copy of the entries that are kept, on `device`."""
    live = live.detach()
    if type(live) is not Tensor and hasattr(live, "dequantize"):  # packed by torchao
        live = live.dequantize()
    live = live.contiguous()  # The live model may be spread over several devices.
    entries = live.view(-1)[places(live)].to(device)
    if entries.is_floating_point() and entries.itemsize == 1:  # with which nothing can be computed
        entries = entries.float()
    return checksum(live).to(device), entries


def places(weight: Float[Tensor, "..."]) -> Int[Tensor, " entry"]:
    """Returns which entries of the flattened weight are kept; they depend on its size alone."""
    every = torch.arange(min(weight.numel(), _SAMPLE), device=weight.device)
    return every if weight.numel() <= _SAMPLE else every * _STEP % weight.numel()


def _distance(now: Float[Tensor, " entry"], first: Float[Tensor, " entry"]) -> Float[Tensor, "2"]:
    """Returns the largest change as a share of the root mean square, and 1 if any entry has moved
    by more than rounding; NaN counts as such."""
    # Packed numbers are not rounded.
    most = torch.finfo(first.dtype).eps ** 0.5 / 4 if first.is_floating_point() else 0.0
    wide = torch.promote_types(first.dtype, torch.float32)
    now, first = now.to(wide), first.to(now.device, wide)
    moved, size = (now - first).abs(), first.square().mean().sqrt()
    size = torch.where(size == 0, now.square().mean().sqrt(), size)
    largest = moved.max()
    share = torch.where(largest == 0, largest, largest / size)
    rounded = (moved <= most * first.abs().clamp(min=size)).all()
    return torch.stack([share, (~rounded).to(wide)]).float()


def _looks_like_merging(
    shadow: Shadow, frozen: Mapping[int, set[str]], changed: Collection[int]
) -> bool:
    """Whether the changes are what merging adapters and taking them out again leaves.

    Args:
        frozen: the names of each frozen weight, of which a tied one has several.
        changed: those of the weights that have changed.
    """
    names: set[str] = set()
    for path, module in shadow.mirror.live_modules(adapters=True):
        if adapted := adapted_leaves(module):
            names |= {f"{path}.{name}" for name in adapted}
            tuners = (part for part in module.modules() if isinstance(part, BaseTunerLayer))
            if any(tuner.merged for tuner in tuners):
                return False
    under = {i for i, called in frozen.items() if not names.isdisjoint(called)}
    return under.issuperset(changed) and 2 * len(changed) >= len(under)


def checksum(weight: Float[Tensor, "..."]) -> Int[Tensor, "2"]:
    """Returns two numbers that depend on every bit of the weight and on the bit's place."""
    bits = weight.contiguous()
    bits = bits.reshape(-1, bits.shape[-1]) if bits.ndim else bits.reshape(1, 1)
    whole = bits.shape[1] * bits.element_size() % 8 == 0 and bits.storage_offset() % 8 == 0
    bits = bits.view(torch.int64 if whole else _BITS[bits.element_size()])
    # In pieces that a CPU's caches hold, since each is read twice. A GPU would start many kernels,
    # and an entry that is not eight bytes long is first copied to int64.
    most = _IN_CACHE if bits.device.type == "cpu" else bits.numel() if whole else 2**20
    columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    rows = []
    for piece in bits.split(max(1, most // bits.shape[1])):
        rows.append(piece.sum(1, dtype=torch.int64))
        columns += piece.sum(0, dtype=torch.int64)
    return torch.stack([_hash(torch.cat(rows)), _hash(columns)])


def _hash(x: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    """Returns sum_i (1 + 2 i g) mix(x_i); integers wrap around."""
    at = torch.arange(len(x), device=x.device)
    return ((x ^ (x >> 32)) * (1 + at * _STEP * 2)).sum()
