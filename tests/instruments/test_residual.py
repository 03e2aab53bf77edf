"""ResidualNorms equals numpy on the output of Hugging Face's layers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from tests.instruments.common import (
    BLOCKS,
    PROBES,
    TEXTS,
    encoded,
    hugging_face,
    ids,
    of_layers,
    played,
    readings,
)
from tests.instruments.common import shadow as shadow_of
from tlens_callback import Probe, ResidualNorms


def norms(model: Any, probes=TEXTS, skip: int = 1) -> np.ndarray:
    """[layer, token], of forward passes of each probe alone."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    assert len(layers) == model.config.num_hidden_layers
    out: list[list[float]] = [[] for _ in layers]
    for probe in probes:
        handles = []
        for i, layer in enumerate(layers):

            def listen(module, args, output, i=i):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden.double().numpy().reshape(-1, hidden.shape[-1])
                out[i] += [float(np.sqrt((h * h).sum())) for h in hidden[skip:]]

            handles.append(layer.register_forward_hook(listen))
        with torch.no_grad():
            model(ids(probe))
        for handle in handles:
            handle.remove()
    return np.array(out)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_hugging_face(family):
    got = readings(ResidualNorms(), shadow_of(family))
    expected = norms(hugging_face(family))
    assert got["residual_norms/median"].values == pytest.approx(
        np.median(expected, axis=1), rel=1e-5
    )
    upper, lower = np.percentile(expected, [75, 25], axis=1)
    assert got["residual_norms/spread"].values == pytest.approx(upper - lower, rel=1e-4)
    assert (got["residual_norms/ratio"].values == 1).all()
    # The check can fail: the first tokens are told apart.
    assert np.median(norms(hugging_face(family), skip=0), axis=1) != pytest.approx(
        np.median(expected, axis=1), rel=1e-4
    )


def test_ratio_to_the_first_observation():
    instrument = ResidualNorms()
    readings(instrument, shadow_of("qwen2"))
    got = readings(instrument, shadow_of("qwen2", seed=1))
    first, second = (np.median(norms(hugging_face("qwen2", seed=s)), axis=1) for s in (0, 1))
    np.testing.assert_allclose(got["residual_norms/ratio"].values, second / first, rtol=1e-5)
    assert np.abs(second / first - 1).max() > 1e-3
    back = readings(instrument, shadow_of("qwen2"))
    assert (back["residual_norms/ratio"].values == 1).all()


def test_first_tokens_padding_and_repeated_blocks_are_left_out():
    probes = [Probe("a", [5, 6, 7]), BLOCKS[0], Probe("b", [8]), Probe("c", [9, 4, 3])]
    batch = encoded(probes)
    resid = torch.full((*batch.tokens.shape, 2), float("nan"))
    resid[0, 1], resid[0, 2] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    resid[3, 1], resid[3, 2] = torch.tensor([6.0, 8.0]), torch.tensor([-2.0, 0.0])
    instrument = ResidualNorms()
    for scale, dtype in ((1.0, torch.float32), (2.0, torch.bfloat16)):
        streams = of_layers("hook_resid_post", [(scale * resid).to(dtype)] * 2)
        got = {r.measure: r.values for r in played(instrument, batch, streams).values()}
        # Norms 1, 2, 5, 10.
        np.testing.assert_array_equal(got["median"], [3.5 * scale] * 2)
        np.testing.assert_array_equal(got["spread"], [4.5 * scale] * 2)
        np.testing.assert_array_equal(got["ratio"], [scale] * 2)


def test_padding_and_company_do_not_matter():
    alone = readings(ResidualNorms(), shadow_of("gpt2"), TEXTS)
    together = readings(ResidualNorms(), shadow_of("gpt2"), tuple(reversed(PROBES)))
    for key, reading in alone.items():
        np.testing.assert_allclose(together[key].values, reading.values, rtol=1e-5)


def test_no_tokens_no_readings():
    probes = [Probe("one", [5]), *BLOCKS]
    assert ResidualNorms().taps(shadow_of("llama"), encoded(probes)) == {}
    assert readings(ResidualNorms(), shadow_of("llama"), probes) == {}
