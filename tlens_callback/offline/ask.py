"""`Asker` shows a model a prompt and explains its next token."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlens_callback.instruments import explaining
from tlens_callback.interfaces import Instrument
from tlens_callback.meaning import Quantity
from tlens_callback.offline.changes import LEAST_SAID, component
from tlens_callback.offline.stages import name_reading
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run.fidelity_monitor import FidelityMonitor
from tlens_callback.run.observe import observe
from tlens_callback.shadow import LAST_LOGITS, Shadow
from tlens_callback.shadow.fidelity import Fidelity
from tlens_callback.sinks import LocalSink
from tlens_callback.store import read_store

NEXT = 5
"""How many next tokens are named."""

WRITERS = 3
"""How many heads and MLPs are named."""


@dataclass(frozen=True)
class Answer:
    """The likeliest next tokens after a prompt, and the readings that explain them.

    Attributes:
        probe: the prompt, with target and foil.
        next_tokens: the five most likely next tokens, and the probability of each.
        target, foil: the token that is explained, and the one that it is compared with.
        fidelity: how close the shadow, which gave all numbers, is to the model on this prompt.
        readings: key -> reading, of all instruments that have something to measure in this model.
        left_out: for each of the other instruments, why it has nothing to measure; and what of a
            target or foil is not explained, if it is several tokens.
        name, step: name and training step of the model, for the page.
    """

    probe: Probe
    next_tokens: Sequence[tuple[str, float]]
    target: str
    foil: str
    fidelity: Fidelity
    readings: Mapping[str, Reading]
    left_out: Sequence[str] = ()
    name: str = "model"
    step: int = 0

    @property
    def writers(self) -> list[tuple[str, float]]:
        """The three heads and MLPs that add most to the target's lead over the foil.

        In logits before any soft cap; there are fewer if fewer add anything. A head is named
        L21H7, an MLP is named L21 MLP.
        """
        parts = [
            (component(effect, at), float(effect.values[at]))
            for effect in self._all(Quantity.DIRECT_EFFECT)
            for at in np.ndindex(effect.values.shape)
        ]
        towards = sorted((part for part in parts if part[1] > 0), key=lambda part: -part[1])
        return towards[:WRITERS]

    def lines(self) -> list[str]:
        """The answer as lines of text for a terminal."""
        target, foil = repr(self.target), repr(self.foil)
        lines = [f"{self.probe.name}:"]
        lines += [f"{p:7.3f}  {text!r}" for text, p in self.next_tokens]
        if self.target not in [text for text, _ in self.next_tokens]:
            probability = self._number(Quantity.ANSWER_PROBABILITY)
            rank = self._number(Quantity.ANSWER_RANK)
            likelier = f"{rank:.0f} token{'s are' if rank != 1 else ' is'} likelier"
            lines.append(f"{probability:7.2g}  {target}; {likelier}")
        lead = self._number(Quantity.ANSWER_LEAD)
        lines.append(f"  lead of {target} over {foil}: {lead:+.2f} logits")
        if writers := self.writers:
            named = ", ".join(f"{name} {logit:+.2f}" for name, logit in writers)
            parts = Quantity.DIRECT_TOTAL, Quantity.DIRECT_REMAINDER
            apart = abs(sum(self._number(part) for part in parts) - lead)
            # The parts add up to the lead before a soft cap.
            uncapped = ", in logits before the soft cap" if apart > LEAST_SAID else ""
            lines.append(f"  largest direct contributions to the lead{uncapped}: {named}")
        for lens in self._all(Quantity.NEXT_TOKEN)[:1]:
            assert lens.texts is not None
            first, last = int(self._number(Quantity.ANSWER_LAYER)), len(lens.values) - 1
            top = repr(str(lens.texts[-1, 0]))
            if first > last:
                lines.append(f"  the logit lens ends with {top}, not with {target}")
            elif first == last:
                lines.append(f"  the logit lens reads {target} after the last layer only (L{last})")
            else:
                lines.append(f"  the logit lens reads {target} after L{first} and each later layer")
        return lines + [f"  left out: {why}" for why in self.left_out]

    def save(self, path: str | Path) -> Path:
        """Writes the page as one HTML file, and makes the folders that it needs.

        Raises:
            OSError: if the file cannot be written.
        """
        title = re.sub(r"[^\w.-]+", "-", Path(self.name).name).strip(".-")[:100] or "model"
        with tempfile.TemporaryDirectory(prefix="tlens-") as folder:
            store = LocalSink(Path(folder) / title / self.probe.name, page=False)
            store.write(list(self.readings.values()), step=self.step)
            return read_store(store.path).page().save(path)

    def _all(self, quantity: Quantity) -> list[Reading]:
        return [one for one in self.readings.values() if one.meaning.quantity is quantity]

    def _number(self, quantity: Quantity) -> float:
        return next(float(one.values) for one in self._all(quantity) if not one.axes)


class Asker:
    """Keeps a model and its shadow, and shows them one prompt after another.

    Args:
        model: as `Shadow.of` takes it, with or without adapters; it is read and never changed.
        tokenizer: can be None for prompts that are token ids.
        name, step: the name and the training step of the model on the pages.
        device, dtype: device and precision of the shadow, as `Shadow.of` takes them.

    Raises:
        ValueError: as `Shadow.of`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "model",
        step: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name, self.step = name, step
        self.shadow = Shadow(model, device=device, dtype=dtype)

    def ask(self, probe: Probe, *, foil: str | int | None = None) -> Answer:
        """Shows the model a prompt, with its current weights, and explains the next token.

        The target is the probe's own, or else the likeliest next token; of several tokens, the
        first. The foil is the argument,
        or else the probe's own, or else the likeliest other token. The attribution then shows why
        the model writes the target and not the foil.

        Raises:
            ValueError: as `ProbeBatch.encode`; for a repeated block, for a target that equals the
                foil, and for a model whose logits are not finite.
            FidelityError: if the shadow does not compute what the model computes on this prompt.
        """
        if probe.block is not None:
            raise ValueError(
                "A repeated block has no answer to explain. Ask with a text, a chat or token ids."
            )
        shadow = self.shadow
        shadow.sync()
        bare = replace(probe, target=None, foil=None)
        batch = self._encode(bare)
        given = probe.target, probe.foil if foil is None else foil
        encoded = [() if one is None else self._answer(bare, one) for one in given]
        wanted = [next(iter(tokens), None) for tokens in encoded]
        fidelity = FidelityMonitor().start(self.model, shadow, batch, step=self.step)
        taken: Any = shadow.run(batch, [{LAST_LOGITS: _first_row}])[0]
        logits = taken[LAST_LOGITS].cpu()
        likeliest = logits.topk(min(NEXT, len(logits))).indices.tolist()
        target, other = _target_and_foil(wanted, likeliest)
        if target == other:
            raise ValueError(
                f"The target and the foil are the same token, {batch.token_text(target)!r}."
            )
        probe = replace(probe, target=target, foil=other)
        batch = self._encode(probe)
        left_out = [
            f"what follows {batch.token_text(tokens[0])!r} in the {role} {one!r}: only the next "
            f"token is explained"
            for role, one, tokens in zip(("target", "foil"), given, encoded, strict=True)
            if len(tokens) > 1
        ]

        def failed(instrument: Instrument, error: Exception) -> None:
            if not isinstance(error, ValueError):
                raise error
            left_out.append(f"{instrument.name}: {error}")

        readings = observe(shadow, batch, explaining(), on_error=failed) + fidelity.readings()
        # Readings about a run compare with an earlier observation, and there is none here.
        shown = [one for one in readings if not one.meaning.of_run] + [name_reading(self.name)]
        probabilities = logits.softmax(0)
        return Answer(
            probe=probe,
            next_tokens=[(batch.token_text(i), float(probabilities[i])) for i in likeliest],
            target=batch.token_text(target),
            foil=batch.token_text(other),
            fidelity=fidelity,
            readings={one.key: one for one in shown},
            left_out=left_out,
            name=self.name,
            step=self.step,
        )

    def _answer(self, bare: Probe, answer: str | int) -> tuple[int, ...]:
        return self._encode(replace(bare, target=answer)).target_tokens[0]

    def _encode(self, probe: Probe) -> ProbeBatch:
        return ProbeBatch.encode(
            [probe],
            self.tokenizer,
            vocab_size=self.shadow.vocab_size,
            context=self.shadow.context,
            device=self.shadow.device,
            placeholders=self.shadow.placeholders,
        )


def _first_row(logits: Float[Tensor, "probe vocab"]) -> Float[Tensor, " vocab"]:
    return logits[0].float()


def _target_and_foil(wanted: Sequence[int | None], likeliest: Sequence[int]) -> tuple[int, int]:
    """Fills in a target or a foil that is missing with the likeliest token that is left."""
    target, foil = wanted
    if target is None:
        target = next(token for token in likeliest if token != foil)
    if foil is None:
        foil = next(token for token in likeliest if token != target)
    return target, foil
