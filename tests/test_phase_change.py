"""Induction heads are seen when they grow, and nothing else is taken for them.

Each model is trained once. What is seen in it is `head_scores/max_induction`; what is announced,
the event of a new induction head; and what it is told by, the loss.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from examples.induction import VOCAB, model, repeated_blocks
from tests.marks import exhaustive
from tlens_callback import HeadScores, Probe, ProbeBatch, Shadow, Watch, observe
from tlens_callback.probes.builtin import repeated_blocks as several_lengths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
BATCH, LEARNING_RATE, EVERY = 32, 3e-3, 10
SEEDS = exhaustive([0, 1, 2, 3, 5], {1, 2, 3, 5})
ONE_LENGTH = [Probe.repeated(f"repeat-16-{seed}", block=16, seed=seed) for seed in range(8)]


@dataclass
class Trained:
    shadow: Shadow
    announced: list[int] = field(default_factory=list)
    """Observations at which a new induction head was announced."""
    induction: list[float] = field(default_factory=list)
    """`head_scores/max_induction` at every observation."""
    losses: list[float] = field(default_factory=list)
    """On the second of two blocks, at every observation: only copying brings it down."""

    @property
    def turned(self) -> int | None:
        """The observation after the steepest fall, if one takes off more than half a nat."""
        falls = [before - after for before, after in itertools.pairwise(self.losses)]
        if not falls or max(falls) < 0.5:
            return None
        return 1 + falls.index(max(falls))


@cache
def trained(*, layers: int, seed: int, steps: int, lengths: tuple[int, int] = (8, 24)) -> Trained:
    """A plain training loop, up to four observations beyond the turn."""
    torch.manual_seed(seed)
    live = model(layers)
    optimizer = torch.optim.AdamW(live.parameters(), lr=LEARNING_RATE)
    seen, watch = Trained(Shadow(live)), Watch()
    batch = ProbeBatch.encode(several_lengths(64), vocab_size=VOCAB)

    def look():
        readings = observe(seen.shadow, batch, [HeadScores()])
        of = {reading.key: reading for reading in readings}
        for reading in watch.look(readings):
            events = reading.texts if reading.measure == "events" else ()
            if any("new induction head" in event for event in events):
                seen.announced.append(len(seen.losses))
        seen.induction.append(float(of["head_scores/max_induction"].values))
        seen.losses.append(second_block_loss(live, batch))

    look()
    data = repeated_blocks(steps * BATCH, seed=seed, shortest=lengths[0], longest=lengths[1])
    for step, tokens in enumerate(data.split(BATCH), start=1):
        live(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            look()
            if seen.turned is not None and len(seen.losses) > seen.turned + 4:
                break
    return seen


@torch.no_grad()
def second_block_loss(live, batch: ProbeBatch) -> float:
    """Mean over the blocks' second tokens to last, of the second time they are seen."""
    log_p = live(batch.tokens).logits.log_softmax(-1)
    losses = []
    for row, probe in enumerate(batch.probes):
        at = torch.arange(probe.block + 1, 2 * probe.block)
        losses.append(-log_p[row, at, batch.tokens[row, at + 1]].mean())
    return float(torch.stack(losses).mean())


def induction(shadow: Shadow, probes: Sequence[Probe] | None = None) -> float:
    """`head_scores/max_induction`, of the built-in lengths if no probes are given."""
    shadow.sync()
    batch = ProbeBatch.encode(probes or several_lengths(64), vocab_size=VOCAB)
    readings = {r.key: r.values for r in observe(shadow, batch, [HeadScores()])}
    return float(readings["head_scores/max_induction"])


def two_layers(seed: int = 0) -> Trained:
    return trained(layers=2, seed=seed, steps=400)


def one_layer(seed: int = 0) -> Trained:
    return trained(layers=1, seed=seed, steps=320)


def positional() -> Trained:
    return trained(layers=2, seed=0, steps=240, lengths=(16, 16))


def test_the_phase_change_is_seen():
    seen = two_layers().induction
    assert seen[0] < 0.1
    assert seen[-1] > 0.5
    steepest = max(after - before for before, after in zip(seen, seen[3:], strict=False))
    assert steepest > 0.3  # all at once, within 30 of some 250 steps, not bit by bit


def test_one_layer_never_shows_it():
    assert max(one_layer().induction) < 0.15


def test_a_positional_copy_is_no_induction_head():
    """Trained on blocks of 16 alone, a model learns "attend 15 tokens back"."""
    assert max(positional().induction) < 0.2


def test_a_detector_of_one_length_takes_it_for_one():
    """The control: at the length it was trained on, the positional copy scores like induction."""
    assert induction(positional().shadow, ONE_LENGTH) > 0.7


@pytest.mark.parametrize("seed", SEEDS)
def test_the_event_comes_within_two_observations_of_the_turn(seed):
    seen = two_layers(seed)
    assert seen.turned is not None, "the model has to turn for this test to say anything"
    assert seen.announced and abs(seen.announced[0] - seen.turned) <= 2


@pytest.mark.parametrize("seed", SEEDS)
def test_one_layer_raises_none(seed):
    seen = one_layer(seed)
    assert seen.turned is None
    assert seen.announced == []
