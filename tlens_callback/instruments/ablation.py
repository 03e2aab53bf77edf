"""Ablates heads one at a time and measures what that does to the answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.selection import (
    attention_layers,
    checked_selection,
    chosen_rows,
    layer_labels,
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
    """Measures how the loss and the logit difference of a probe change when one head is removed.

    Let z[pos] be a head's output before its output matrix (d_head numbers). It is replaced by r at
    every position of the probe, and everything after it is computed again:

    - loss: -ln softmax(logit)[target] at the last token; positive where the head helps.
    - logit_diff: logit[target] - logit[foil] at the last token; negative where the head helps. Of a
      target or foil of several tokens, here and in loss, the first counts.
    - token_loss: mean of -ln probability of the token, over all tokens except the first.

    Each reading is (the value with z := r) - (the value of the unchanged model). r is 0
    (`mode="zero"`), or the mean of the head's z (`mode="mean"`). The mean is over all tokens of all
    probes of the run that are not repeated blocks. Each token counts once, also the first of a
    text, so adding a probe changes r.

    Later layers repair: when a head is removed, other components write part of what it wrote. An
    effect may therefore be smaller than the head's direct attribution, or have the other sign.
    Zero is an output that the model was not trained on, and may do more harm than the loss of the
    information.

    `method="first_order"` estimates all heads from one backward pass for each measure:
    sum over pos and d_head of (r - z) . d(value)/dz. The estimate sees neither repair nor
    saturation: a head that carries an answer alone may have a slope of nearly 0, above all where
    the loss is near 0. Its error is measured each time, by ablating `checked` heads exactly. A
    third of them (rounded down) have the largest |estimate|. Another third have the largest reach
    among the others. The rest are evenly spaced over the remaining heads, in the order of layers
    and heads. Reach is the sum over pos of |r - z| |d(value)/dz|, with Euclidean norms over
    d_head. |estimate| and reach are divided by the largest of all heads, and each head is ranked
    by the measure in which this ratio is highest. A head that is not checked may have a larger
    error.

    Args:
        mode: what replaces z.
        method: exact ablation, or the first-order estimate.
        probes: names of the probes to ablate on; repeated blocks may be among them. Default:
            all that are not repeated blocks and have something to measure.
        tokens: also measure token_loss, on probes without a target too. This needs the logits of
            every token, for a whole batch at a time.
        checked: how many heads to ablate exactly to check the first-order estimate.
        rows: ablations computed together in one batch; fewer for a text so long that the batch
            would have more than 2048 tokens.
        every: measure at every n-th observation.

    Keys:
        head_ablation/loss/<probe>: [layer, head], nats, -inf..inf; for a probe with a target
        head_ablation/logit_diff/<probe>: [layer, head], logit, -inf..inf; for a probe with a foil
        head_ablation/token_loss/<probe>: [layer, head], nats, -inf..inf; if tokens, for a probe of
            at least two tokens
        head_ablation/loss_error/<probe>: [], nats, 0..inf; if first_order: maximum of
            |estimate - exact| over the checked heads
        head_ablation/logit_diff_error/<probe>: [], logit, 0..inf; the same for logit_diff
        head_ablation/token_loss_error/<probe>: [], nats, 0..inf; the same for token_loss
        head_ablation/loss_rank_correlation/<probe>: [], correlation, -1..1; if first_order:
            Spearman's, between estimate and exact over the checked heads; NaN where all estimates
            or all exact values are equal
        head_ablation/logit_diff_rank_correlation/<probe>: [], correlation, -1..1; the same for
            logit_diff
        head_ablation/token_loss_rank_correlation/<probe>: [], correlation, -1..1; the same for
            token_loss

    Reads:
        blocks.{layer}.attn.hook_z, for its mean; in forward passes of its own also
        blocks.{layer}.hook_resid_pre, from which the later layers are computed again

    Cost:
        Exact: per probe n_heads * layers * (layers + 1) / 2 passes of the probe through one layer,
        and n_heads * layers through the unembedding. Layers before the head run only where other
        heads of the same batch need them. First order: per probe one forward pass, one backward
        pass for each measure, and the `checked` heads exactly. In half precision, effects as small
        as its rounding are noise (bfloat16: 1/16 at logits of 8 to 16); the callback's
        `dtype=torch.float32` avoids that.

    Source:
        Michel et al. 2019 (heads switched off one at a time, and the gradient's estimate); Olsson
        et al. 2022 (ablation, zero and mean); Wang et al. 2022 (mean ablation); McGrath et al.
        2023 (repair by later layers).

    Raises:
        ValueError: an unknown mode or method, checked < 3, rows < 1, every < 1, an empty or
            repeated selection; from `taps`, an unknown probe, or nothing to measure; from `read`, a
            model whose hook_z has no head axis.
    """

    description: ClassVar[Description] = Description(
        title="Effect of removing a head",
        group="Heads",
        measures={
            f"{measure}{kind}": Meaning(title=f"{title}{of}", axes=axes, headline=True)
            for measure, title in {
                "loss": "Change in the answer's loss without a head",
                "logit_diff": "Change in the answer's lead without a head",
                "token_loss": "Change in a probe's loss without a head",
            }.items()
            for kind, of, axes in (
                ("", "", ("layer", "head")),
                ("_error", ": error of the estimate", ()),
                ("_rank_correlation", ": rank correlation of the estimate", ()),
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
                    f"HeadAblation({field}={getattr(self, field)!r}): choose one of {allowed}."
                )
        demand_numbers(self, checked=3, rows=1, every=1)
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction for each layer: what replaces z, [head, d_head]."""
        layers = attention_layers(shadow, type(self).__name__)
        if not self._rows(batch):
            raise ValueError(
                "HeadAblation has nothing to measure on these probes: none has a target. Give one "
                "a target, as in Probe('capital', 'The capital of France is', target=' Paris'), or "
                "use HeadAblation(tokens=True) for the loss of every token."
            )
        if self.mode == "zero":
            return {z_hook(i): lambda z: z.new_zeros(z.shape[2:]) for i in layers}
        plain = plain_rows(batch)
        if not plain:
            raise ValueError(
                "HeadAblation(mode='mean') averages over the probes that are not repeated blocks, "
                "and all probes are repeated blocks. Add a text, or give mode='zero'."
            )
        row = torch.tensor(plain, device=batch.tokens.device)
        counted = batch.mask[row][:, :, None, None]

        def mean(z: Float[Tensor, "probe pos head d_head"]) -> Float[Tensor, "head d_head"]:
            return z[row].float().where(counted, 0).sum((0, 1)) / counted.sum()

        return {z_hook(i): mean for i in layers}

    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Yields a matrix for each measure and probe, and its error if it is an estimate."""
        layers = attention_layers(shadow, type(self).__name__)
        replacement = {i: torch.as_tensor(taken[z_hook(i)]).to(shadow.device) for i in layers}
        for r in replacement.values():
            demand_heads(r, shadow, type(self).__name__)
        every_head = [(i, head) for i in layers for head in range(shadow.n_heads)]
        for row in self._rows(batch):
            measures = self._measures(batch, row)
            text = _text(shadow, batch, row, measures, replacement, self.rows)
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
        measurable = {
            "loss": batch.targets[row] is not None,
            "logit_diff": batch.foils[row] is not None,
            "token_loss": self.tokens and batch.lengths[row] > 1,
        }
        return [measure for measure, measured in measurable.items() if measured]

    def _sample(
        self, size: Float[np.ndarray, "head measure"], reach: Float[np.ndarray, "head measure"]
    ) -> list[int]:
        """Chooses the heads to check: largest estimates, largest reach, and some evenly spaced."""
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
    """One probe without padding, and the score that is measured on it.

    `replacement` holds for each layer what replaces each head's z, [head, d_head].
    """

    shadow: Shadow
    tokens: Int[Tensor, " pos"]
    positions: Int[Tensor, " kept"] | None
    score: Score
    replacement: Mapping[int, Tensor]
    rows: int

    def ablated(self, heads: Sequence[tuple[int, int]]) -> Float[np.ndarray, "head measure"]:
        """Ablates each of these heads, (layer, head), and returns the exact effects."""
        each = torch.arange(self.shadow.n_heads, device=self.tokens.device).split(1)
        without = [
            Variants(i, z_hook(i), each[head], partial(_remove, self.replacement[i]))
            for i, head in heads
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
        """Returns the first-order effects of all heads, layer by layer, and their reach."""
        names = [z_hook(layer) for layer in self.replacement]
        logits, z = captured(self.shadow, self.tokens, names, self.positions, grad=True)
        with torch.enable_grad():
            (score,) = self.score(logits)
        away = [(r - z[z_hook(i)].detach().float())[0] for i, r in self.replacement.items()]
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
    replacement: Mapping[int, Tensor],
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
    return _Text(shadow, tokens, positions, score, replacement, rows)


def _remove(
    replacement: Float[Tensor, "head d_head"], z: Tensor, heads: Int[Tensor, " variant"]
) -> None:
    variant = torch.arange(len(heads), device=z.device)
    z[variant, :, heads] = replacement[heads][:, None].to(z.dtype)


def _errors(
    estimate: Float[np.ndarray, "head measure"], exact: Float[np.ndarray, "head measure"]
) -> Float[np.ndarray, "measure 2"]:
    """Returns the largest error and the rank correlation of the estimates, for each measure."""
    largest = np.abs(estimate - exact).max(0)
    # Equal effects, which are frequent in half precision, share a rank.
    a, b = (np.sign(e[:, None] - e).sum(1) for e in (estimate, exact))
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    with np.errstate(invalid="ignore"):
        return np.stack([largest, (a * b).sum(0) / size], axis=1)
