"""The live model is borrowed for a forward pass and comes back as it was."""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests import tiny
from tests.shadow.test_shadow import batch_for, gap, lora
from tlens_callback import FidelityError, Probe, ProbeBatch, Shadow
from tlens_callback.run.fidelity_monitor import FidelityMonitor
from tlens_callback.shadow.fidelity import compare
from tlens_callback.shadow.live import as_inference, foreign_attention


class Remembers(nn.Linear):
    """Leaves something of every kind behind at each call, as no one module does."""

    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.table = torch.zeros(2)
        self.longest, self.seen, self.by_length, self.lengths = 0, [1], {"a": 1}, {1}

    def forward(self, x):
        self.count += 1
        self.table.add_(1)
        self.replaced = torch.ones(4)
        self.register_buffer("more", torch.ones(1))
        self.longest, self.new = x.shape[1], "x"
        self.seen.append(x)
        self.by_length["a"] = 2
        self.lengths.add(x.shape[1])
        del self.__dict__["table"]
        return super().forward(x)


def test_all_that_a_forward_pass_leaves_is_put_back():
    module = Remembers()
    table, replaced, seen = module.table, module.replaced, module.seen
    before = dict(vars(module))
    with as_inference(module):
        module(torch.ones(2, 8))
        assert "new" in vars(module) and module.longest == 8 and module.count[0] == 1
    assert vars(module) == before and list(vars(module)) == list(before)
    assert module.table is table and table.tolist() == [0, 0]
    assert module.replaced is replaced and list(module._buffers) == ["count", "replaced"]
    assert module.count.tolist() == [0, 0, 0]
    assert module.seen is seen and module.seen == [1]
    assert module.by_length == {"a": 1} and module.lengths == {1}


# --- attention functions that somebody registers ---


def without_mask(module, query, key, value, attention_mask, **kwargs):
    kwargs["is_causal"] = False
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def twice_as_sharp(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scaling = 2 * (scaling or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def the_same(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


@contextmanager
def registered(function, name):
    """The function under this name; what had the name before has it again at the end."""
    functions = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = [dict(mapping) for mapping in functions]
    try:
        for mapping, one in zip(functions, (function, sdpa_mask), strict=True):
            mapping[name] = one
        yield
    finally:
        for mapping, old in zip(functions, before, strict=True):
            mapping.clear()
            mapping.update(old)


FAMILIES = ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["mine", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [without_mask, twice_as_sharp])
def test_another_attention_function_is_refused(family, name, dtype, function):
    with registered(function, name):
        model = lora(tiny.model(family).to(dtype))
        model.get_base_model().set_attn_implementation(name)
        shadow = Shadow.of(model)
        with pytest.raises(FidelityError) as error:
            FidelityMonitor().start(model, shadow, batch_for(shadow), step=0)
        if dtype == torch.bfloat16:
            assert f"attention function of its own ({name})" in str(error.value)
        assert model.get_base_model().config._attn_implementation == name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_attention_by_another_name_is_watched(family, dtype):
    with registered(the_same, "mine"):
        model = lora(tiny.model(family).to(dtype))
        model.get_base_model().set_attn_implementation("mine")
        shadow = Shadow.of(model)
        fidelity = FidelityMonitor().start(model, shadow, batch_for(shadow), step=0)
        assert fidelity.attention == ["mine"] and 0 < fidelity.attention_kl < 1e-3


def test_attention_of_transformers_is_not_foreign():
    model = tiny.model("llama")
    for name in ("eager", "sdpa", "flex_attention"):
        model.config._attn_implementation = name
        assert foreign_attention(model) == []
    with registered(functools.partial(sdpa_attention_forward, dropout=0.0), "part"):
        model.config._attn_implementation = "part"
        assert foreign_attention(model) == []
    with registered(the_same, "mine"):
        model.config._attn_implementation = "mine"
        assert foreign_attention(model) == ["mine"]


# --- rotary frequencies that depend on the inputs before ---


def remembers(rope: str):
    family, config = tiny.remembers(rope, context={"dynamic": 16, "longrope": 12}[rope])
    return tiny.model(family, **config)


@torch.no_grad()
def longest(model, length: int) -> torch.Tensor:
    return model(torch.arange(length)[None] % tiny.VOCAB).logits


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_what_an_input_computes_does_not_depend_on_a_comparison(rope):
    """Without the comparison the long input before decides about this one."""
    plain, model = remembers(rope), lora(remembers(rope), lora_dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    shadow = Shadow.of(model)
    probes = [Probe("short", "the cat sat"), Probe("longer", "John gave Mary a book")]
    batch = ProbeBatch.encode(probes, tiny.tokenizer(), vocab_size=tiny.VOCAB)
    for length in (40, 20, 5, 20):
        assert torch.equal(longest(plain, length), longest(model, length)), length
        rotary = model.get_base_model().model.rotary_emb
        before = rotary.inv_freq.clone(), rotary.inv_freq.data_ptr()
        fidelity, _ = compare(model, shadow, batch)
        assert fidelity.close, (length, str(fidelity))
        shadow.logits(batch.tokens)
        assert torch.equal(rotary.inv_freq, before[0]) and rotary.inv_freq.data_ptr() == before[1]


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("length", [5, 13, 20])
def test_the_shadow_computes_what_the_live_model_would_now(rope, length):
    model = remembers(rope)
    shadow = Shadow.of(model)
    tokens = torch.arange(length)[None]
    for before in (40, 14, 5, 30):
        longest(model, before)
        shadow.logits(torch.arange(8)[None])  # what the shadow has seen itself does not count
        mine = shadow.logits(tokens)
        assert torch.allclose(mine, longest(model, length), atol=2e-5), before


def test_what_was_seen_before_makes_a_difference():
    """The control: otherwise the tests above would say nothing."""
    model = remembers("dynamic")
    fresh = longest(model, 20)
    longest(model, 40)
    assert float((longest(model, 20) - fresh).abs().max()) > 1e-2
    shadow = Shadow.of(tiny.model("llama"))
    assert gap(tiny.model("llama"), shadow, batch_for(shadow)) < 2e-5
