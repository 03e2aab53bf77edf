"""Trains a small sparse autoencoder while the model is trained, and reads its features."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.features import (
    feature_readings,
    fit_readings,
    largest,
    scalar,
    text_rows,
)
from tlens_callback.interfaces import TokenFeatures
from tlens_callback.meaning import Description, Meaning, Needs, Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.sae.autoencoder import fvu
from tlens_callback.sae.splice import activations, ordinary, splice, training_activations
from tlens_callback.sae.training import Training, appended, autoencoder
from tlens_callback.shadow import Reduce, Shadow, Taken


@dataclass(frozen=True)
class TrainedFeatures:
    """Trains a sparse autoencoder on the current model, a few steps at each observation.

    Each time, new activations at the hook point are added to a buffer, which keeps the last
    `buffer` of them. They come from the probes that are not repeated blocks and from the next
    `rows` rows of the training data, without the first token of each and without massive
    activations (of a norm above 10 times the median norm). Then the autoencoder takes `steps`
    steps on tokens drawn from the buffer. With x = scale * activation, and scale such that the mean
    norm of x - mean of x is sqrt(d_in) over the first observation's activations,

        f = relu((x - b_dec) W_enc + b_enc), x' = f W_dec + b_dec,
        loss = (|x - x'|^2 + l1 sqrt(d_in) sum_n f_n) / d_in, mean over `batch` tokens,

    is minimised by Adam (0.9, 0.999). Rows of W_dec have norm 1: the part of their gradient along
    the row is removed before the step, and they are scaled to norm 1 after it. Before the steps,
    features that fired on none of the tokens of the last observation's steps are resampled towards
    tokens that are reconstructed badly. The tokens are drawn with probability in proportion to
    |x - x'|^4; the decoder row becomes x - b_dec at norm 1, and the encoder column has 0.2 times
    the mean norm of those of the features that fired. The model's own gradients and the global
    random state are not touched. A resumed run continues with the autoencoder, the optimizer's
    moments and the buffer. But it observes its checkpoint again, which adds `steps` steps, and
    reads the training data from the beginning.

    frequency, mean, activation, top, l0, fvu, massive, loss_clean, loss_zero, loss_sae and
    recovered are those of `SparseFeatures`. They are measured after the steps on the probes, which
    are in the buffer and so not held out. The others are:

    - fvu_before: fvu before the steps on the new rows of training data, which the autoencoder has
      not seen unless the data began again; on the probes if there is no training data. At the
      first observation it is that of the random start.
    - dead: share of features that fired on none of the tokens of this observation's steps.
    - resampled: number of features resampled before the steps.
    - cosine: between a feature's decoder row and the same row after the first observation's steps;
      it falls when the feature becomes another one.

    The features shown are the k of largest mean after the first observation's steps.

    Args:
        hook: the hook point to read, such as "blocks.5.hook_resid_post".
        n_features: number of features. Default: 4 * d_in.
        k: how many features to show.
        tokens: how many top tokens to show for each feature.
        steps: training steps at each observation.
        rows, length: how many rows of training data to read at each observation, and to how many
            tokens each is cut.
        buffer: how many activations to keep.
        l1: weight of the features' sum; larger is sparser. It lowers every feature by about l1 / 2
            of an activation's norm, measured from the mean.
        lr, batch, seed: learning rate, tokens in each step, and seed.
        resample: False leaves dead features dead.
        every: measure at every n-th observation.

    Keys:
        trained_features/frequency: [feature], fraction, 0..1
        trained_features/mean: [feature], activation, 0..inf
        trained_features/cosine: [feature], cosine, -1..1
        trained_features/activation/<probe>: [feature, pos], activation, 0..inf
        trained_features/top: [feature, rank], activation, 0..inf; with the tokens as texts
        trained_features/l0: [], count, 0..n_features
        trained_features/dead: [], fraction, 0..1
        trained_features/resampled: [], count, 0..n_features
        trained_features/fvu: [], fraction, 0..inf
        trained_features/fvu_before: [], fraction, 0..inf
        trained_features/massive: [], count, 0..inf
        trained_features/recovered: [], fraction, -inf..inf
        trained_features/loss_clean: [], nats, 0..inf
        trained_features/loss_zero: [], nats, 0..inf
        trained_features/loss_sae: [], nats, 0..inf

    Reads:
        Nothing from the shared forward pass.

    Cost:
        steps * batch * d_in * n_features * 12 operations; four forward passes of its own over the
        probes that are not repeated blocks and one over the rows of training data; 24 * d_in *
        n_features + 4 * buffer * d_in bytes on the device and in each checkpoint.

    Source:
        Bricken et al. 2023 (loss, unit rows, resampling); Templeton et al. 2024 (scaling to
        sqrt(d)); Sun et al. 2024 (massive activations).

    Raises:
        ValueError: settings outside their range; from `taps`, a hook point that the model does not
            have, or too few tokens among the probes; from `read`, first activations that are all
            equal.
    """

    description: ClassVar[Description] = Description(
        title="Features trained beside the model",
        group="Neurons and features",
        needs=Needs.TRAINING,
        measures={
            "frequency": Meaning(
                title="How often each feature fires",
                axes=("feature",),
                headline=True,
                of_run=True,
                quantity=Quantity.FEATURE_FREQUENCY,
            ),
            "mean": Meaning(
                title="Mean activation of each feature", axes=("feature",), of_run=True
            ),
            "cosine": Meaning(
                title="Direction of each feature, compared with the start",
                axes=("feature",),
                of_run=True,
            ),
            "activation": Meaning(
                title="Activation of features on each token",
                axes=("feature", "pos"),
                headline=True,
                of_run=True,
            ),
            "top": Meaning(
                title="Tokens on which a feature fires most",
                axes=("feature", "rank"),
                headline=True,
                of_run=True,
            ),
            "l0": Meaning(
                title="Number of features that fire on a token", axes=(), headline=True, of_run=True
            ),
            "dead": Meaning(
                title="Share of features that never fire",
                axes=(),
                headline=True,
                of_run=True,
                better="lower",
            ),
            "resampled": Meaning(
                title="Number of features resampled", axes=(), headline=True, of_run=True
            ),
            "fvu": Meaning(
                title="Variance that the autoencoder does not explain",
                axes=(),
                headline=True,
                of_run=True,
                better="lower",
            ),
            "fvu_before": Meaning(
                title="Variance not explained before the new steps", axes=(), of_run=True
            ),
            "massive": Meaning(
                title="Number of massive activations left out", axes=(), of_run=True
            ),
            "recovered": Meaning(
                title="Share of the loss that the autoencoder recovers",
                axes=(),
                headline=True,
                of_run=True,
                better="higher",
            ),
            "loss_clean": Meaning(title="Loss of the model", axes=(), of_run=True),
            "loss_zero": Meaning(title="Loss with zeros at the hook point", axes=(), of_run=True),
            "loss_sae": Meaning(
                title="Loss with the autoencoder's reconstruction",
                axes=(),
                of_run=True,
                better="lower",
            ),
        },
    )

    hook: str
    n_features: int | None = None
    k: int = 16
    tokens: int = 8
    steps: int = 100
    rows: int = 8
    length: int = 128
    buffer: int = 8192
    l1: float = Training.l1
    lr: float = Training.lr
    batch: int = Training.batch
    seed: int = 0
    resample: bool = True
    every: int = 10
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "trained_features"

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise ValueError(
                f"hook={self.hook!r}: give the name of one hook point, such as "
                f"'blocks.5.hook_resid_post'."
            )
        positive = dict.fromkeys("k tokens steps length buffer every n_features batch".split(), 1)
        demand_numbers(self, **positive, rows=0)
        self._training()

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """Checks the hook point and the probes; returns no reductions."""
        shadow.hook(self.hook)
        text_rows(batch, type(self).__name__)
        return {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Runs its own forward passes and training steps, and yields the readings."""
        rows, tokens, counted = text_rows(batch, type(self).__name__)
        training, state = self._training(), self.baseline
        on_probes = activations(shadow, self.hook, tokens, counted)
        on_rows = training_activations(shadow, self.hook, batch, self.rows, self.length)
        on_probes = on_probes[ordinary(on_probes)]
        on_rows = None if on_rows is None else on_rows[ordinary(on_rows)]
        fresh = on_probes if on_rows is None else on_rows
        new = on_probes if on_rows is None else torch.cat([on_probes, on_rows])
        d_in = new.shape[1]
        n = self.n_features or 4 * d_in
        if "W_enc" not in state or state["W_enc"].shape != (d_in, n):
            state.clear()
            state.update(training.begin(new, n))
        before = fvu(fresh, autoencoder(state).reconstruct(fresh)[1])
        state["buffer"] = appended(state.get("buffer"), new, self.buffer)
        resampled = training.resample(state, state["buffer"]) if self.resample else 0
        training.steps(state, state["buffer"], self.steps)

        sae = autoencoder(state)
        seen = splice(shadow, self.hook, tokens, counted, sae)
        if "shown" not in state:
            state["shown"] = largest(seen.features.mean(0), self.k)
            state["shown_rows"] = state["W_dec"][state["shown"]].clone()
        shown = state["shown"]
        yield from feature_readings(self.name, seen, shown, batch, rows, self.tokens)
        yield Reading(
            key=f"{self.name}/cosine",
            values=(state["W_dec"][shown] * state["shown_rows"]).sum(1).cpu().numpy(),
            axes=("feature",),
            unit="cosine",
            labels={"feature": [str(i) for i in shown.tolist()]},
            limits=(-1.0, 1.0),
        )
        dead = float((~state["fired"]).double().mean())
        yield scalar(self.name, "dead", dead, "fraction", (0.0, 1.0))
        yield scalar(self.name, "resampled", resampled, "count")
        yield scalar(self.name, "fvu_before", before, "fraction")
        yield from fit_readings(self.name, seen)

    def token_features(self, shadow: Shadow) -> Iterator[TokenFeatures]:
        """All features as trained so far; none before the first observation.

        A feature may become another one while it is trained (`cosine`).
        """
        if "W_enc" in self.baseline:
            sae = autoencoder(self.baseline)
            names = [str(i) for i in range(sae.n_features)]
            yield TokenFeatures(self.hook, sae.encode, names, fixed=False)

    def _training(self) -> Training:
        return Training(l1=self.l1, lr=self.lr, batch=self.batch, seed=self.seed)
