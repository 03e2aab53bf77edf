"""Says in words which heads, layers, neurons and features tell winners from losers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tlens_callback.meaning import Quantity
from tlens_callback.reading import Reading

LONG = 0.7
"""A correlation with length from which on, in size, a contrast may be one of length."""

_DOES = {
    "direct": "adds {} to the sampled tokens",
    "mlp_direct": "adds {} to the sampled tokens",
    "attention_first": "looks {} at the first token",
    "attention_prompt": "looks {} at the prompt",
    "attention_answer": "looks {} at the answer itself",
    "lens_logp": "reads {} of the sampled tokens",
    "repetition": "looks {} at what came after the same token",
    "neuron": "is {} active",
    "feature": "has {} of this feature",
}
"""What was measured -> what a head, MLP or neuron does more or less in winners."""


@dataclass(frozen=True)
class Told:
    """One number that was compared between winners and losers.

    Attributes:
        what: "L5H2", "L5 MLP", "L5N210" or "sparse_features 12".
        measure: what was measured, "direct".
        value: how much more winners have of it, in `unit`; half the distance, as `contrast` says.
        q: the smallest false discovery rate at which it is a discovery.
        length: its correlation with length inside the groups; NaN: not known.
        sign: mean sign over the observations so far; NaN: not known.
    """

    what: str
    measure: str
    value: float
    unit: str
    q: float
    length: float = float("nan")
    sign: float = float("nan")

    def __str__(self) -> str:
        does = _DOES.get(self.measure, "has {} of it")
        more = does.format("more" if self.value > 0 else "less")
        return f"{self.what} {more} ({self.measure} {self.value:+.2g} {self.unit})"

    @property
    def may_be_length(self) -> bool:
        """Whether longer or shorter rollouts would give this contrast too."""
        return abs(self.length) > LONG


@dataclass(frozen=True)
class Discoveries:
    """What tells winners from losers at one observation.

    Attributes:
        found: how many numbers do, at the false discovery rate of the run.
        compared: how many numbers were compared.
        surest: those of lowest q, at most `found` of them.
        spread: whether any group has winners and losers.
    """

    found: int
    compared: int
    surest: tuple[Told, ...]
    spread: bool = True


def discoveries(
    readings: Iterable[Reading], most: int = 5, *, run: bool = False
) -> Discoveries | None:
    """Reads from the readings of an observation what tells winners from losers.

    A contrast is found by its quantity, and what is said of it by the name of its measure with
    _q, _length or _sign behind it; so are those of MLPs and neurons of the same instrument.

    Args:
        most: how many of the surest are named.
        run: not at this observation but over all so far; those have _run behind the measure.

    Returns:
        None if nothing was compared.
    """
    by = {reading.key: reading for reading in readings}
    first = next((r for r in by.values() if r.meaning.quantity is Quantity.CONTRAST), None)
    if first is None:
        return None
    own = {r.measure: r for r in by.values() if r.instrument == first.instrument}
    suffix, before = ("_run", "run_") if run else ("", "")
    if run and f"{first.measure}_run" not in own:
        return None
    counts = [own.get(name) for name in (f"{before}discoveries", "looked_at")]
    compared_by = [name for name in own if f"{name}{suffix}_q" in own and name[-4:] != "_run"]
    every = [told for name in compared_by for told in _told(own, name, suffix)]
    found, compared = (int(one.values) if one is not None else 0 for one in counts)
    # Those of equal q in the order of the readings: heads before neurons.
    every.sort(key=lambda told: told.q)
    surest = tuple(every[: min(found, most)])
    spread = run or bool(np.isfinite(first.values).any())
    return Discoveries(found, compared or len(every), surest, spread)


def _told(own: dict[str, Reading], measure: str, suffix: str) -> Iterable[Told]:
    values = own[f"{measure}{suffix}"]
    beside = [own.get(f"{measure}{of}") for of in (f"{suffix}_q", "_length", "_sign")]
    numbers = [
        one.values if one is not None and one.values.shape == values.values.shape else None
        for one in beside
    ]
    for at, value in np.ndenumerate(values.values):
        q, length, sign = (float("nan") if one is None else float(one[at]) for one in numbers)
        if np.isfinite([value, q]).all():
            name = measure.removeprefix("contrast_")
            yield Told(_name(values, at), name, float(value), values.unit, q, length, sign)


def _name(reading: Reading, at: Sequence[int]) -> str:
    if reading.texts is not None:
        return str(reading.texts[tuple(at)])
    layers = reading.labels.get("layer")
    layer = layers[at[0]] if layers else at[0]
    return f"L{layer}H{at[1]}" if reading.axes == ("layer", "head") else f"L{layer} MLP"
