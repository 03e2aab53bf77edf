"""What each head is worth: the loss without it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tlens_callback.instruments.parts.selection import (
    attention_layers,
    chosen_rows,
    layer_labels,
    picked,
    plain_rows,
    z_hook,
)
from tlens_callback.meaning import Description, Meaning
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import Reduce, Shadow, Taken
from tlens_callback.shadow.interventions import Score, Variants, captured, demand_heads, effects

Mode = Literal["mean", "zero"]
Method = Literal["exact", "first_order"]
UNITS = {"loss": "nats", "logit_diff": "logit", "token_loss": "nats"}


@dataclass(frozen=True)
class HeadAblation:
    """Loss and logit difference of a probe without one head, minus those with it.

    With z[pos] a head's output before its output matrix (d_head numbers), replaced at every
    position of the probe by r, and everything behind it computed anew:

    - loss: -ln softmax(logit)[target] at the last token; positive where the head helps.
    - logit_diff: logit[target] - logit[foil] at the last token; negative where the head helps.
    - token_loss: mean over the tokens but the first of -ln probability of the token.

    Each is (its value with z := r) - (its value on the model as it is). r is 0 (`mode="zero"`), or
    the mean of the head's z over all tokens of all probes of the run that are no repeated blocks,
    each token counted once, the first of a text included (`mode="mean"`): another probe moves it.

    Later layers repair: what a head writes is in part written by others once it is gone, so an
    effect may be smaller than the head's direct attribution, or of the other sign. Zero is an
    output that the model was not trained on, and may do harm beyond the loss of the information.

    `method="first_order"` estimates all heads from one backward pass a measure:
    sum over pos and d_head of (r - z) . d(value)/dz. It is blind to repair and to saturation: a
    head that alone carries an answer may have a slope of nearly 0, in a loss that is near 0
    above all. How far it can be trusted is measured each time: `checked` heads are ablated
    exactly. A third of them, rounded down, are those of largest |estimate|, a third those of
    largest reach among the others, the rest evenly spaced over the remaining in the order of
    layers and heads. Reach is the sum over pos of |r - z| |d(value)/dz|, with Euclidean norms over
    d_head; both are taken relative to the largest of all heads, and in the measure in which that
    is most. The error of a head that is not checked may be larger.

    Args:
        mode: what takes the place of z.
        method: exact, or estimated.
        probes: names of the probes to ablate on; repeated blocks may be among them. Default:
            those that are no repeated blocks and have something to measure.
        tokens: also measure token_loss, on probes without a target too. It takes the logits of
            every token, those of a whole batch at a time.
        checked: heads to ablate exactly beside the first-order estimate.
        rows: ablations computed side by side in one batch; fewer of a text so long that the batch
            would have more than 2048 tokens.
        every: ask at every n-th observation.

    Keys:
        head_ablation/loss/<probe>: [layer, head], nats, -inf..inf; for a probe with a target
        head_ablation/logit_diff/<probe>: [layer, head], logit, -inf..inf; for a probe with a foil
        head_ablation/token_loss/<probe>: [layer, head], nats, -inf..inf; if tokens, for a probe of
            at least two tokens
        head_ablation/loss_error/<probe>: [], nats, 0..inf; if first_order: maximum over the
            checked heads of |estimate - exact|
        head_ablation/logit_diff_error/<probe>: [], logit, 0..inf; the same of logit_diff
        head_ablation/token_loss_error/<probe>: [], nats, 0..inf; the same of token_loss
        head_ablation/loss_rank_correlation/<probe>: [], correlation, -1..1; if first_order:
            Spearman's, of estimate and exact over the checked heads; NaN where either are all equal
        head_ablation/logit_diff_rank_correlation/<probe>: [], correlation, -1..1; the same of
            logit_diff
        head_ablation/token_loss_rank_correlation/<probe>: [], correlation, -1..1; the same of
            token_loss

    Reads:
        blocks.{layer}.attn.hook_z, for what takes its place; in passes of its own also
        blocks.{layer}.hook_resid_pre, where the layers behind begin anew

    Cost:
        Exact: per probe n_heads * layers * (layers + 1) / 2 passes of the probe through one layer,
        and n_heads * layers through the unembedding; of the layers before the head only those run
        that others of its batch need. First order: one forward pass and one backward pass a
        measure per probe, and the `checked` heads exactly. In half precision, effects of the size
        of its rounding are noise (bfloat16: 1/16 at logits of 8 to 16); the callback's
        `dtype=torch.float32` avoids that.

    Source:
        Michel et al. 2019 (heads switched off one at a time, and the gradient's estimate); Olsson
        et al. 2022 (ablation, zero and mean); Wang et al. 2022 (mean ablation); McGrath et al.
        2023 (repair by later layers).

    Raises:
        ValueError: an unknown mode or method, checked < 3, rows < 1, every < 1, an empty or
            repeated selection; from `taps`, a probe that is not there, or nothing to measure; from
            `read`, a model whose hook_z is not cut into heads.
    """

    description: ClassVar[Description] = Description(
        title="What is lost without a head",
        group="Heads",
        measures={
            f"{measure}{kind}": Meaning(title=f"{title}{of}", axes=axes, headline=True)
            for measure, title in {
                "loss": "Loss of the answer without a head",
                "logit_diff": "Lead of the answer without a head",
                "token_loss": "Loss of a probe without a head",
            }.items()
            for kind, of, axes in (
                ("", "", ("layer", "head")),
                ("_error", ": error of the estimate", ()),
                ("_rank_correlation", ": ranks of the estimate against the exact ones", ()),
            )
        },
    )

    mode: Mode = "mean"
    method: Method = "exact"
    probes: Sequence[str] | None = None
    tokens: bool = False
    checked: int = 16
    rows: int = 64
    every: int = 10
    name: str = "head_ablation"

    def __post_init__(self) -> None:
        for field, allowed in (("mode", get_args(Mode)), ("method", get_args(Method))):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"HeadAblation({field}={getattr(self, field)!r}): it is one of {allowed}."
                )
        for field, least in (("checked", 3), ("rows", 1), ("every", 1)):
            if getattr(self, field) < least:
                raise ValueError(
                    f"HeadAblation({field}={getattr(self, field)}): give {field} >= {least}."
                )
        object.__setattr__(self, "probes", picked(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """What takes the place of z: [head, d_head] a layer."""
        layers = attention_layers(shadow, type(self).__name__)
        if not self._rows(batch):
            raise ValueError(
                "HeadAblation has nothing to measure on these probes: none has a target. Give "
                "one, as in Probe('capital', 'The capital of France is', target=' Paris'), or "
                "HeadAblation(tokens=True) for the loss of every token."
            )
        if self.mode == "zero":
            return {z_hook(i): lambda z: z.new_zeros(z.shape[2:]) for i in layers}
        plain = plain_rows(batch)
        if not plain:
            raise ValueError(
                "HeadAblation(mode='mean') averages over the probes that are no repeated blocks, "
                "and all of them are. Add a text, or give mode='zero'."
            )
        row = torch.tensor(plain, device=batch.tokens.device)
        counted = batch.mask[row][:, :, None, None]

        def mean(z: Float[Tensor, "probe pos head d_head"]) -> Float[Tensor, "head d_head"]:
            return z[row].float().where(counted, 0).sum((0, 1)) / counted.sum()

        return {z_hook(i): mean for i in layers}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """A matrix of each measure and probe, and its error where it is an estimate."""
        layers = attention_layers(shadow, type(self).__name__)
        put = {i: torch.as_tensor(taken[z_hook(i)]).to(shadow.device) for i in layers}
        for r in put.values():
            demand_heads(r, shadow, type(self).__name__)
        every_head = [(i, head) for i in layers for head in range(shadow.n_heads)]
        for row in self._rows(batch):
            measures = self._measures(batch, row)
            text = _text(shadow, batch, row, measures, put, self.rows)
            errors = np.empty((0, 2))
            if self.method == "exact":
                effect = text.ablated(every_head)
            else:
                effect, reach = text.estimated()
                sample = self._sample(np.abs(effect), reach)
                errors = _errors(effect[sample], text.ablated([every_head[i] for i in sample]))
            probe = batch.probes[row].name
            for i, measure in enumerate(measures):
                yield Reading(
                    key=f"{self.name}/{measure}/{probe}",
                    values=effect[:, i].reshape(len(layers), shadow.n_heads),
                    axes=("layer", "head"),
                    unit=UNITS[measure],
                    labels=layer_labels(layers, shadow),
                )
            for measure, (error, correlation) in zip(measures, errors, strict=False):
                yield Reading(
                    key=f"{self.name}/{measure}_error/{probe}", values=error, unit=UNITS[measure]
                )
                yield Reading(
                    key=f"{self.name}/{measure}_rank_correlation/{probe}",
                    values=correlation,
                    unit="correlation",
                    limits=(-1.0, 1.0),
                )

    def _rows(self, batch: ProbeBatch) -> list[int]:
        rows = chosen_rows(batch, self.probes)
        return [row for row in rows if self._measures(batch, row)]

    def _measures(self, batch: ProbeBatch, row: int) -> list[str]:
        there = {
            "loss": batch.targets[row] is not None,
            "logit_diff": batch.foils[row] is not None,
            "token_loss": self.tokens and batch.lengths[row] > 1,
        }
        return [measure for measure, measured in there.items() if measured]

    def _sample(
        self, size: Float[np.ndarray, "head measure"], reach: Float[np.ndarray, "head measure"]
    ) -> list[int]:
        """The heads to check: the largest, those that could be, and some at even distances."""
        chosen: list[int] = []
        for ranked in (size, reach):
            with np.errstate(invalid="ignore"):
                relative = ranked / ranked.max(0).clip(min=np.finfo(np.float32).tiny)
            order = np.argsort(-relative.max(1), kind="stable").tolist()
            chosen += [i for i in order if i not in chosen][: self.checked // 3]
        others = [i for i in range(len(size)) if i not in chosen]
        n = min(self.checked - len(chosen), len(others))
        return [
            *chosen,
            *(others[i] for i in np.linspace(0, len(others) - 1, n).round().astype(int)),
        ]


@dataclass(frozen=True)
class _Text:
    """One probe alone, without padding, and what it is measured by.

    `put` holds per layer what takes the place of each head's z, [head, d_head].
    """

    shadow: Shadow
    tokens: Int[Tensor, " pos"]
    positions: Int[Tensor, " kept"] | None
    score: Score
    put: Mapping[int, Tensor]
    rows: int

    def ablated(self, heads: Sequence[tuple[int, int]]) -> Float[np.ndarray, "head measure"]:
        """The effects of these heads, (layer, head), each computed from its layer on."""
        each = torch.arange(self.shadow.n_heads, device=self.tokens.device).split(1)
        without = [
            Variants(i, z_hook(i), each[head], partial(_remove, self.put[i])) for i, head in heads
        ]
        _, found = effects(
            self.shadow,
            self.tokens,
            without,
            self.score,
            positions=self.positions,
            rows=self.rows,
        )
        return torch.cat(found).cpu().numpy()

    def estimated(
        self,
    ) -> tuple[Float[np.ndarray, "head measure"], Float[np.ndarray, "head measure"]]:
        """First-order effects of all heads, layer by layer, and their reach."""
        names = [z_hook(layer) for layer in self.put]
        logits, z = captured(self.shadow, self.tokens, names, self.positions, grad=True)
        with torch.enable_grad():
            (score,) = self.score(logits)
        away = [(r - z[z_hook(i)].detach().float())[0] for i, r in self.put.items()]
        estimates, reaches = [], []
        for value in score:
            slopes = torch.autograd.grad(value, list(z.values()), retain_graph=True)
            # Layer by layer, [pos, head, d_head]: d_head may differ between layers.
            pairs = [(a, slope[0].float()) for a, slope in zip(away, slopes, strict=True)]
            estimates.append(torch.cat([(a * s).sum((0, 2)) for a, s in pairs]))
            reaches.append(torch.cat([(a.norm(dim=2) * s.norm(dim=2)).sum(0) for a, s in pairs]))
        estimate, reach = (torch.stack(of, dim=1).cpu().numpy() for of in (estimates, reaches))
        return estimate, reach


def _text(
    shadow: Shadow,
    batch: ProbeBatch,
    row: int,
    measures: Sequence[str],
    put: Mapping[int, Tensor],
    rows: int,
) -> _Text:
    tokens = batch.tokens[row, : batch.lengths[row]]
    target, foil = batch.targets[row], batch.foils[row]

    def score(logits: Float[Tensor, "variant kept vocab"]) -> Float[Tensor, "variant measure"]:
        last = logits[:, -1].float()
        values = {}
        if target is not None:
            values["loss"] = last.logsumexp(1) - last[:, target]
        if target is not None and foil is not None:
            values["logit_diff"] = last[:, target] - last[:, foil]
        if "token_loss" in measures:
            # One variant at a time: float32 copies of all would be several times the logits.
            each = [F.cross_entropy(of[:-1].float(), tokens[1:]) for of in logits]
            values["token_loss"] = torch.stack(each)
        return torch.stack([values[measure] for measure in measures], dim=1)

    last = torch.tensor([len(tokens) - 1], device=tokens.device)
    positions = None if "token_loss" in measures else last
    return _Text(shadow, tokens, positions, score, put, rows)


def _remove(put: Float[Tensor, "head d_head"], z: Tensor, heads: Int[Tensor, " variant"]) -> None:
    variant = torch.arange(len(heads), device=z.device)
    z[variant, :, heads] = put[heads][:, None].to(z.dtype)


def _errors(
    estimate: Float[np.ndarray, "head measure"], exact: Float[np.ndarray, "head measure"]
) -> Float[np.ndarray, "measure 2"]:
    """Largest error and rank correlation of the estimates, per measure."""
    largest = np.abs(estimate - exact).max(0)
    # What is equal, as many effects in half precision are, shares a rank.
    a, b = (np.sign(e[:, None] - e).sum(1) for e in (estimate, exact))
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    with np.errstate(invalid="ignore"):
        return np.stack([largest, (a * b).sum(0) / size], axis=1)
