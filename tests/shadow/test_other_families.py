"""Families that are on no list: the fidelity check admits them, or refuses them in words."""

import logging
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.instruments.common import encoded
from tests.training import CAPITAL, trainer
from tlens_callback import (
    FidelityError,
    LogitAttribution,
    MemorySink,
    Shadow,
    TLensCallback,
    observe,
)

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": tiny.CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
FALCON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLm", SMALL),
    "phi": ("Phi", SMALL),
    "bloom": ("Bloom", {"vocab_size": tiny.VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "granite": ("Granite", {**SMALL, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "cohere": ("Cohere", SMALL),
    "olmo": ("Olmo", SMALL),
    "starcoder2": ("Starcoder2", SMALL),
    "gemma": ("Gemma", {**SMALL, "head_dim": 8}),
    "falcon": ("Falcon", {**FALCON, "multi_query": True, "alibi": False}),
    "granitemoe": ("GraniteMoe", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOss",
        {
            **SMALL,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 2,
        },
    ),
}


def model(name: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return built


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_a_family_on_no_list_is_watched_with_what_it_has(tmp_path, caplog, family):
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=2)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback, model=model(*OTHERS[family]), max_steps=4).train()
    assert "Watching ends" not in caplog.text
    assert max(memory.curve("fidelity/max_abs_diff")[1]) < 1e-3
    assert sorted(memory.readings["target_scores/loss/capital"]) == [0, 2, 4]
    assert sorted(memory.readings["head_scores/induction"]) == [0, 2, 4]


def test_a_family_that_the_bridge_gets_wrong_is_refused_by_its_numbers(tmp_path):
    """Falcon with ALiBi builds, runs, and computes something else (transformer-lens 4.3.0)."""
    falcon = model("Falcon", {**FALCON, "multi_query": False, "alibi": True})
    with pytest.raises(FidelityError, match="is not the live model"):
        trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), model=falcon).train()


MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_n_heads": 4}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": (
        "FalconH1",
        SMALL | MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 8, "head_dim": 8},
    ),
    "bamba": ("Bamba", SMALL | MAMBA | {"mamba_d_head": 16, "attn_layer_indices": [1]}),
    "nemotron_h": (
        "NemotronH",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
}
COVERED = {
    "falcon_h1": None,
    "bamba": "tlens: 1 of 2 layers have attention patterns (1); the others have no attention",
    "nemotron_h": "tlens: 0 of 3 layers have attention patterns; the others have no attention",
}
MISSING = {
    "falcon_h1": "beside attention and MLP a 'mamba'",
    "bamba": "has no 'blocks.0.attn.hook_z'",
    "nemotron_h": "has no 'blocks.0.attn.hook_z'",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_what_a_hybrid_model_shows_is_said_at_the_start(tmp_path, capsys, caplog, family):
    """And no instrument is set aside later, when the parts that it lacks have grown."""
    memory = MemorySink()
    callback = TLensCallback([CAPITAL], sinks=[memory], every_n_steps=1)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        trainer(tmp_path, callback, model=model(*HYBRIDS[family]), learning_rate=5e-2).train()
    said = capsys.readouterr().out
    assert ("have attention patterns" in said) == (COVERED[family] is not None)
    assert (COVERED[family] or "") in said
    assert "tlens" not in caplog.text
    assert max(memory.curve("fidelity/max_abs_diff")[1]) < 1e-3


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_a_layer_has_beside_attention_and_mlp_is_not_passed_over(family):
    """Not even where it is small, as at first."""
    hybrid = model(*HYBRIDS[family]).eval()
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if "mamba" in name or "mixer" in name:
                parameter.mul_(0.01)
    shadow = Shadow.of(hybrid)
    with pytest.raises(ValueError, match=MISSING[family]):
        observe(shadow, encoded(), [LogitAttribution()])
