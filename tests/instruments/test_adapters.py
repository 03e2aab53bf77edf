"""AdapterSpectrum equals what dense matrices in float64 give."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.instruments import test_contract as contract
from tests.instruments.common import encoded
from tests.shadow.test_shadow import batch_for, train
from tlens_callback import Reading, Shadow, observe
from tlens_callback.instruments import adapters
from tlens_callback.instruments.adapters import AdapterSpectrum, products

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(family: str = "llama", **settings: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(tiny.model(family), LoraConfig(**config))


def look(instrument: AdapterSpectrum, shadow: Shadow) -> dict[str, Reading]:
    shadow.sync()
    return {reading.key: reading for reading in observe(shadow, encoded(), [instrument])}


def dense(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Path -> PEFT's own update and the base weight, in float64."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and module.active_adapters:
            delta: Any = sum(
                module.get_delta_weight(name)
                for name in module.active_adapters
                if name in module.scaling
            )
            weight = module.get_base_layer().weight
            found[path] = delta.detach().double().numpy(), weight.detach().double().numpy()
    return found


def expected(update: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    sigma = np.linalg.svd(update, compute_uv=False)
    norm = math.sqrt(sum(float(x) ** 2 for x in update.ravel()))
    share = sigma / sigma.sum()
    entropy = -sum(p * math.log(p) for p in share if p > 1e-12)
    return {
        "norm": norm,
        "relative_norm": norm / math.sqrt((weight**2).sum()),
        "top": sigma[0],
        "stable_rank": norm**2 / sigma[0] ** 2,
        "effective_rank": math.exp(entropy),
    }


def at(readings: dict[str, Reading], measure: str, layer: int, module: str) -> np.ndarray:
    reading = readings[f"adapter_spectrum/{measure}"]
    assert reading.axes[:2] == ("layer", "module")
    return reading.values[layer, reading.labels["module"].index(module)]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("qwen2", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma3_text", {"r": 40}),
    ],
)
def test_equals_the_dense_update(family, settings):
    model = adapted(family, **settings)
    shadow = Shadow.of(model)
    train(model, batch_for(shadow))
    readings = look(AdapterSpectrum(k=6), shadow)
    updates = dense(model)
    grid = readings["adapter_spectrum/norm"]
    modules = grid.labels["module"]
    assert grid.values.shape == (2, len(modules)) and grid.values.size == len(updates)
    for path, (update, weight) in updates.items():
        within = path.split(".0.")[-1].split(".1.")[-1]
        (module,) = [name for name in modules if f".{within}".endswith(f".{name}")]
        layer = 0 if ".0." in path else 1
        for measure, value in expected(update, weight).items():
            got = at(readings, measure, layer, module)
            assert got == pytest.approx(value, rel=2e-5), (path, measure)
        sigma = np.linalg.svd(update, compute_uv=False)[:6]
        got = at(readings, "singular_values", layer, module)
        np.testing.assert_allclose(got, sigma[: len(got)], atol=1e-5 * sigma[0])
        assert at(readings, "rotation", layer, module) == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_runs_on_every_family(family):
    model = adapted(family, init_lora_weights=False)
    shadow, instrument = Shadow.of(model), AdapterSpectrum()
    for _ in range(2):
        readings = look(instrument, shadow)
        for key, reading in readings.items():
            assert np.isfinite(reading.values).all()
            assert (reading.values > 0).any(), key
        ranks = readings["adapter_spectrum/effective_rank"].values
        assert ((ranks > 1) & (ranks <= 4)).all()
    stacked = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    without_experts = {"q_proj", "k_proj", "v_proj", "o_proj", "gate"}
    names = set(readings["adapter_spectrum/norm"].labels["module"])
    assert not stacked or names == without_experts


def test_modules_of_one_name_are_told_apart():
    readings = look(AdapterSpectrum(), Shadow.of(adapted("gpt2")))
    names = readings["adapter_spectrum/norm"].labels["module"]
    assert names == ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    names = look(AdapterSpectrum(), Shadow.of(adapted("llama")))
    assert names["adapter_spectrum/norm"].labels["module"] == LLAMA


def factors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).double() for shape in shapes]


def test_singular_values_in_float64():
    """Small ones too: 1e-9 of the largest, where a Gram matrix has nothing left."""
    b, a = factors((3, 40, 5), (3, 5, 30))
    b[:, :, 1] *= 1e-4
    b[:, :, 2] *= 1e-9
    got, _ = products(b, a)
    np.testing.assert_allclose(got, torch.linalg.svdvals(b @ a)[:, :5], rtol=1e-5, atol=1e-13)
    tall = torch.linalg.svdvals(b[:, :3] @ a[:, :, :2])
    few, _ = products(b[:, :3], a[:, :, :2])
    assert few.shape == (3, 2)
    np.testing.assert_allclose(few, tall, rtol=1e-9)
    b[1, 0, 0] = torch.nan
    with_nan, _ = products(b, a)
    assert with_nan[1].isnan().all()
    torch.testing.assert_close(with_nan[[0, 2]], got[[0, 2]])


def test_columns_that_nearly_depend_are_not_lost_in_their_gram_matrix():
    b, a = factors((3, 40, 5), (3, 5, 30))
    b[1, :, 3] = b[1, :, 0] + 1e-9 * b[1, :, 3]
    a[2, 4] = a[2, 0]
    b[2, :, 2] = 0
    true = torch.linalg.svdvals(b @ a)[:, :5]
    np.testing.assert_allclose(products(b, a)[0], true, rtol=1e-5, atol=1e-13)


def test_a_gram_matrix_that_has_lost_a_singular_value_is_not_used():
    """Columns u and u + e v, of ones and minus ones at right angles, so that all is known by hand.

    Their Gram matrix is n [[1, 1], [1, 1 + e^2]]. The sums before rounding are whole multiples of e
    in each of their n terms but for e^2, which float64 cannot hold beside 1: the matrix comes out
    singular, in whatever order they are added.
    """
    n, e = 40, 2.0**-30
    u = torch.ones(n, dtype=torch.float64)
    v = torch.tensor([1.0, -1.0] * (n // 2), dtype=torch.float64)
    b, a = torch.stack([u, u + e * v], 1)[None], torch.eye(2, dtype=torch.float64)[None]
    assert torch.equal(b.mT @ b, torch.full((1, 2, 2), float(n), dtype=torch.float64))
    # Their product is the root of the determinant, n e; their squares add up to the trace.
    sigma = products(b, a)[0][0]
    assert sigma.square().sum() == pytest.approx(n * (2 + e**2), rel=1e-14)
    assert sigma.prod() == pytest.approx(n * e, rel=1e-5)  # the condition is 1 / e


def test_a_small_rotation_is_not_lost_in_float32():
    """1 - cosine of 1e-11, from factors in float32."""
    b, a, more = (x.float() for x in factors((4, 40, 5), (4, 5, 30), (4, 40, 5)))
    for apart in (1e-5, 1e-2, 1.0):
        other = b + apart * more
        now, last = (x.double() @ a.double() for x in (b, other))
        sigma, inner = products(b, a, other, a)
        assert inner is not None and sigma.dtype == torch.float64
        norms = now.flatten(1).norm(dim=1) * last.flatten(1).norm(dim=1)
        true = (now * last).sum((1, 2)) / norms
        off = 3e-7 * apart
        np.testing.assert_allclose(inner / norms, true, rtol=0, atol=off)
        np.testing.assert_allclose(sigma.square().sum(1), now.square().sum((1, 2)), rtol=1e-13)


def test_pieces_are_as_the_whole(monkeypatch):
    model = adapted()
    shadow, whole, pieces = Shadow.of(model), AdapterSpectrum(), AdapterSpectrum()
    train(model, batch_for(shadow), steps=1)
    look(whole, shadow), look(pieces, shadow)
    train(model, batch_for(shadow), steps=2)
    one = look(whole, shadow)
    monkeypatch.setattr(adapters, "_PIECE", 1)
    for key, reading in look(pieces, shadow).items():
        np.testing.assert_allclose(reading.values, one[key].values, rtol=1e-6, atol=1e-12)


def test_at_the_start_everything_is_zero_and_finite():
    model = adapted()
    shadow, instrument = Shadow.of(model), AdapterSpectrum()
    for _ in range(2):
        for key, reading in look(instrument, shadow).items():
            assert np.isfinite(reading.values).all()
            assert (reading.values == (1 if "rotation" in key else 0)).all(), key
    train(model, batch_for(shadow), steps=1)
    after = look(instrument, shadow)
    assert (after["adapter_spectrum/rotation"].values == 1).all(), "zero had no direction"
    assert (after["adapter_spectrum/norm"].values > 0).all()


def test_rank_one_is_effective_rank_one_exactly():
    model = adapted(r=1)
    shadow = Shadow.of(model)
    train(model, batch_for(shadow))
    readings = look(AdapterSpectrum(), shadow)
    assert (readings["adapter_spectrum/effective_rank"].values == 1).all()
    np.testing.assert_allclose(readings["adapter_spectrum/stable_rank"].values, 1, rtol=1e-6)
    assert readings["adapter_spectrum/singular_values"].values.shape == (2, 7, 1)


def test_rotation_is_the_cosine_with_the_last_update():
    model = adapted()
    shadow, instrument = Shadow.of(model), AdapterSpectrum()
    train(model, batch_for(shadow), steps=1)
    look(instrument, shadow)
    for _ in range(2):
        last = {path: update for path, (update, _) in dense(model).items()}
        train(model, batch_for(shadow), steps=2, lr=3e-2)
        readings = look(instrument, shadow)
        seen = []
        for path, (update, _) in dense(model).items():
            cosine = (update * last[path]).sum() / math.sqrt(
                (update**2).sum() * (last[path] ** 2).sum()
            )
            module, layer = path.split(".")[-1], int(".1." in path)
            got = at(readings, "rotation", layer, module)
            assert got == pytest.approx(cosine, abs=1e-6)
            seen.append(cosine)
        assert min(seen) < 0.95, "they do turn"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    np.testing.assert_allclose(
        look(instrument, shadow)["adapter_spectrum/rotation"].values, -1, atol=1e-6
    )


def test_a_rotation_survives_the_checkpoint():
    """What is in memory is all that it compares with."""
    model = adapted()
    shadow, instrument, resumed = Shadow.of(model), AdapterSpectrum(), AdapterSpectrum()
    train(model, batch_for(shadow), steps=1)
    look(instrument, shadow)
    train(model, batch_for(shadow), steps=1)
    last = look(instrument, shadow)["adapter_spectrum/rotation"].values
    resumed.baseline.update({key: value.clone() for key, value in instrument.baseline.items()})
    # A resumed run begins where the checkpoint was written, often an observation.
    again = look(resumed, shadow)["adapter_spectrum/rotation"].values
    assert (last < 1).all() and np.array_equal(last, again)
    train(model, batch_for(shadow), steps=2)
    one, other = (look(each, shadow) for each in (instrument, resumed))
    for key, reading in one.items():
        np.testing.assert_array_equal(reading.values, other[key].values)
    assert (other["adapter_spectrum/rotation"].values < 1).all()


def test_other_adapters_are_not_compared():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    shadow, instrument = Shadow.of(model), AdapterSpectrum()
    train(model, batch_for(shadow), steps=1)
    look(instrument, shadow)
    model.set_adapter("second")
    readings = look(instrument, shadow)
    assert readings["adapter_spectrum/norm"].labels["module"] == ("q_proj",)
    assert (readings["adapter_spectrum/rotation"].values == 1).all()


def test_several_active_adapters_are_one_update():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    shadow = Shadow.of(model)
    train(model, batch_for(shadow))
    readings = look(AdapterSpectrum(), shadow)
    for path, (update, weight) in dense(model).items():
        module, layer = path.split(".")[-1], int(".1." in path)
        for measure, value in expected(update, weight).items():
            assert at(readings, measure, layer, module) == pytest.approx(value, rel=2e-5)
    assert readings["adapter_spectrum/singular_values"].values.shape == (2, 7, 6)


@pytest.mark.parametrize("trained", [True, False])
def test_an_update_is_compared_with_a_weight_that_is_trained_too(trained):
    model = adapted()
    shadow, instrument = Shadow.of(model), AdapterSpectrum()
    train(model, batch_for(shadow))
    bases = [m.weight for n, m in model.named_modules() if n.endswith("base_layer")]
    for weight in bases:
        weight.requires_grad_(trained)
    first = look(instrument, shadow)["adapter_spectrum/relative_norm"].values
    with torch.no_grad():
        for weight in bases:
            weight *= 2
    again = look(instrument, shadow)["adapter_spectrum/relative_norm"].values
    # The size of a frozen weight is measured once.
    np.testing.assert_allclose(again, first / 2 if trained else first, rtol=1e-6)


def test_what_is_not_in_every_layer_is_listed():
    model = adapted(target_modules=["embed_tokens", "lm_head", "q_proj", "layers.1.mlp.down_proj"])
    shadow = Shadow.of(model)
    train(model, batch_for(shadow))
    readings = look(AdapterSpectrum(k=3), shadow)
    assert readings["adapter_spectrum/norm"].labels == {"module": ("q_proj",)}
    listed = readings["adapter_spectrum/norm_elsewhere"]
    assert listed.labels["weight"] == (
        "model.embed_tokens",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    )
    updates = dense(model)
    for i, path in enumerate(listed.labels["weight"]):
        for measure, value in expected(*updates[path]).items():
            got = readings[f"adapter_spectrum/{measure}_elsewhere"].values[i]
            assert got == pytest.approx(value, rel=2e-5)
    assert readings["adapter_spectrum/singular_values_elsewhere"].axes == ("weight", "rank")


def test_one_adapted_layer_keeps_its_number():
    model = adapted(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    labels = look(AdapterSpectrum(), Shadow.of(model))["adapter_spectrum/norm"].labels
    assert labels == {"module": ("q_proj", "v_proj"), "layer": ("1",)}


def test_bfloat16_adapters_are_multiplied_in_float32():
    model = adapted().bfloat16()
    shadow = Shadow.of(model)
    train(model, batch_for(shadow))
    readings = look(AdapterSpectrum(), shadow)
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            b, a = (m["default"].weight.detach().double() for m in (module.lora_B, module.lora_A))
            norm = float((2 * b @ a).norm())
            got = at(readings, "norm", int(".1." in path), path.split(".")[-1])
            assert got == pytest.approx(norm, rel=1e-6)
    assert all(r.values.dtype == np.float32 for r in readings.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"use_dora": True}, None])
def test_says_why_where_there_is_nothing(settings):
    model = tiny.model("llama") if settings is None else adapted(**settings)
    with pytest.raises(ValueError, match="no active adapter of this model is plain LoRA"):
        look(AdapterSpectrum(), Shadow.of(model))
    with pytest.raises(ValueError, match="k >= 1"):
        AdapterSpectrum(k=0)


def test_the_live_model_is_left_as_it_was():
    model = adapted()
    shadow = Shadow.of(model)
    train(model, batch_for(shadow))
    before = {n: (p.clone(), p._version, p.requires_grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    look(AdapterSpectrum(), shadow)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        value, version, trained = before[name]
        assert torch.equal(value, parameter) and version == parameter._version
        assert trained == parameter.requires_grad


def test_documented_keys_are_the_emitted_ones():
    """The contract test looks at models without an adapter, on which there is nothing to see."""
    model = adapted(target_modules=["q_proj", "lm_head"])
    got = look(AdapterSpectrum(), Shadow.of(model))
    lines = {line["key"]: line for line in contract.documented(AdapterSpectrum)}
    assert lines.keys() == got.keys()
    for key, reading in got.items():
        assert ", ".join(reading.axes) == lines[key]["axes"]
        assert reading.unit == lines[key]["unit"]


def test_the_rest_of_the_contract():
    contract.test_is_a_frozen_dataclass_with_a_name(AdapterSpectrum)
    contract.test_says_what_it_reads_costs_and_comes_from(AdapterSpectrum)
    shadow = Shadow.of(adapted(init_lora_weights=False))
    one, again, named = (
        look(instrument, shadow)
        for instrument in (AdapterSpectrum(), AdapterSpectrum(), AdapterSpectrum(name="other"))
    )
    for key, reading in one.items():
        np.testing.assert_array_equal(reading.values, again[key].values)
        other = named[key.replace("adapter_spectrum", "other")]
        np.testing.assert_array_equal(reading.values, other.values)
