"""Parameters that `torch.nn.utils.parametrize` computes are read; other substitutes are refused."""

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm

from tests import tiny
from tests.adapters import randomise
from tests.shadow.test_shadow import batch_for, gap, hugging_face_logits, train
from tlens_callback import FrozenWeights, Shadow, UpdateSparsity, observe
from tlens_callback.shadow.fidelity import compare


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(module):
    parametrize.register_parametrization(module, "weight", Doubled())


KINDS = {
    "doubled": doubled,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


def parametrised(kind, family="llama", **config):
    model = tiny.model(family, **config)
    layer = model.model.layers[0]
    torch.manual_seed(0)
    for module in (layer.self_attn.q_proj, layer.mlp.up_proj, model.lm_head):
        KINDS[kind](module)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_their_values_are_read_and_followed(kind):
    model = parametrised(kind)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    assert gap(model, shadow, batch) < 2e-5
    start = hugging_face_logits(model, batch)
    train(model, batch)
    assert float((hugging_face_logits(model, batch) - start)[batch.mask].abs().max()) > 0.1
    assert gap(model, shadow, batch) > 1e-2, "the control: it has not been synced"
    shadow.sync()
    assert gap(model, shadow, batch) < 2e-5 and compare(model, shadow, batch)[0].close
    assert shadow.builds == 1 and shadow.n_owned == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "OFT"])
def test_adapters_on_them_are_merged(kind, adapter):
    model = parametrised(kind)
    targets = ["q_proj", "v_proj", "up_proj"]
    if adapter == "OFT":
        config = OFTConfig(oft_block_size=4, r=0, target_modules=targets)
    else:
        config = LoraConfig(r=4, target_modules=targets, use_dora=adapter == "DoRA")
    model = get_peft_model(model, config)
    randomise(model, only_trainable=True)
    shadow = Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    with model.disable_adapter():
        assert gap(model, shadow, batch) > 1e-2, "the control: the adapter does something"
    assert gap(model, shadow, batch) < 1e-4


def test_reading_leaves_their_state_alone():
    """In training each use of a spectral norm turns its vectors a little further."""
    model = parametrised("spectral_norm").train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    shadow = Shadow.of(model)
    shadow.sync()
    compare(model, shadow, batch_for(shadow))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())
    _ = model.lm_head.weight
    assert any(not torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_instruments_that_read_weights_read_these():
    model = parametrised("doubled")
    shadow = Shadow.of(model)
    weights = {weight.name: weight for weight in shadow.mirror.weights()}
    lm_head = weights["lm_head.weight"]
    assert torch.equal(lm_head.value, 2 * model.lm_head.parametrizations.weight.original)
    assert lm_head.live is model.lm_head.parametrizations.weight.original and lm_head.trained
    batch = batch_for(shadow)
    assert observe(shadow, batch, [FrozenWeights(every=1), UpdateSparsity()])


# --- what cannot be read is named ---


def wrapped(model):
    model.lm_head = nn.Sequential(nn.Dropout(0.1), model.lm_head)


def of_a_class_of_its_own(model):
    class Holds(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    layer = model.model.layers[0].self_attn
    layer.q_proj = Holds(layer.q_proj)


def with_a_bias(model):
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)


def with_a_hook(model):
    old_weight_norm(model.model.layers[1].mlp.up_proj)


def pruned(model):
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", amount=0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (wrapped, "Module 'lm_head' of the live model is a Sequential that has no 'weight'"),
        (of_a_class_of_its_own, "'model.layers.0.self_attn.q_proj' .* is a Holds that has no"),
        (with_a_bias, "Module 'lm_head' of the live model is a Linear that has also 'bias'"),
        (with_a_hook, "'model.layers.1.mlp.up_proj' .* has no 'weight'"),
        (pruned, "'model.layers.1.mlp.up_proj' .* has no 'weight'"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_be_read_is_refused_by_name(change, says):
    model = tiny.model("llama")
    change(model)
    with pytest.raises(ValueError, match=says):
        Shadow.of(model)
