"""UpdateSparsity counts what moved; FrozenWeights finds a single bit."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.instruments.common import encoded
from tests.shadow.test_shadow import batch_for, train
from tlens_callback import Reading, Shadow, observe
from tlens_callback.instruments import frozen
from tlens_callback.instruments.frozen import FrozenWeights, checksum
from tlens_callback.instruments.parts.module_grid import ModuleGrid
from tlens_callback.instruments.sparsity import UpdateSparsity, _entries
from tlens_callback.shadow.sources import Weight


def look(instrument: Any, shadow: Shadow) -> dict[str, Reading]:
    shadow.sync()
    return {reading.key: reading for reading in observe(shadow, encoded(), [instrument])}


def lora(**settings: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(tiny.model("llama"), LoraConfig(**config))


def move(model: Any, seed: int = 0) -> None:
    """Some entries of each weight by much, some by less than the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter += torch.where(drawn < 0.3, 0.01, torch.where(drawn < 0.5, 2e-6, 0.0))


def values(readings: dict[str, Reading]) -> dict[str, float]:
    """Module path -> share."""
    found = {}
    grid = readings["update_sparsity/share"]
    for layer, row in enumerate(grid.values):
        for module, value in zip(grid.labels["module"], row, strict=True):
            found[f"{layer}.{module}"] = float(value)
    if listed := readings.get("update_sparsity/share_elsewhere"):
        found |= dict(zip(listed.labels["weight"], listed.values.tolist(), strict=True))
    return found


def counted(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tolerance: float):
    """Path -> (unmoved, all), entry by entry."""
    found = {}
    for name, first in before.items():
        pairs = zip(first.flatten().tolist(), after[name].flatten().tolist(), strict=True)
        still = [abs(a - b) < tolerance for a, b in pairs]
        found[name] = sum(still), len(still)
    return found


def short(name: str) -> str:
    """ "model.layers.1.self_attn.q_proj.weight" -> "1.q_proj", as the readings have it."""
    name = name.removesuffix(".weight")
    if ".layers." in name:
        _, _, rest = name.partition(".layers.")
        layer, _, within = rest.partition(".")
        return f"{layer}.{within.rpartition('.')[2]}"
    return name


@pytest.mark.parametrize("sample", [None, 10**6])
@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_is_counted_entry_by_entry(sample, tied):
    model = tiny.model("llama", tie_word_embeddings=tied)
    shadow, instrument = Shadow.of(model), UpdateSparsity(sample=sample)
    start = look(instrument, shadow)
    assert all((reading.values == 1).all() for reading in start.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    got = look(instrument, shadow)
    count = counted(before, dict(model.named_parameters()), 1e-5)
    assert values(got) == pytest.approx({short(n): a / b for n, (a, b) in count.items()}, abs=1e-6)
    still, total = (sum(column) for column in zip(*count.values(), strict=True))
    assert got["update_sparsity/all"].values == pytest.approx(still / total, abs=1e-6)
    assert 0.65 < still / total < 0.75
    assert ("lm_head" in values(got)) is not tied, "a tied weight counts once"


def test_the_tolerance_decides():
    model = tiny.model("llama")
    shadow = Shadow.of(model)
    fine, coarse = UpdateSparsity(tolerance=1e-7), UpdateSparsity(tolerance=0.1)
    look(fine, shadow), look(coarse, shadow)
    move(model)
    assert 0.4 < look(fine, shadow)["update_sparsity/all"].values < 0.6
    assert look(coarse, shadow)["update_sparsity/all"].values == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_an_adapter_the_merged_weights_count(dtype):
    model = lora().to(dtype)
    shadow, instrument = Shadow.of(model), UpdateSparsity(sample=None)
    first = {}
    for weight in shadow.mirror.weights():
        if weight.trained:
            with shadow.layer(weight.layer):
                first[weight.name] = weight.value.clone()
    assert {short(n) for n in first} == {"0.q_proj", "1.q_proj", "0.down_proj", "1.down_proj"}
    look(instrument, shadow)
    train(model, batch_for(shadow), steps=1, lr=2e-4 if dtype == torch.float32 else 2e-2)
    got = look(instrument, shadow)
    merged = model.merge_and_unload().state_dict()
    count = counted(
        {n: v.float() for n, v in first.items()}, {n: merged[n].float() for n in first}, 1e-5
    )
    wanted = {short(n): a / b for n, (a, b) in count.items()}
    # PEFT rounds the update before it adds it, in bfloat16.
    assert values(got) == pytest.approx(wanted, abs=1e-3 if dtype == torch.float32 else 0.1)
    assert 0.01 < got["update_sparsity/all"].values < 0.99


def test_a_sample_estimates_the_share():
    """Within four standard errors, the same entries each time and at another start."""
    model = tiny.model("llama")
    shadow = Shadow.of(model)
    exact, few = UpdateSparsity(sample=None), UpdateSparsity(sample=400)
    look(exact, shadow), look(few, shadow)
    resumed = UpdateSparsity(sample=400)
    resumed.baseline.update({key: value.clone() for key, value in few.baseline.items()})
    move(model)
    whole, part = values(look(exact, shadow)), values(look(few, shadow))
    assert part == values(look(resumed, shadow))
    sizes = {short(n): p.numel() for n, p in model.named_parameters()}
    differ = 0
    for name, share in whole.items():
        if sizes[name] <= 400:
            assert part[name] == pytest.approx(share, abs=1e-6)
        else:
            assert abs(part[name] - share) < 4 * (share * (1 - share) / 400) ** 0.5
            differ += part[name] != share
    assert differ > 5, "it is a sample"
    assert sum(t.numel() for t in few.baseline.values()) <= 400 * len(whole)


def test_the_entries_that_are_followed_are_drawn_in_logical_order():
    """However a weight lies in storage, and without a copy of it."""
    weight = torch.arange(12.0).reshape(3, 4)
    drawn = torch.tensor([0, 5, 5, 11])
    assert _entries(weight, drawn).tolist() == [0, 5, 5, 11]
    assert _entries(weight.mT, drawn).tolist() == weight.mT.flatten()[drawn].tolist()
    assert weight.mT.flatten()[drawn].tolist() != [0, 5, 5, 11]


def test_weights_that_are_frozen_or_frozen_later():
    model = tiny.model("llama")
    model.get_parameter("model.norm.weight").requires_grad = False
    shadow, instrument = Shadow.of(model), UpdateSparsity()
    names = values(look(instrument, shadow))
    assert "model.norm" not in names and "lm_head" in names
    move(model)
    before = values(look(instrument, shadow))
    model.get_parameter("lm_head.weight").requires_grad = False
    after = values(look(instrument, shadow))
    assert after == {name: share for name, share in before.items() if name != "lm_head"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of this model is trained"):
        look(instrument, shadow)


def test_trained_elsewhere_than_in_the_base_weight():
    """modules_to_save and single trained tokens change the effective weight."""
    model = lora(modules_to_save=["lm_head"], trainable_token_indices=[5, 6])
    shadow, instrument = Shadow.of(model), UpdateSparsity(sample=None)
    look(instrument, shadow)
    train(model, batch_for(shadow), steps=1)
    got = values(look(instrument, shadow))
    assert got["lm_head"] < 0.5
    rows = tiny.VOCAB
    assert (rows - 2) / rows <= got["model.embed_tokens"] < 1


def test_a_weight_that_is_a_single_number(monkeypatch):
    """Some models scale a branch by one."""
    of = Shadow.of(tiny.model("llama"))
    number = torch.nn.Parameter(torch.tensor(1.0))
    scale = Weight("model.layers.0.scale", number, number, trained=True, layer=0)
    monkeypatch.setattr(of.mirror, "weights", lambda: [scale])
    for sample in (None, 50):
        instrument = UpdateSparsity(sample=sample)
        for moved, share in ((0.0, 1), (1e-6, 1), (1e-3, 0)):
            number.data += moved
            got = next(iter(instrument.read({}, of, encoded())))
            assert got.values.item() == share


def test_another_models_memory_is_refused():
    for sample in (None, 50):
        instrument = UpdateSparsity(sample=sample)
        look(instrument, Shadow.of(tiny.model("llama")))
        with pytest.raises(ValueError, match="another model"):
            look(instrument, Shadow.of(tiny.model("llama", vocab_size=128, hidden_size=48)))


@pytest.mark.parametrize("arguments", [{"tolerance": 0.0}, {"tolerance": -1.0}, {"sample": 0}])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match="UpdateSparsity"):
        UpdateSparsity(**arguments)


def test_places():
    names = ["embed", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.2.attn.c_proj", "h.2.mlp.c_proj"]
    grid = ModuleGrid.of([*names, "h.2.mlp.up", "vision.0.mlp.up", "norm"], "h")
    assert grid.layers == (0, 2) and grid.modules == ("attn.c_proj", "mlp.c_proj")
    np.testing.assert_array_equal(grid.grid, [[1, 2], [3, 4]])
    assert grid.outside == (0, 5, 6, 7)
    alone = ModuleGrid.of(["embed"], "h")
    assert alone.layers == () and alone.grid.size == 0 and alone.outside == (0,)
    apart = ModuleGrid.of(["h.0.up", "h.1.down"], "h")
    assert apart.layers == () and apart.outside == (0, 1)


# FrozenWeights


def watched(model: Any) -> tuple[Shadow, FrozenWeights]:
    shadow, instrument = Shadow.of(model), FrozenWeights()
    got = look(instrument, shadow)
    assert got["frozen_weights/changed"].values == 0
    assert got["frozen_weights/watched"].values == sum(
        "lora_" not in n and not p.requires_grad for n, p in model.named_parameters()
    )
    return shadow, instrument


def changed(instrument: FrozenWeights, shadow: Shadow) -> list[str]:
    got = look(instrument, shadow)
    named = got["frozen_weights/first_changed"]
    assert named.values.shape == (5,) and named.texts is not None
    names = [str(text) for text in named.texts if text]
    assert ((named.values >= 0) == (named.texts != "")).all()
    assert got["frozen_weights/changed"].values >= len(names)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_flipped_bit_is_found(dtype):
    model = lora().to(dtype)
    shadow, instrument = watched(model)
    train(model, batch_for(shadow))
    assert changed(instrument, shadow) == [], "the adapter was trained, the base was not"
    integers: Any = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    place = "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"
    bits = model.get_parameter(place).data.view(integers)
    bits[3, 7] ^= 1
    assert changed(instrument, shadow) == ["model.layers.1.mlp.down_proj.weight"]
    bits[3, 7] ^= 1
    assert changed(instrument, shadow) == []


def test_swapped_entries_rows_and_columns_are_found():
    model = lora()
    shadow, instrument = watched(model)
    weight = model.get_parameter("base_model.model.lm_head.weight").data
    first = weight.clone()
    for one, other in [((2, 3), (2, 9)), ((2, 3), (8, 3)), ((2, 3), (8, 9))]:
        weight[one], weight[other] = first[other], first[one]
        assert changed(instrument, shadow) == ["lm_head.weight"]
        weight.copy_(first)
    weight[[1, 2]] = first[[2, 1]]
    assert changed(instrument, shadow) == ["lm_head.weight"]
    weight.copy_(first[:, torch.arange(32).roll(1)])
    assert changed(instrument, shadow) == ["lm_head.weight"]
    weight.copy_(first)
    assert changed(instrument, shadow) == []


def test_merging_and_unmerging_is_found():
    """What trainers that generate with vLLM do: the base weights do not come back."""
    model = lora().bfloat16()
    shadow, instrument = watched(model)
    train(model, batch_for(shadow))
    model.merge_adapter()
    model.unmerge_adapter()
    assert "model.layers.0.self_attn.q_proj.weight" in changed(instrument, shadow)


@pytest.mark.parametrize(("columns", "bits"), [(5, np.int32), (6, np.int64), (600, np.int64)])
@pytest.mark.parametrize("at_once", [1, 2**15])
def test_the_checksum_against_python(columns, bits, at_once, monkeypatch):
    monkeypatch.setattr(frozen, "_IN_CACHE", at_once)
    weight = torch.randn(3, 2, columns, generator=torch.Generator().manual_seed(0))
    x = weight.numpy().view(bits).reshape(6, -1).astype(object)

    def hashed(sums: list[int]) -> int:
        words = [(s + 2**63) % 2**64 - 2**63 for s in sums]
        return sum((1 + 2 * i * 0x9E3779B97F4A7C15) * (s ^ (s >> 32)) for i, s in enumerate(words))

    expected = hashed(x.sum(1).tolist()), hashed(x.sum(0).tolist())
    assert [int(n) % 2**64 for n in checksum(weight)] == [n % 2**64 for n in expected]


def test_exchanged_entries_are_seen():
    """Also those that differ in nothing but their sign, in the upper half of a word."""
    first = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    first[0, 3], first[2, 5] = -first[0, 1], -first[0, 1]
    for (r, c), (s, d) in (((0, 1), (0, 3)), ((0, 1), (2, 5)), ((1, 0), (3, 0)), ((1, 2), (1, 6))):
        other = first.clone()
        other[r, c], other[s, d] = first[s, d], first[r, c]
        assert not torch.equal(checksum(first), checksum(other)), (r, c, s, d)


def test_special_values_and_shapes():
    def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
        return not torch.equal(checksum(one), checksum(other))

    assert differ(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert differ(torch.tensor([torch.nan]), torch.tensor([torch.inf]))
    assert not differ(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert differ(torch.tensor(1.0), torch.tensor(2.0))
    square = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    assert not differ(square.mT, square.mT.contiguous())
    assert differ(square.mT, square)


def test_nothing_frozen_and_frozen_later():
    model = tiny.model("llama")
    shadow, instrument = watched(model)
    model.get_parameter("lm_head.weight").requires_grad = False
    move(model)
    assert changed(instrument, shadow) == [], "compared with when it was frozen"
    model.get_parameter("lm_head.weight").data[0, 0] += 1
    assert changed(instrument, shadow) == ["lm_head.weight"]
    with pytest.raises(ValueError, match="every"):
        FrozenWeights(every=0)


@pytest.mark.parametrize("resumed", [False, True])
def test_layers_that_are_trained_in_turns_raise_no_alarm(resumed):
    """Also those that were trained between two looks; the final norm is still watched."""
    model = tiny.model("llama", num_hidden_layers=6)
    layers = model.model.layers
    shadow, instrument = watched(model)

    def train_layers(*chosen):
        for parameter in model.parameters():
            parameter.requires_grad = False
        for i in chosen:
            layers[i].requires_grad_(True)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)

    train_layers(0, 1)
    assert changed(instrument, shadow) == []
    train_layers(4, 5)
    train_layers(2, 3)
    if resumed:
        before, (shadow, instrument) = instrument.baseline, watched(model)
        instrument.baseline.update(before)
    assert changed(instrument, shadow) == []
    train_layers(4)
    assert changed(instrument, shadow) == []
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert changed(instrument, shadow) == ["model.norm.weight"], "what is not trained in turns"


def test_a_layer_that_is_frozen_for_good_is_watched_from_then_on():
    model = tiny.model("llama")
    shadow, instrument = watched(model)
    assert changed(instrument, shadow) == []
    model.model.layers[0].requires_grad_(False)
    assert changed(instrument, shadow) == [] and changed(instrument, shadow) == []
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert changed(instrument, shadow) == ["model.layers.0.mlp.up_proj.weight"]


def test_a_tied_weight_is_one_beneath_two_adapters():
    config = LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(tiny.model("llama", tie_word_embeddings=True), config)
    shadow, instrument = watched(model)
    model.get_input_embeddings().base_layer.weight.data[0] += 1
    assert changed(instrument, shadow) == ["model.embed_tokens.weight"]


def test_many_changes_are_counted_and_five_named():
    model = lora()
    shadow, instrument = watched(model)
    total = int(look(instrument, shadow)["frozen_weights/watched"].values)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data += 1
    assert len(changed(instrument, shadow)) == 5
    assert look(instrument, shadow)["frozen_weights/changed"].values == total > 5
