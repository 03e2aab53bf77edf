"""Induction heads are seen when they grow, and nothing else is taken for them."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from examples.induction import BATCH, VOCAB, model, repeated_blocks
from tlens_callback import HeadScores, Probe, ProbeBatch, Shadow, observe
from tlens_callback.probes.builtin import repeated_blocks as several_lengths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ONE_LENGTH = [Probe.repeated(f"repeat-16-{seed}", block=16, seed=seed) for seed in range(8)]


def train(
    *, layers: int, steps: int, lengths: tuple[int, int] = (8, 24), every: int = 80
) -> tuple[Shadow, list[float]]:
    """A plain training loop; `max_induction` at step 0 and after every so many steps."""
    torch.manual_seed(0)
    live = model(layers)
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3)
    data = repeated_blocks(steps * BATCH, seed=0, shortest=lengths[0], longest=lengths[1])
    shadow = Shadow(live)
    seen = [induction(shadow)]
    for step, tokens in enumerate(data.split(BATCH), start=1):
        live(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            seen.append(induction(shadow))
    return shadow, seen


def induction(shadow: Shadow, probes: Sequence[Probe] | None = None) -> float:
    """`head_scores/max_induction`, of the built-in lengths if no probes are given."""
    shadow.sync()
    batch = ProbeBatch.encode(probes or several_lengths(64), vocab_size=VOCAB)
    readings = {r.key: r.values for r in observe(shadow, batch, [HeadScores()])}
    return float(readings["head_scores/max_induction"])


@pytest.fixture(scope="module")
def two_layers() -> list[float]:
    return train(layers=2, steps=400)[1]


@pytest.fixture(scope="module")
def one_layer() -> list[float]:
    return train(layers=1, steps=320)[1]


@pytest.fixture(scope="module")
def positional() -> tuple[Shadow, list[float]]:
    return train(layers=2, steps=240, lengths=(16, 16))


def test_the_phase_change_is_seen(two_layers):
    assert two_layers[0] < 0.1
    assert two_layers[-1] > 0.5
    steepest = max(b - a for a, b in itertools.pairwise(two_layers))
    assert steepest > 0.3  # all at once, not bit by bit


def test_one_layer_never_shows_it(one_layer):
    assert max(one_layer) < 0.15


def test_a_positional_copy_is_no_induction_head(positional):
    """Trained on blocks of 16 alone, a model learns "attend 15 tokens back"."""
    _, seen = positional
    assert max(seen) < 0.2


def test_a_detector_of_one_length_takes_it_for_one(positional):
    """The control: at the length it was trained on, the positional copy scores like induction."""
    shadow, _ = positional
    assert induction(shadow, ONE_LENGTH) > 0.7
