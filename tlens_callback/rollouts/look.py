"""`Look`: looks at the latest rollouts, before the update that they lead to and after it."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tlens_callback.instruments.parts.predictions import compare
from tlens_callback.interfaces import Instrument
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.rollouts.features import Features
from tlens_callback.rollouts.inside import Part, inside, last_residuals, parts
from tlens_callback.rollouts.meanings import DESCRIPTION
from tlens_callback.rollouts.pairs import preferences
from tlens_callback.rollouts.readings import readings_of
from tlens_callback.rollouts.recorder import Recorder
from tlens_callback.rollouts.rollout import Rollout, chosen, rollouts_of
from tlens_callback.rollouts.seen import Seen
from tlens_callback.rollouts.settings import Rollouts
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.refusals import language_model

_MOVED, _POSITIONS = 10, 256
"""How many tokens gained and lost most, at how many positions, evenly among all."""

logger = logging.getLogger("tlens_callback")


class Look:
    """Looks at the rollouts of the latest generation with the shadow of a run.

    Attributes:
        settings: which rollouts, and how closely.
        recorder: where they come from.
        baseline: as an instrument's: the sums of what was compared at each observation.
        pairs: preferences of the training data, where nothing is sampled.
        base: the shadow of a copy of the model, if it is compared with one.
        has_base: whether the model can be looked at without its adapters; None: not known yet.
        latest: step of the latest rollouts that were looked at, and the readings that are not of
            single ones; None: none were looked at yet.
    """

    description = DESCRIPTION
    name = "rollouts"

    def __init__(self, settings: Rollouts, recorder: Recorder) -> None:
        self.settings = settings
        self.recorder = recorder
        self.baseline: dict[str, Tensor] = {}
        self.pairs: list[Rollout] = []
        self.base: Shadow | None = None
        self.has_base: bool | None = None
        self.latest: tuple[int, list[Reading]] | None = None
        self._said = False
        self._before: tuple[list[Part], list[Tensor], float, Seen] | None = None

    def before_update(
        self,
        shadow: Shadow,
        batch: ProbeBatch,
        model: Any,
        args: Any,
        step: int,
        instruments: Sequence[Instrument] = (),
    ) -> list[Reading]:
        """Looks at the latest rollouts with the weights that the shadow holds.

        Args:
            batch: any of the run, for its tokenizer and vocabulary.
            model, args: of the trainer.
            instruments: those whose features are read at the sampled tokens.

        Returns:
            The readings; none if nothing was sampled that can be looked at.

        Raises:
            ValueError: for rollouts that the model cannot read as text.
        """
        self._before = None
        generation = self.recorder.latest
        if generation is None:
            return []
        of, settings = rollouts_of(generation, self.recorder, batch, args, model), self.settings
        longest = settings.longest(batch.context)
        few = chosen(of, settings.groups, settings.per_observation, longest)
        if not few:
            self._say_why_not(of, longest)
            return []
        temperature = float(getattr(args, "temperature", 1.0) or 1.0)
        seen = self._see(shadow, batch, few, temperature, instruments)
        seen.dead = _dead_groups(of)
        seen.truncated = sum(not one.ended for one in of) / len(of)
        seen.age = None if generation.step is None else step - generation.step
        seen.names = self.recorder.names
        return self._read(seen, shadow, batch, step)

    def _read(self, seen: Seen, shadow: Shadow, batch: ProbeBatch, step: int) -> list[Reading]:
        found = [*readings_of(seen, self.settings, shadow, batch, self.baseline, step)]
        seen.features = None  # what it keeps on the device
        assert len({one.key for one in found}) == len(found)
        found = [one.described(DESCRIPTION) for one in found]
        self.latest = step, [one for one in found if "rollout" not in one.axes]
        return found

    def features(self, shadow: Shadow, instruments: Sequence[Instrument]) -> Features:
        """The features of instruments that are read; none if none are to be shown."""
        return Features.of(instruments if self.settings.features else (), shadow)

    def announced(self, model: Any) -> list[str]:
        """Says what a copy of the model will take, before it is made."""
        if self.settings.base != "copy":
            return []
        of = language_model(model)
        size = sum(p.numel() * p.element_size() for p in of.parameters()) / 2**20
        return [f"tlens: rollouts: the copy of the model takes {size:,.0f} MiB"]

    def meet(
        self, model: Any, dataset: Any, shadow: Shadow, instruments: Sequence[Instrument] = ()
    ) -> None:
        """Keeps a copy of the model, where it is wanted, and the preferences of the training data,
        where the trainer samples nothing.

        Raises:
            ValueError: for a copy of a model that is sharded; for features of an instrument at a
                hook point that the model does not have.
        """
        # One that does not fit the model is left out if it is optional, by who asks it first.
        asked = [one for one in instruments if not getattr(one, "optional", False)]
        self.features(shadow, asked)
        if self.settings.base == "copy":
            if shadow.ranks is not None and shadow.ranks.sharded:
                raise ValueError(
                    "Rollouts(base='copy') copies the whole model, and this one is sharded over "
                    "several processes. Leave it out, or train an adapter."
                )
            kept = copy.deepcopy(language_model(model)).requires_grad_(False)
            self.base = Shadow.of(kept, device=shadow.device, dtype=shadow.dtype)
        if not self.recorder:
            longest = self.settings.longest(shadow.context)
            self.pairs = preferences(dataset, self.settings.per_observation, longest)
            if not self.pairs:
                logger.warning(
                    "tlens: rollouts=Rollouts(...) has nothing to look at: this trainer was not "
                    "attached, look.attach(trainer), and its training data has no preferences, "
                    "neither pairs of chosen_ids and rejected_ids nor completions with labels."
                )

    def at_pairs(
        self,
        shadow: Shadow,
        batch: ProbeBatch,
        step: int,
        instruments: Sequence[Instrument] = (),
    ) -> list[Reading]:
        """Looks at the preferences of the training data, the same ones at each observation."""
        if not self.pairs:
            return []
        seen = self._see(shadow, batch, self.pairs, 1.0, instruments)
        return self._read(seen, shadow, batch, step)

    def after_update(self, shadow: Shadow) -> list[Reading]:
        """Looks at the same rollouts with the weights of now; nothing if none were looked at."""
        if self._before is None:
            return []
        (of, tokens, temperature, seen), self._before = self._before, None
        after = torch.cat(
            [
                compare(
                    shadow, last_residuals(shadow, part), None, ids, temperature=temperature
                ).numbers["logp"]
                for part, ids in zip(of, tokens, strict=True)
            ]
        )
        change = after.cpu() - seen.tokens["logp"][seen.order]
        seen.tokens = {"step_change": change[seen.back]}
        return [one.described(DESCRIPTION) for one in _after(seen)]

    def _see(
        self,
        shadow: Shadow,
        batch: ProbeBatch,
        few: Sequence[Rollout],
        temperature: float,
        instruments: Sequence[Instrument],
    ) -> Seen:
        of = parts(few, batch, self.settings.max_tokens)
        pair = _pair(few)
        now: list[Tensor] = []
        base: list[Tensor] = []
        each: list[Mapping[str, Tensor]] = []
        received: dict[int, Tensor] = {}
        features = self.features(shadow, instruments)
        for part in of:
            keys = [row for row, i in enumerate(part.which) if i in pair]
            resid, found, looked, more = inside(shadow, part, keys, features.taps(part))
            now.append(resid)
            if features.names:
                found["feature"] = features.means(more)
            each.append({name: value.float().cpu() for name, value in found.items()})
            for at, row in enumerate(keys if looked is not None else ()):
                assert looked is not None
                received[part.which[row]] = looked[at].cpu()
        if self.base is not None or self.can_leave_out(shadow):
            with shadow.without_adapters() if self.base is None else nullcontext():
                base = [last_residuals(self.base or shadow, part) for part in of]
        tokens = [part.tokens for part in of]
        n = sum(len(ids) for ids in tokens)
        compared = compare(
            shadow,
            torch.cat(now),
            torch.cat(base) if base else None,
            torch.cat(tokens),
            base_shadow=self.base,
            temperature=temperature,
            k=min(_MOVED, shadow.vocab_size) if base else 0,
            every=-(-n // _POSITIONS),
        )
        measures = {name: value.cpu() for name, value in compared.numbers.items()}
        seen = Seen.of(few, of, measures, each)
        seen.attention = {i: received[i] for i in pair if i in received}
        seen.features = features if features.names else None
        if base:
            seen.moved = {
                "gained": (compared.gained.cpu(), compared.gained_by.cpu()),
                "lost": (compared.lost.cpu(), compared.lost_by.cpu()),
            }
        if self.settings.after_update and not self.pairs:
            self._before = of, tokens, temperature, seen
        return seen

    def _say_why_not(self, of: Sequence[Rollout], longest: int) -> None:
        if self._said:
            return
        self._said = True
        shortest = min(len(one.prompt) for one in of)
        why = "all completions are empty, or their prompts unknown"
        if shortest >= longest:
            why = (
                f"the shortest prompt has {shortest} tokens, and at most {longest} of a rollout "
                f"are read; give a larger one, Rollouts(max_tokens=...)"
            )
        logger.warning("tlens: no rollout is looked at: %s.", why)

    def can_leave_out(self, shadow: Shadow) -> bool:
        """Whether the model can be looked at without its adapters."""
        if self.has_base is None:
            try:
                with shadow.without_adapters():
                    self.has_base = True
            except ValueError:
                self.has_base = False
        return self.has_base


def _pair(few: Sequence[Rollout]) -> list[int]:
    """The best and the worst rollout of the group that differs most; none if no group differs."""
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(few):
        groups.setdefault(one.group, []).append(i)

    def ends(of: list[int]) -> tuple[int, int]:
        ranked = sorted(of, key=lambda i: -few[i].advantage)
        return ranked[0], ranked[-1]

    pairs = [ends(of) for of in groups.values()]
    best = max(pairs, key=lambda pair: few[pair[0]].advantage - few[pair[1]].advantage)
    return [*best] if few[best[0]].advantage > few[best[1]].advantage else []


def _dead_groups(of: Sequence[Rollout]) -> float:
    gains: dict[int, set[float]] = {}
    for one in of:
        gains.setdefault(one.group, set()).add(one.advantage)
    return sum(len(values) == 1 for values in gains.values()) / len(gains)


def _after(seen: Seen) -> Iterator[Reading]:
    yield from seen.of_tokens()
    yield from seen.of_rollouts({"sum_step_change": seen.sums("step_change")})
    gain = seen.advantage
    if (weight := gain.abs().sum()) > 0:
        yield seen.curve("update_gain", (gain * seen.sums("step_change")).sum() / weight)
