"""`without_adapters`: nested, interrupted, synced inside; what it costs, and what it refuses."""

import copy
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig

from tests import tiny
from tests.adapters import CONFIGS, adapt, llama
from tests.adapters import lora as config
from tests.shadow.test_base import WAYS, equal
from tests.shadow.test_layers import Living, activations
from tests.shadow.test_shadow import gap, lora, train
from tests.shadow.test_shadow_tuners import batch_for
from tests.test_no_trace import sft, state_of
from tests.training import CAPITAL
from tlens_callback import LogitLens, MemorySink, Reading, Shadow, TLensCallback
from tlens_callback.shadow.interventions import captured
from tlens_callback.shadow.weights import unwrap

# PEFT warns about many of the configurations; none of the warnings is ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CHEAP = [("resident", None, 0.01), ("streamed", None, 0.01)]


def followed(how, of=None, **settings):
    """A model with LoRA, its shadow, a batch, and the logits of the base that was adapted."""
    untouched = tiny.model("llama")
    model = lora(copy.deepcopy(untouched), **settings)
    shadow = Shadow.of(model, weights=how, dtype=of)
    batch = batch_for(shadow)
    return model, shadow, batch, Shadow.of(untouched, dtype=of).logits(batch.tokens)


@pytest.mark.parametrize("how", WAYS)
def test_blocks_may_be_nested_and_may_fail(how):
    _, shadow, batch, base = followed(how)
    adapted = shadow.logits(batch.tokens)
    with shadow.without_adapters():
        with shadow.without_adapters():
            assert torch.equal(shadow.logits(batch.tokens), base)
        assert torch.equal(shadow.logits(batch.tokens), base)
        with pytest.raises(KeyboardInterrupt), shadow.without_adapters():
            raise KeyboardInterrupt
        assert torch.equal(shadow.logits(batch.tokens), base)
    with pytest.raises(ZeroDivisionError), shadow.without_adapters():
        shadow.run(batch, [{"blocks.0.attn.hook_z": lambda z: 1 / 0}])
    assert torch.equal(shadow.logits(batch.tokens), adapted)


@pytest.mark.parametrize("how", WAYS)
def test_a_sync_inside_follows_training_and_new_adapters(how):
    model, shadow, batch, base = followed(how, lora_dropout=0.0)
    with shadow.without_adapters():
        train(model, batch)
        assert torch.equal(shadow.logits(batch.tokens), base)
        shadow.sync()
        assert torch.equal(shadow.logits(batch.tokens), base) and shadow.builds == 1
    assert gap(model, shadow, batch) < 2e-5, "the sync reached the merged weights"
    with shadow.without_adapters():
        head = unwrap(model).lm_head
        head.weight.data = head.weight.data.clone() * 2
        shadow.sync()
        assert shadow.builds == 2
        assert torch.allclose(shadow.logits(batch.tokens), 2 * base, atol=1e-5)
        shadow.release()
        shadow.sync()
        assert torch.allclose(shadow.logits(batch.tokens), 2 * base, atol=1e-5)
    assert gap(model, shadow, batch) < 2e-5
    with shadow.without_adapters():
        shadow.release()


@pytest.mark.parametrize("how", WAYS)
def test_layers_and_weights_are_those_of_the_base_inside(how):
    model, shadow, batch, _ = followed(how)
    live = unwrap(model).model.layers[1].mlp.down_proj

    def weights():
        with shadow.layer(1) as block:
            (value,) = (w.value.clone() for w in shadow.mirror.weights() if w.name == name)
            return block.mlp.W_out.clone().mT, value

    name = "model.layers.1.mlp.down_proj.weight"
    wanted = live.base_layer.weight
    merged = weights()
    with shadow.without_adapters():
        assert all(torch.equal(found, wanted) for found in weights())
    assert all(torch.equal(*pair) for pair in zip(weights(), merged, strict=True))
    assert not torch.equal(merged[0], wanted)
    # A layer that is entered already, and one that stays so.
    with shadow.layer(1) as block:
        with shadow.without_adapters():
            assert torch.equal(block.mlp.W_out.mT, wanted)
            shadow.logits(batch.tokens)
            assert torch.equal(block.mlp.W_out.mT, wanted)
        assert torch.equal(block.mlp.W_out.mT, merged[0])


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_another_precision_than_the_models(how, of):
    """There the weights of the base are copies, also those of norms and of trained copies."""
    untouched = tiny.model("llama").to(torch.bfloat16)
    saved = {"modules_to_save": ["lm_head", "input_layernorm"], "target_modules": ["up_proj"]}
    model = lora(copy.deepcopy(untouched), **saved)
    shadow = Shadow.of(model, weights=how, dtype=of)
    batch = batch_for(shadow)
    train(model, batch)
    shadow.sync()
    adapted, bytes_held = activations(shadow, batch), shadow.extra_bytes
    wanted = activations(Shadow.of(untouched, dtype=of), batch)
    with shadow.without_adapters():
        assert equal(activations(shadow, batch), wanted) and shadow.extra_bytes == bytes_held
    assert equal(activations(shadow, batch), adapted) and not equal(adapted, wanted)


@pytest.mark.parametrize("how", WAYS)
def test_an_original_in_another_precision_than_its_trained_copy(how):
    model = lora(tiny.model("llama"), modules_to_save=["lm_head"], target_modules=["up_proj"])
    head = unwrap(model).lm_head
    head.original_module.to(torch.bfloat16)
    shadow = Shadow.of(model, weights=how)
    batch = batch_for(shadow)
    untouched = tiny.model("llama")
    untouched.lm_head.weight.data = head.original_module.weight.float()
    adapted = shadow.logits(batch.tokens)
    with shadow.without_adapters():
        assert torch.equal(shadow.logits(batch.tokens), Shadow.of(untouched).logits(batch.tokens))
    assert torch.equal(shadow.logits(batch.tokens), adapted)


@pytest.mark.parametrize("how", WAYS)
def test_adapters_that_are_disabled_or_several(how):
    model, shadow, batch, base = followed(how)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    shadow.sync()
    both = shadow.logits(batch.tokens)
    with model.disable_adapter():
        shadow.sync()
        for _ in range(2):
            with shadow.without_adapters():
                assert torch.equal(shadow.logits(batch.tokens), base)
            assert torch.equal(shadow.logits(batch.tokens), base)
    shadow.sync()
    with shadow.without_adapters():
        assert torch.equal(shadow.logits(batch.tokens), base)
    assert torch.equal(shadow.logits(batch.tokens), both) and not torch.equal(both, base)


def test_gradients_are_those_of_the_base_or_an_error():
    """Also if the backward pass comes after the block: never those of other weights."""
    model, resident, batch, _ = followed("resident")
    base = Shadow.of(tiny.model("llama"))
    name = "blocks.0.attn.hook_z"

    def gradient(shadow, end=lambda: None):
        logits, got = captured(shadow, batch.tokens[0], [name], grad=True)
        end()
        return torch.autograd.grad(logits.square().sum(), [got[name]])[0]

    wanted = gradient(base)
    with resident.without_adapters():
        assert torch.equal(gradient(resident), wanted)
    merged = gradient(resident)
    assert not torch.equal(merged, wanted)
    for end in (lambda stack: stack.close(), lambda stack: None):
        with ExitStack() as stack:
            stack.enter_context(resident.without_adapters())
            assert torch.equal(gradient(resident, lambda: end(stack)), wanted)  # noqa: B023
    streamed = Shadow.of(model, weights="streamed")
    with streamed.without_adapters():
        assert torch.equal(gradient(streamed), wanted)
    with ExitStack() as stack:
        stack.enter_context(streamed.without_adapters())
        with pytest.raises(RuntimeError, match="brought up to date after this forward pass"):
            gradient(streamed, stack.close)
    assert torch.equal(gradient(streamed), merged)


@pytest.mark.parametrize(("how", "of", "most"), [*CHEAP, ("resident", torch.float64, 1.5)])
def test_no_second_copy_of_the_weights_is_made(how, of, most):
    """Nor of a layer, where the dtype is the live model's; measured in layers."""
    model = lora(tiny.model("llama", num_hidden_layers=6, hidden_size=128, intermediate_size=256))
    shadow = Shadow.of(model, weights=how, dtype=of)
    layer = sum(p.nbytes for p in shadow.bridge.original_model.model.layers[0].parameters())
    with Living() as living, shadow.without_adapters():
        pass
    assert living.most < most * layer
    # The control: copies are seen.
    with Living() as living:
        kept = [w.live.clone() for w in shadow.mirror.weights()]
    assert kept and living.most > 6 * layer * (0.5 if of else 1)


def fails_once():
    failed = []

    def call(*_):
        if not failed:
            failed.append(True)
            raise ZeroDivisionError

    return call


def test_what_has_no_base_is_refused():
    shadow = Shadow.of(tiny.model("llama"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no adapter that could be left out"):
        shadow.without_adapters().__enter__()
    model, shadow, batch, base = followed("resident")
    model.merge_adapter()
    with pytest.raises(
        ValueError, match=r"merged into the live weights at the moment \(module 'mo"
    ):
        shadow.without_adapters().__enter__()
    model.unmerge_adapter()
    with shadow.without_adapters():
        assert torch.allclose(shadow.logits(batch.tokens), base, atol=1e-5)
    # What fails on its way in leaves everything as it was.
    before = shadow.logits(batch.tokens)
    for step in ("_Lent.add", "_Lent.shown", "refresh"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"tlens_callback.shadow.base.{step}", fails_once())
            with pytest.raises(ZeroDivisionError):
                shadow.without_adapters().__enter__()
        shadow.sync()
        assert torch.equal(shadow.logits(batch.tokens), before)
        with shadow.without_adapters():
            assert torch.allclose(shadow.logits(batch.tokens), base, atol=1e-5)


def test_what_has_become_of_the_base_is_said():
    def said(made, unfreeze=()):
        model = adapt(llama(bias=True), made)
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(unfreeze)):
                parameter.requires_grad_(True)
        return Shadow.of(model).changed_base

    assert said(config()) == said(config(modules_to_save=["lm_head"])) == ()
    assert said(config(), ["model.norm.weight"]) == (
        "Training changes 'model.norm.weight' of the base's own weights in place. They stay as "
        "trained when adapters are left out.",
    )
    (pissa,) = said(config(init_lora_weights="pissa_niter_4"))
    assert "initialised with init_lora_weights='pissa_niter_4'" in pissa
    assert "not the pretrained model" in pissa and "kasa_config" in said(CONFIGS["kasa"])[0]
    # LoftQ computes on a GPU only.
    model = adapt(llama(), config())
    model.peft_config["default"].init_lora_weights = "loftq"
    assert "init_lora_weights='loftq', which writes to" in Shadow.of(model).changed_base[0]
    biases, others = said(config(bias="all"), ["norm.weight"])
    assert "has bias='all', which trains biases of the base in place" in biases
    assert "'model.layers.0.input_layernorm.weight' and 4 more" in others


class FromBase:
    """An instrument that compares with the base: KL(now || base) at the last token, nats."""

    name = "from_base"

    def taps(self, shadow, batch):
        return {"last_logits": lambda logits: logits.log_softmax(-1)}

    def read(self, taken, shadow, batch):
        with shadow.without_adapters():
            (base,) = shadow.run(batch, [self.taps(shadow, batch)])
        kl = (taken["last_logits"].exp() * (taken["last_logits"] - base["last_logits"])).sum(-1)
        yield Reading(key="from_base/kl/capital", values=kl[0].numpy(), unit="nats")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.slow
def test_an_instrument_compares_with_the_base_and_leaves_no_trace(how, tmp_path):
    """Exactly 0 before the first update; other instruments and the training do not notice."""
    found = {}
    for made in ([], [FromBase()]):
        memory = MemorySink()
        look = TLensCallback(
            [CAPITAL],
            instruments=[*made, LogitLens()],
            sinks=[memory],
            every_n_steps=1,
            weights=how,
            on_error="raise",
            repeats=False,
        )
        found[bool(made)] = state_of(sft(tmp_path, [look], max_steps=3)), memory.readings
    (without, lens), (state, readings) = found[False], found[True]
    assert state == without
    kl = {step: float(reading.values) for step, reading in readings["from_base/kl/capital"].items()}
    assert kl[0] == 0 and min(kl[1], kl[2], kl[3]) > 1e-6
    for key, steps in lens.items():
        if key.startswith("logit_lens/"):
            for step, reading in steps.items():
                assert reading.values.tobytes() == readings[key][step].values.tobytes(), key
