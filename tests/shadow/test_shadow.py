"""The shadow equals the live model, follows its updates, and shares what it can."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tlens_callback import Probe, ProbeBatch, Shadow
from tlens_callback.shadow.fidelity import compare

PROBES = [
    Probe("short", "the cat sat"),
    Probe("long", "the capital of France is Paris and the capital of Italy is Rome"),
    Probe.repeated("repeat", block=8, times=3),
]

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def batch_for(shadow: Shadow) -> ProbeBatch:
    return ProbeBatch.encode(
        PROBES,
        tiny.tokenizer(),
        vocab_size=shadow.vocab_size,
        context=shadow.context,
        device=shadow.device,
    )


def lora(model: nn.Module, **kwargs) -> nn.Module:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": "all-linear"}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(**{**settings, **kwargs}))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return peft


def train(model: nn.Module, batch: ProbeBatch, steps: int = 3, lr: float = 1e-2) -> None:
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=lr)
    labels = batch.tokens.masked_fill(~batch.mask, -100)
    for _ in range(steps):
        model(input_ids=batch.tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def hugging_face_logits(model: nn.Module, batch: ProbeBatch) -> torch.Tensor:
    """The live model's own answer, padding masked as Hugging Face does it."""
    was, _ = model.training, model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask.long()).logits
    model.train(was)
    return logits


def gap(model: nn.Module, shadow: Shadow, batch: ProbeBatch) -> float:
    live = hugging_face_logits(model, batch)
    return float((live - shadow.logits(batch.tokens))[batch.mask].abs().max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shadow_equals_live_after_real_steps_with_lora(family):
    dropout = 0.0 if family in ("qwen3_moe", "mixtral") else 0.2  # PEFT: none on experts
    model = lora(tiny.model(family), lora_dropout=dropout)
    shadow = Shadow.of(model, weights="resident")
    batch = batch_for(shadow)
    before = gap(model, shadow, batch)
    start = hugging_face_logits(model, batch)
    train(model, batch)
    moved = float((hugging_face_logits(model, batch) - start)[batch.mask].abs().max())
    stale = gap(model, shadow, batch)
    shadow.sync()
    after = gap(model, shadow, batch)
    assert before < 2e-5 and after < 2e-5
    assert moved > 0.1 and stale > 0.5 * moved, "without the sync the shadow would be another model"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_fine_tuning_needs_no_sync_but_for_split_copies(family):
    model = tiny.model(family)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    start = hugging_face_logits(model, batch)
    train(model, batch, lr=3e-3)
    assert float((hugging_face_logits(model, batch) - start)[batch.mask].abs().max()) > 0.1
    assert shadow.n_owned == 0
    if family == "gpt_neox":
        assert shadow.extra_bytes > 0 and gap(model, shadow, batch) > 0.01
        shadow.sync()
    else:
        assert shadow.extra_bytes == 0
    assert gap(model, shadow, batch) < 2e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_precision_runs_and_is_the_live_model(family):
    """Against the live model's eager attention in the same precision, after steps with LoRA."""
    model = lora(tiny.model(family).to(torch.bfloat16), lora_dropout=0.0)
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    train(model, batch)
    shadow.sync()
    assert shadow.dtype == torch.bfloat16
    fidelity, _ = compare(model, shadow, batch)
    assert fidelity.close and fidelity.scale > 1
    assert fidelity.kl < 0.02


def test_extra_bytes_are_those_of_the_adapted_weights():
    model = lora(tiny.model("llama"), target_modules=["q_proj", "down_proj"])
    shadow = Shadow.of(model, weights="resident")
    adapted = [m.base_layer.weight for m in model.modules() if hasattr(m, "lora_A")]
    assert shadow.extra_bytes == sum(w.numel() * w.element_size() for w in adapted)
    live = {p.data_ptr() for p in model.parameters()}
    shared = [p for p in shadow.bridge.original_model.parameters() if p.data_ptr() in live]
    assert len(shared) + len(adapted) == len(list(shadow.bridge.original_model.parameters()))


def test_building_and_running_leaves_the_live_model_alone():
    model = lora(tiny.model("llama", attn_implementation="sdpa"))
    config, random_state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    versions = {n: (p._version, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    flags = [m.training for m in model.modules()]
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    shadow.sync()
    shadow.logits(batch.tokens)
    compare(model, shadow, batch)
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert flags == [m.training for m in model.modules()]
    assert versions == {
        n: (p._version, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()
    }


def test_another_dtype_takes_a_full_copy_that_follows():
    model = lora(tiny.model("llama").to(torch.bfloat16), modules_to_save=["lm_head"])
    shadow = Shadow.of(model, dtype=torch.float32)
    batch = batch_for(shadow)
    assert {p.dtype for p in shadow.bridge.original_model.parameters()} == {torch.float32}
    train(model, batch)
    shadow.sync()
    exact = copy.deepcopy(model).float()
    assert gap(exact, shadow, batch) < 2e-5
    head = shadow.bridge.original_model.get_output_embeddings().weight
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(head, trained.float())


def test_moved_storage_and_new_adapters_are_mapped_anew():
    model = lora(tiny.model("llama"), target_modules=["q_proj"])
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    norm = model.get_base_model().model.norm
    norm.weight.data = norm.weight.data.clone() * 1.5
    assert gap(model, shadow, batch) > 1e-2
    shadow.sync()
    assert gap(model, shadow, batch) < 2e-5 and shadow.builds == 2
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    shadow.sync()
    assert gap(model, shadow, batch) < 2e-5 and shadow.builds == 3
    shadow.sync()
    assert shadow.builds == 3


def test_taps_are_heard_under_the_names_asked_for_and_removed():
    shadow = Shadow.of(tiny.model("llama"))
    batch = batch_for(shadow)
    names = ["blocks.0.attn.hook_z", "blocks.0.attn.o.hook_in", "blocks.1.hook_resid_post"]
    taken = shadow.run(batch, [dict.fromkeys(names, lambda t: t.sum()), {names[0]: lambda t: t}])
    assert [list(got) for got in taken] == [names, names[:1]]
    assert all(not point.has_hooks() for point in shadow.hooks.values())
    with pytest.raises(ZeroDivisionError):
        shadow.run(batch, [{names[0]: lambda t: 1 / 0}])
    assert all(not point.has_hooks() for point in shadow.hooks.values())


def test_last_logits_are_those_of_each_probes_last_token():
    model = tiny.model("llama")
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    taken = shadow.run(batch, [{"last_logits": lambda t: t}, {"logits": lambda t: t}])
    only_last = shadow.run(batch, [{"last_logits": lambda t: t}])[0]["last_logits"]
    live = hugging_face_logits(model, batch)
    for i, length in enumerate(batch.lengths):
        assert torch.allclose(live[i, length - 1], only_last[i], atol=1e-5)
        assert torch.allclose(live[i, length - 1], taken[0]["last_logits"][i], atol=1e-5)
    assert torch.allclose(live[batch.mask], taken[1]["logits"][batch.mask], atol=1e-5)


def test_unknown_hook_is_refused_with_its_neighbours():
    shadow = Shadow.of(tiny.model("llama"))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_pattern"):
        shadow.run(batch_for(shadow), [{"blocks.0.attn.hook_patern": lambda t: t}])


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "phi3", "gpt_neox"])
def test_copies_of_layers_with_biases_follow_too(family):
    model = lora(tiny.model(family), bias="all")
    shadow = Shadow.of(model, dtype=torch.float64)
    batch = batch_for(shadow)
    train(model, batch)
    shadow.sync()
    assert gap(copy.deepcopy(model).double(), shadow, batch) < 2e-6  # norms compute in float32


def test_a_copy_of_a_layer_that_is_unfrozen_later_follows():
    model = tiny.model("llama")
    model.requires_grad_(False)
    shadow = Shadow.of(model, dtype=torch.float64, weights="resident")
    batch = batch_for(shadow)
    model.model.layers[1].requires_grad_(True)
    train(model, batch)
    model.requires_grad_(False)
    assert gap(model, shadow, batch) > 0.1
    shadow.sync()
    assert gap(model, shadow, batch) < 2e-5


def test_the_live_device_by_another_name_is_no_copy():
    assert Shadow.of(tiny.model("llama"), device="cpu:0").extra_bytes == 0


def test_a_head_of_another_precision_is_brought_to_the_models():
    """TRL's cast_lm_head_to_fp32, and trained copies that PEFT keeps in float32."""
    model = tiny.model("llama").to(torch.bfloat16)
    model.lm_head.float()
    shadow = Shadow.of(model)
    batch = batch_for(shadow)
    assert shadow.dtype == torch.bfloat16 and shadow.mirror.mixed
    assert compare(model, shadow, batch)[0].close
    exact = Shadow.of(model, dtype=torch.float32)
    assert gap(copy.deepcopy(model).float(), exact, batch) < 2e-5


def test_a_module_of_lower_precision_than_the_model_is_compared_as_such():
    model = tiny.model("llama")
    model.lm_head.to(torch.bfloat16)
    shadow = Shadow.of(model)
    assert shadow.dtype == torch.float32
    assert compare(model, shadow, batch_for(shadow))[0].close


def test_release_frees_what_the_shadow_holds_without_a_collection():
    model = lora(tiny.model("llama"))
    gc.collect()
    gc.disable()
    try:
        shadow = Shadow.of(model, weights="resident")
        held = [weakref.ref(own) for own in shadow.mirror._held]
        shadow.release()
        assert held and all(own() is None for own in held)
        shadow.sync()
        batch = batch_for(shadow)
        assert gap(model, shadow, batch) < 2e-5
    finally:
        gc.enable()


def test_release_lets_go_of_the_models_weights():
    """They are files mapped to memory: a norm's weight that is held holds the whole file."""
    model = tiny.model("llama")
    shadow = Shadow(model)
    shadow.logits(torch.tensor([[1, 20, 21]]))
    shadow.release()
    held = [v for module in shadow.bridge.modules() for v in vars(module).values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)
    shadow.sync()
    assert gap(model, shadow, batch_for(shadow)) < 2e-5


def test_hooks_at_the_output_see_every_position_whoever_else_listens():
    shadow = Shadow.of(tiny.model("llama"))
    batch = batch_for(shadow)
    taps = {"unembed.hook_out": lambda t: t, "last_logits": lambda t: t}
    taken = shadow.run(batch, [taps])[0]
    assert taken["unembed.hook_out"].shape[1] == batch.tokens.shape[1]
    assert taken["last_logits"].shape == (3, tiny.VOCAB)


def test_a_reduction_that_returns_no_tensor_is_named():
    shadow = Shadow.of(tiny.model("llama"))
    with pytest.raises(ValueError, match=r"hook_embed.*returned float"):
        shadow.run(batch_for(shadow), [{"hook_embed": lambda t: 1.0}])


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL)),
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=1, num_heads=4)
        ),
        lambda: nn.Sequential(tiny.model("llama")),
    ],
    ids=["masked", "classifier", "encoder-decoder", "holder"],
)
def test_what_is_no_causal_language_model_is_refused_by_name(make):
    with pytest.raises(ValueError, match="no causal language model"):
        Shadow.of(make())


def test_a_family_that_the_bridge_does_not_know_is_refused_with_its_reason(monkeypatch):
    class OwnForCausalLM(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="bridge cannot take a OwnForCausalLM"):
        Shadow.of(OwnForCausalLM(transformers.LlamaConfig(**SMALL)))


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor had that was made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return made


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_last_logits_take_one_row_of_the_vocabulary_per_probe(family):
    """However many lengths the probes have; and they are the same as those of all, but for the
    rounding of a product, which depends on its number of rows."""
    vocab = 20_000
    shadow = Shadow.of(tiny.model(family, vocab_size=vocab))
    probes = [Probe(f"p{n}", [(7 * n + i) % 90 + 3 for i in range(n)]) for n in range(3, 35)]
    batch = ProbeBatch.encode(probes, vocab_size=vocab)
    with Largest() as only_last:
        last = shadow.run(batch, [{"last_logits": lambda t: t}])[0]["last_logits"]
    with Largest() as every:
        logits = shadow.run(batch, [{"logits": lambda t: t}])[0]["logits"]
    torch.testing.assert_close(
        last, logits[torch.arange(len(probes)), batch.last], atol=1e-5, rtol=1e-5
    )
    assert only_last.most <= len(probes) * vocab
    assert every.most >= len(probes) * vocab * 34, "the control: all logits are seen"
