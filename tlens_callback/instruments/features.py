"""Follows the features of a published sparse autoencoder while the model is trained."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from os import PathLike
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.selection import checked_selection, index_or_nan, plain_rows
from tlens_callback.interfaces import TokenFeatures
from tlens_callback.meaning import Description, Meaning, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading, legible
from tlens_callback.sae import load_sae
from tlens_callback.sae.autoencoder import Autoencoder
from tlens_callback.sae.splice import SpliceResult, counted_tokens, splice
from tlens_callback.shadow import Reduce, Shadow, Taken


@dataclass(frozen=True)
class SparseFeatures:
    """Reads a sparse autoencoder's features in the model, and how well the autoencoder fits it.

    An autoencoder that was trained on the base model may not fit the fine-tuned one. `fvu` and
    `recovered` measure how well it does; without them the features mean nothing.

    Let a be the model's activation at the autoencoder's hook point, f_n(pos) the activation of
    feature n there, and a' the reconstruction. The counted tokens are those of the probes that are
    not repeated blocks, without the first of each (BOS) and without massive activations, whose
    norm is above 10 times the median norm. Over these tokens:

    - frequency: share of the tokens with f_n > 0. mean: mean of f_n.
    - drift: mean of f_n minus that at the first observation. drifting: the features of largest
      absolute drift among all features, largest first; drifting_change: their drift.
    - activation: f_n at each token; 0 at tokens that are not counted.
    - top: the tokens of largest f_n, marked [[ ]] between two tokens on either side; the text is
      empty beyond the tokens on which n fires.
    - l0: mean number of features with f_n > 0. dead: share of all features that fire on none of
      the tokens; with few probes most are, but they may fire on other texts.
    - fvu: sum |a - a'|^2 / sum |a - mean of a|^2.
    - massive: number of massive activations.
    - loss_clean, loss_zero, loss_sae: mean next-token loss of the unchanged model, with a := 0, and
      with a := a' at the counted tokens. Predictions made at the first token are left out.
    - recovered: (loss_zero - loss_sae) / (loss_zero - loss_clean): 1 if a' serves as well as a, 0
      if it is no better than zeros; nan if zeros change the loss by less than 1e-4 nats. It means
      nothing if zeros lower the loss, as they may in an untrained model.

    The features shown are those in `features`, or the k of largest mean at the first observation,
    which then stay the same. If a run is resumed with an autoencoder of another size, the next
    observation counts as the first.

    Args:
        sae: a directory that `load_sae` reads, or an `Autoencoder`.
        hook: the hook point it is for. Default: the one that its configuration names.
        features: numbers of the features to show.
        k: how many features to show without `features`; also the length of `drifting`.
        tokens: how many top tokens to show for each feature.
        every: measure at every n-th observation.

    Keys:
        sparse_features/frequency: [feature], fraction, 0..1
        sparse_features/mean: [feature], activation, 0..inf
        sparse_features/drift: [feature], activation, -inf..inf
        sparse_features/drifting: [rank], index, 0..n_features-1
        sparse_features/drifting_change: [rank], activation, -inf..inf
        sparse_features/activation/<probe>: [feature, pos], activation, 0..inf
        sparse_features/top: [feature, rank], activation, 0..inf; with the tokens as texts
        sparse_features/l0: [], count, 0..n_features
        sparse_features/dead: [], fraction, 0..1
        sparse_features/fvu: [], fraction, 0..inf
        sparse_features/massive: [], count, 0..inf
        sparse_features/recovered: [], fraction, -inf..inf
        sparse_features/loss_clean: [], nats, 0..inf
        sparse_features/loss_zero: [], nats, 0..inf
        sparse_features/loss_sae: [], nats, 0..inf

    Reads:
        Nothing from the shared forward pass.

    Cost:
        Three forward passes of its own over the probes that are not repeated blocks, with all their
        logits; tokens * d_in * n_features * 4 operations and, during the observation, tokens *
        n_features * 8 bytes on the device; 4 * n_features bytes between observations. On a GPU the
        autoencoder's weights are copied there each time. With TF32 switched on, rounding may move a
        feature across its threshold.

    Source:
        Bricken et al. 2023 (features, loss recovered); Kissane et al. 2024 (transfer to fine-tuned
        models); Gao et al. 2024; Rajamanoharan et al. 2024; Sun et al. 2024 (massive activations).

    Raises:
        ValueError: no hook; from `taps`, a hook point that the model does not have, or too few
            tokens among the probes; from `read`, activations of another width than the
            autoencoder's.
    """

    description: ClassVar[Description] = Description(
        title="Sparse features",
        group="Neurons and features",
        measures={
            "frequency": Meaning(
                title="How often each feature fires",
                axes=("feature",),
                headline=True,
                quantity=Quantity.FEATURE_FREQUENCY,
            ),
            "mean": Meaning(title="Mean activation of each feature", axes=("feature",)),
            "drift": Meaning(
                title="Change in mean activation since the start", axes=("feature",), of_run=True
            ),
            "drifting": Meaning(
                title="Features that changed most", axes=("rank",), headline=True, of_run=True
            ),
            "drifting_change": Meaning(
                title="Change of these features", axes=("rank",), of_run=True
            ),
            "activation": Meaning(
                title="Activation of features on each token", axes=("feature", "pos"), headline=True
            ),
            "top": Meaning(
                title="Tokens on which a feature fires most",
                axes=("feature", "rank"),
                headline=True,
            ),
            "l0": Meaning(title="Number of features that fire on a token", axes=(), headline=True),
            "dead": Meaning(
                title="Share of features that never fire", axes=(), headline=True, better="lower"
            ),
            "fvu": Meaning(
                title="Variance that the autoencoder does not explain",
                axes=(),
                headline=True,
                better="lower",
            ),
            "massive": Meaning(title="Number of massive activations left out", axes=()),
            "recovered": Meaning(
                title="Share of the loss that the autoencoder recovers",
                axes=(),
                headline=True,
                better="higher",
            ),
            "loss_clean": Meaning(title="Loss of the model", axes=()),
            "loss_zero": Meaning(title="Loss with zeros at the hook point", axes=()),
            "loss_sae": Meaning(
                title="Loss with the autoencoder's reconstruction", axes=(), better="lower"
            ),
        },
    )

    sae: Autoencoder
    hook: str | None = None
    features: Sequence[int | np.integer] | None = None
    k: int = 16
    tokens: int = 8
    every: int = 10
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "sparse_features"

    def __post_init__(self) -> None:
        if isinstance(self.sae, str | PathLike):
            object.__setattr__(self, "sae", load_sae(self.sae))  # as a command line gives it
        if not isinstance(self.sae, Autoencoder):
            raise ValueError(
                f"SparseFeatures takes an Autoencoder or its directory, got {self.sae!r}."
            )
        demand_numbers(self, k=1, tokens=1, every=1)
        if self.hook is None and self.sae.hook is None:
            raise ValueError(
                "The autoencoder's files do not say which hook point it is for. Name the hook "
                "point: SparseFeatures(sae, hook='blocks.5.hook_resid_post')."
            )
        chosen = checked_selection(self.features, "features")
        n = self.sae.n_features
        for feature in chosen or ():
            if not isinstance(feature, int | np.integer) or not 0 <= feature < n:
                raise ValueError(
                    f"features={list(chosen or ())}: features have the numbers 0 to {n - 1}."
                )
        object.__setattr__(self, "features", chosen)

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Checks the hook point and the probes; returns no reductions."""
        shadow.hook(self._at)
        text_rows(batch, type(self).__name__)
        return {}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Runs its own forward passes and yields the readings."""
        sae = self.sae.to(shadow.device)
        rows, tokens, counted = text_rows(batch, type(self).__name__)
        seen = splice(shadow, self._at, tokens, counted, sae)
        mean = seen.features.mean(0)
        first = self.baseline.get("mean")
        if first is None or first.shape != mean.shape:
            first = mean
            self.baseline.update(mean=mean.clone(), shown=largest(mean, self.k))
        drift = mean - first
        given = self.features
        shown = self.baseline["shown"] if given is None else torch.tensor(given, device=mean.device)
        labels = {"feature": [str(i) for i in shown.tolist()]}

        yield from feature_readings(self.name, seen, shown, batch, rows, self.tokens)
        yield Reading(
            key=f"{self.name}/drift",
            values=drift[shown].cpu().numpy(),
            axes=("feature",),
            unit="activation",
            labels=labels,
        )
        moved = largest(drift.abs(), self.k)
        for measure, values, unit in (
            ("drifting", index_or_nan(moved, drift[moved]), "index"),
            ("drifting_change", drift[moved], "activation"),
        ):
            yield Reading(
                key=f"{self.name}/{measure}", values=values.cpu().numpy(), axes=("rank",), unit=unit
            )
        silent = (seen.features > 0).any(0).logical_not().double()
        dead = float(silent.mean()) if seen.is_known else float("nan")
        yield scalar(self.name, "dead", dead, "fraction", (0.0, 1.0))
        yield from fit_readings(self.name, seen)

    def token_features(self, shadow: Shadow) -> Iterator[TokenFeatures]:
        """All features at the autoencoder's hook point."""
        there = lru_cache(self.sae.to)  # once, and only if they are read
        names, shown = map(str, range(self.sae.n_features)), map(int, self.features or ())
        yield TokenFeatures(self._at, lambda x: there(x.device).encode(x), [*names], [*shown])

    @property
    def _at(self) -> str:
        hook = self.hook or self.sae.hook
        assert hook is not None
        return hook


def text_rows(
    batch: ProbeBatch, name: str
) -> tuple[list[int], Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Returns the rows that are not repeated blocks, their tokens, and which tokens count.

    Raises:
        ValueError: if there are too few tokens for a variance or a prediction.
    """
    rows = plain_rows(batch)
    if max((batch.lengths[row] for row in rows), default=0) < 3:
        raise ValueError(
            f"{name} needs a text of at least three tokens among the probes, since the first token "
            f"is left out; add a Probe with a sentence or two."
        )
    width = max(batch.lengths[row] for row in rows)
    tokens, counted = batch.tokens[rows, :width], counted_tokens(batch, rows)[:, :width]
    return rows, tokens, counted


def largest(values: Float[Tensor, " feature"], k: int) -> Int[Tensor, " rank"]:
    """Returns the k features of largest value, largest first, equal ones by their number."""
    return values.sort(descending=True, stable=True).indices[:k].clone()


def feature_readings(
    name: str,
    seen: SpliceResult,
    shown: Int[Tensor, " shown"],
    batch: ProbeBatch,
    rows: Sequence[int],
    n_tokens: int,
) -> Iterator[Reading]:
    """Yields frequency, mean, activation and top tokens of each feature that is shown."""
    labels = {"feature": [str(i) for i in shown.tolist()]}
    chosen, counted = seen.features[:, shown].cpu(), seen.counted.cpu()  # [token, shown]
    yield Reading(
        key=f"{name}/frequency",
        values=(chosen > 0).double().masked_fill(chosen.isnan(), torch.nan).mean(0).numpy(),
        axes=("feature",),
        unit="fraction",
        labels=labels,
        limits=(0.0, 1.0),
    )
    yield Reading(
        key=f"{name}/mean",
        values=chosen.double().mean(0).numpy(),
        axes=("feature",),
        unit="activation",
        labels=labels,
    )
    grid = chosen.new_zeros(*counted.shape, len(shown))
    grid[counted] = chosen
    for at, row in enumerate(rows):
        yield Reading(
            key=f"{name}/activation/{batch.probes[row].name}",
            values=grid[at, : batch.lengths[row]].T.numpy(),
            axes=("feature", "pos"),
            unit="activation",
            labels={**labels, "pos": batch.labels[row]},
        )
    # Over all tokens, counted or not: which are massive may change, but the shape must not.
    peak = grid.flatten(0, 1).sort(dim=0, descending=True, stable=True)
    values, places = peak.values[:n_tokens].T, peak.indices[:n_tokens].T
    width = grid.shape[1]
    texts = [
        [
            _in_context(batch.labels[rows[at // width]], at % width) if value > 0 else ""
            for at, value in zip(*of_one, strict=True)
        ]
        for of_one in zip(places.tolist(), values.tolist(), strict=True)
    ]
    yield Reading(
        key=f"{name}/top",
        values=values.numpy(),
        axes=("feature", "rank"),
        unit="activation",
        labels=labels,
        texts=np.array(texts, dtype=np.str_),
    )


def fit_readings(name: str, seen: SpliceResult) -> Iterator[Reading]:
    """Yields how sparse the features are and how well they reconstruct the activations."""
    l0 = float((seen.features > 0).sum(1).double().mean())
    yield scalar(name, "l0", l0 if seen.is_known else float("nan"), "count")
    yield scalar(name, "fvu", seen.fvu, "fraction")
    yield scalar(name, "massive", seen.massive, "count")
    yield scalar(name, "recovered", seen.recovered, "fraction")
    for kind, value in seen.loss.items():
        yield scalar(name, f"loss_{kind}", value, "nats")


def scalar(
    name: str,
    measure: str,
    value: float | int,
    unit: str,
    limits: tuple[float, float] | None = None,
) -> Reading:
    """Returns a reading of one number."""
    return Reading(key=f"{name}/{measure}", values=np.array(value), unit=unit, limits=limits)


def _in_context(names: Sequence[str], pos: int) -> str:
    words = legible(names)
    before, after = "".join(words[max(0, pos - 2) : pos]), "".join(words[pos + 1 : pos + 3])
    return f"{before}[[{names[pos]}]]{after}"
