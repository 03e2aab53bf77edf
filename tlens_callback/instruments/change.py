"""Compares what the model predicts at each token with what its base predicts there."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.instruments.parts.predictions import Compared, compare, most_frequent
from tlens_callback.instruments.parts.selection import checked_selection, chosen_rows, resid_hook
from tlens_callback.instruments.parts.texts import token_texts
from tlens_callback.meaning import Description, Meaning, Needs
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import LAST_LOGITS, Reduce, Shadow, Taken
from tlens_callback.shadow.unembed import demand_equal, gap, unembed

_UNITS = {
    "log_ratio": "nats",
    "js": "nats",
    "entropy": "nats",
    "base_entropy": "nats",
    "rank": "rank",
    "base_rank": "rank",
    "kl": "nats",
}
"""The numbers that are compared at each token; `compare` computes them."""


@dataclass(frozen=True)
class TokenChange:
    """Compares what the model predicts at each token of a probe with what its base predicts.

    The base is the same model with every adapter left out; it runs over the same tokens at the same
    observation. Let p be the model's probabilities for the next token, p0 the base's, m = (p + p0)
    / 2 and y the token that comes next:

    - log_ratio = ln p(y) - ln p0(y): positive where training has made the token likelier.
    - js = (KL(p || m) + KL(p0 || m)) / 2, the Jensen-Shannon divergence: how far the whole
      prediction has moved, whichever token comes.
    - entropy = -sum p ln p, and base_entropy that of p0: how open the prediction is.
    - rank = number of tokens likelier than y under p, and base_rank under p0; 0 is the top.
    - mean_js, mean_abs_log_ratio and kl are the means of js, of |log_ratio| and of KL(p || p0) over
      the probe's tokens; KL in the direction of the penalty of reinforcement learning.
    - gained, lost: at each position, the last one included, the k tokens whose ln p - ln p0 is
      largest and above 0 are gained, and the k where it is smallest and below 0 are lost. Shown are
      the k tokens that are gained (lost) at most positions of all probes, and at what share of
      them; of equal shares, those with the larger sum of ln p - ln p0.

    The first token of a probe is predicted from nothing and has no numbers. Nothing is emitted for
    a probe of one token. While the adapter is still zero, every difference is exactly 0. With
    `rows`, the same is measured on the first rows of the training data, each cut to `length`
    tokens. They stay the same rows for the whole run, also if it is resumed.

    With PiSSA and its kind, or if training also changes weights of the base in place, the model
    without its adapter is not the pretrained model; `Shadow.changed_base` says so. Under full
    fine-tuning there is no base; `TokenLoss` compares with the first observation instead.

    Args:
        k: how many tokens are gained and lost at a position, and how many of them are shown.
        rows: how many rows of the training data to read.
        length: how many tokens of each of these rows to read.
        probes: names of the probes. Default: every probe that is not a repeated block.

    Keys:
        token_change/log_ratio/<probe>: [token], nats, -inf..inf; the labels are the
            tokens from the second on
        token_change/js/<probe>: [token], nats, 0..ln 2; with the same labels
        token_change/entropy/<probe>: [token], nats, 0..inf; with the same labels
        token_change/base_entropy/<probe>: [token], nats, 0..inf; with the same labels
        token_change/rank/<probe>: [token], rank, 0..vocab_size-1; with the same labels
        token_change/base_rank/<probe>: [token], rank, 0..vocab_size-1; with the same labels
        token_change/mean_js/<probe>: [], nats, 0..ln 2
        token_change/mean_abs_log_ratio/<probe>: [], nats, 0..inf
        token_change/kl/<probe>: [], nats, 0..inf
        token_change/gained: [rank], fraction, 0..1; with the tokens as texts
        token_change/lost: [rank], fraction, 0..1; with the tokens as texts
        token_change/rows_log_ratio: [row, pos], nats, -inf..inf; with the tokens from the
            second on as texts; NaN behind the end of a row
        token_change/rows_js: [row, pos], nats, 0..ln 2; with the same texts
        token_change/rows_mean_js: [], nats, 0..ln 2; over all tokens of these rows
        token_change/rows_mean_abs_log_ratio: [], nats, 0..inf; over all tokens of these rows
        token_change/rows_kl: [], nats, 0..inf; over all tokens of these rows
        token_change/rows_gained: [rank], fraction, 0..1; with the tokens as texts
        token_change/rows_lost: [rank], fraction, 0..1; with the tokens as texts

    Reads:
        blocks.{layer}.hook_resid_post of the last layer

    Cost:
        length * (d_model + 9 + 2 * k) per probe. One forward pass of its own, of the base over all
        probes, and two over the rows of training data; every position is unembedded twice. With
        four texts of 48 tokens and repeated blocks 1.2 times as long as the shared forward pass
        (SmolLM2-135M, LoRA, one CPU core). At most 2^25 of the base's logits are held.

    Source:
        Wang et al. 2025 (2506.01939: entropy, and the tokens at which a text forks); 2603.22446
        (Jensen-Shannon divergence by token); 2603.22117 (signed change of ln p).

    Raises:
        ValueError: k or length < 1, rows < 0; an empty or repeated selection; from `taps`, an
            unknown probe or k above the vocabulary; from `read`, a model without an adapter, or
            with a merged one, or a family whose output is not its unembedded final norm.
    """

    description: ClassVar[Description] = Description(
        title="What tokens have become",
        group="Changes",
        needs=Needs.ADAPTER,
        measures={
            "log_ratio": Meaning(
                title="How much likelier each token is than for the base",
                axes=("token",),
                headline=True,
                explanation="ln p of the token that comes, minus the same without the adapter.",
            ),
            "js": Meaning(
                title="How far the prediction of each token is from the base's",
                axes=("token",),
                headline=True,
                explanation="Jensen-Shannon divergence: 0 if nothing has changed, at most ln 2.",
            ),
            "entropy": Meaning(
                title="How open the prediction of each token is",
                axes=("token",),
                explanation="Entropy: 0 if one token is certain. Texts fork where it is large.",
            ),
            "base_entropy": Meaning(
                title="How open the base's prediction of each token is", axes=("token",)
            ),
            "rank": Meaning(title="Tokens likelier than each token", axes=("token",)),
            "base_rank": Meaning(
                title="Tokens likelier than each token for the base", axes=("token",)
            ),
            "mean_js": Meaning(
                title="Distance of the predictions from the base's, mean over tokens",
                axes=(),
                headline=True,
            ),
            "mean_abs_log_ratio": Meaning(
                title="Size of the change in ln p from the base, mean over tokens", axes=()
            ),
            "kl": Meaning(
                title="KL divergence from the base, mean over tokens", axes=(), headline=True
            ),
            "gained": Meaning(
                title="Tokens gained at most positions",
                axes=("rank",),
                headline=True,
                explanation="The share of the positions at which a token gains most.",
            ),
            "lost": Meaning(
                title="Tokens lost at most positions",
                axes=("rank",),
                headline=True,
                explanation="The share of the positions at which a token loses most.",
            ),
        }
        | {
            f"rows_{measure}": Meaning(title=title, axes=axes, headline=headline, sometimes=True)
            for measure, title, axes, headline in (
                ("log_ratio", "How much likelier each training token is", ("row", "pos"), False),
                ("js", "How far each training token is from the base", ("row", "pos"), False),
                ("mean_js", "Distance from the base, mean over training tokens", (), True),
                (
                    "mean_abs_log_ratio",
                    "Size of the change in ln p, mean over training tokens",
                    (),
                    False,
                ),
                ("kl", "KL divergence from the base, mean over training tokens", (), True),
                ("gained", "Tokens gained most in the training data", ("rank",), True),
                ("lost", "Tokens lost most in the training data", ("rank",), True),
            )
        },
    )

    k: int = 10
    rows: int = 0
    length: int = 128
    probes: Sequence[str] | None = None
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: str = "token_change"

    def __post_init__(self) -> None:
        demand_numbers(self, k=1, rows=0, length=1)
        object.__setattr__(self, "probes", checked_selection(self.probes, "probes"))

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping[str, Reduce]:
        """One reduction of the last layer: the residual stream of all probes, end to end."""
        if self.k > shadow.vocab_size:
            raise ValueError(
                f"TokenChange(k={self.k}): the vocabulary has {shadow.vocab_size} tokens."
            )
        rows = self._rows(batch)
        return _resid_taps(shadow, batch, rows) if rows else {}

    @torch.no_grad()
    def read(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch
    ) -> Iterator[Reading]:
        """Runs the base, and yields lines and numbers for each probe, and two lists of tokens."""
        if rows := self._rows(batch):
            found = self._compare(taken, shadow, batch, rows)
            for row, numbers in zip(rows, _by_row(found, batch, rows), strict=True):
                yield from self._of_probe(batch, row, numbers)
            yield from self._ranked("", found, batch)
        if (of_training := self._training(batch)) is not None:
            yield from self._of_training(shadow, of_training)

    def _of_probe(
        self, batch: ProbeBatch, row: int, numbers: Float[np.ndarray, "measure token"]
    ) -> Iterator[Reading]:
        probe = batch.probes[row].name
        for (measure, unit), values in zip(_UNITS.items(), numbers, strict=True):
            if measure != "kl":
                yield Reading(
                    key=f"{self.name}/{measure}/{probe}",
                    values=values,
                    axes=("token",),
                    unit=unit,
                    labels={"token": batch.labels[row][1:]},
                    limits=_limits(measure),
                )
        yield from self._means("", f"/{probe}", numbers)

    def _of_training(self, shadow: Shadow, batch: ProbeBatch) -> Iterator[Reading]:
        rows = list(range(len(batch.probes)))
        (taken,) = shadow.run(batch, [_resid_taps(shadow, batch, rows)])
        found = self._compare(taken, shadow, batch, rows)
        each = _by_row(found, batch, rows)
        width = max(batch.lengths) - 1
        texts = [[*labels[1:], *[""] * (width + 1 - len(labels))] for labels in batch.labels]
        for at, (measure, unit) in enumerate(_UNITS.items()):
            if measure in ("log_ratio", "js"):
                ends = [np.full(width - numbers.shape[1], np.nan) for numbers in each]
                lines = [np.append(one[at], end) for one, end in zip(each, ends, strict=True)]
                yield Reading(
                    key=f"{self.name}/rows_{measure}",
                    values=np.stack(lines),
                    axes=("row", "pos"),
                    unit=unit,
                    texts=np.array(texts),
                    limits=_limits(measure),
                )
        yield from self._means("rows_", "", np.concatenate(each, 1))
        yield from self._ranked("rows_", found, batch)

    def _means(
        self, kind: str, of: str, numbers: Float[np.ndarray, "measure token"]
    ) -> Iterator[Reading]:
        ratio, js, *_, kl = numbers
        means = {"mean_js": js, "mean_abs_log_ratio": abs(ratio), "kl": kl}
        for measure, values in means.items():
            yield Reading(
                key=f"{self.name}/{kind}{measure}{of}",
                values=values.mean(),
                unit="nats",
                limits=_limits(measure),
            )

    def _ranked(self, kind: str, found: Compared, batch: ProbeBatch) -> Iterator[Reading]:
        for measure, tokens, sizes in (
            ("gained", found.gained, found.gained_by),
            ("lost", found.lost, found.lost_by),
        ):
            token, share = most_frequent(tokens.cpu().numpy(), sizes.cpu().numpy(), self.k)
            yield Reading(
                key=f"{self.name}/{kind}{measure}",
                values=share,
                axes=("rank",),
                unit="fraction",
                limits=(0.0, 1.0),
                texts=token_texts(token, batch),
            )

    def _rows(self, batch: ProbeBatch) -> list[int]:
        return [row for row in chosen_rows(batch, self.probes) if batch.lengths[row] > 1]

    def _training(self, batch: ProbeBatch) -> ProbeBatch | None:
        """Returns the rows of the training data, which the baseline keeps; None without any."""
        if self.rows and "rows" not in self.baseline and batch.training is not None:
            limit = min(self.length, batch.context or self.length)
            given = [torch.tensor(ids[:limit]) for ids in batch.training(self.rows)]
            if given := [ids for ids in given if len(ids) > 1]:
                padded = torch.nn.utils.rnn.pad_sequence(given, True, padding_value=-1)
                self.baseline["rows"] = padded.to(batch.tokens.device)
        if not self.rows or "rows" not in self.baseline:
            return None
        kept = [[i for i in ids if i >= 0] for ids in self.baseline["rows"].tolist()]
        return batch.beside([Probe(f"row-{i}", ids) for i, ids in enumerate(kept)])

    def _compare(
        self, taken: Mapping[str, Taken], shadow: Shadow, batch: ProbeBatch, rows: Sequence[int]
    ) -> Compared:
        """Compares the residual stream in `taken` with that of the base.

        The base runs over the whole batch, in the shape of the pass that it is compared with:
        equal weights then give equal bits.
        """
        hook = resid_hook(shadow.n_layers - 1)
        keep, last, ends = _resid_taps(shadow, batch, rows)[hook], batch.last[rows[0]], []

        def keep_with_end(resid: Float[Tensor, "probe pos d_model"]) -> Taken:
            ends.append(resid[rows[0], last])
            return keep(resid)

        def check(logits: Float[Tensor, "probe vocab"]) -> Float[Tensor, ""]:
            return gap(unembed(shadow, ends.pop()), logits[rows[0]])

        with shadow.without_adapters():
            (got,) = shadow.run(batch, [{hook: keep_with_end, LAST_LOGITS: check}])
        base, now, off = got[hook], taken[hook], got[LAST_LOGITS]
        assert isinstance(base, Tensor) and isinstance(now, Tensor) and isinstance(off, Tensor)
        demand_equal(off, shadow, type(self).__name__)
        row, at = _positions(batch, rows)
        # At the last position of a row nothing comes next, and the number is not read.
        following = batch.tokens[row, (at + 1).clamp(max=batch.tokens.shape[1] - 1)]
        return compare(shadow, now.to(base), base, following, k=self.k)


def _positions(batch: ProbeBatch, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns row and position of every token of these rows, end to end."""
    places = [(row, at) for row in rows for at in range(batch.lengths[row])]
    row, at = torch.tensor(places, device=batch.tokens.device).T
    return row, at


def _resid_taps(shadow: Shadow, batch: ProbeBatch, rows: Sequence[int]) -> dict[str, Reduce]:
    row, at = _positions(batch, rows)
    return {resid_hook(shadow.n_layers - 1): lambda resid: resid[row, at]}


def _by_row(
    found: Compared, batch: ProbeBatch, rows: Sequence[int]
) -> list[Float[np.ndarray, "measure token"]]:
    """Returns the numbers of each row, at the tokens from the second on."""
    ends = np.cumsum([batch.lengths[row] for row in rows])
    numbers = torch.stack([found.numbers[measure] for measure in _UNITS]).cpu().numpy()
    return [part[:, :-1] for part in np.split(numbers, ends[:-1], axis=1)]


def _limits(measure: str) -> tuple[float, float] | None:
    return (0.0, math.log(2)) if measure.endswith("js") else None
