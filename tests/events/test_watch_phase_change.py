"""The event of a new induction head comes when the model turns, and where it does only."""

import itertools

import pytest
import torch

from examples.induction import BATCH, VOCAB, model, repeated_blocks
from tlens_callback import HeadScores, ProbeBatch, Shadow, Watch, observe
from tlens_callback.probes.builtin import repeated_blocks as several_lengths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EVERY = 10


def watched(*, layers: int, seed: int, steps: int) -> tuple[list[int], list[float]]:
    """Trains in a plain loop, up to four observations beyond the turn.

    Returns:
        The observations at which induction heads were announced, and at every observation the
        loss on the second of two blocks, which only copying brings down.
    """
    torch.manual_seed(seed)
    live = model(layers)
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3)
    shadow, watch = Shadow(live), Watch()
    batch = ProbeBatch.encode(several_lengths(64), vocab_size=VOCAB)
    announced, losses = [], []

    def look():
        for reading in watch.look(observe(shadow, batch, [HeadScores()])):
            events = reading.texts if reading.measure == "events" else ()
            if any("new induction head" in event for event in events):
                announced.append(len(losses))
        losses.append(second_block_loss(live, batch))

    look()
    data = repeated_blocks(steps * BATCH, seed=seed)
    for step, tokens in enumerate(data.split(BATCH), start=1):
        live(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            look()
            if (turned := turn(losses)) is not None and len(losses) > turned + 4:
                break
    return announced, losses


@torch.no_grad()
def second_block_loss(live, batch: ProbeBatch) -> float:
    """Mean over the blocks' second tokens to last, of the second time they are seen."""
    log_p = live(batch.tokens).logits.log_softmax(-1)
    losses = []
    for row, probe in enumerate(batch.probes):
        at = torch.arange(probe.block + 1, 2 * probe.block)
        losses.append(-log_p[row, at, batch.tokens[row, at + 1]].mean())
    return float(torch.stack(losses).mean())


def turn(losses: list[float]) -> int | None:
    """The observation after the steepest fall, if one takes off more than half a nat."""
    falls = [before - after for before, after in itertools.pairwise(losses)]
    if not falls or max(falls) < 0.5:
        return None
    return 1 + falls.index(max(falls))


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_the_event_comes_within_two_observations_of_the_turn(seed):
    announced, losses = watched(layers=2, seed=seed, steps=400)
    turned = turn(losses)
    assert turned is not None, "the model has to turn for this test to say anything"
    assert announced and abs(announced[0] - turned) <= 2


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_one_layer_raises_none(seed):
    announced, losses = watched(layers=1, seed=seed, steps=320)
    assert turn(losses) is None
    assert announced == []
