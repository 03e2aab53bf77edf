"""Models of every supported family and a tokenizer, small enough for a test, built in code.

Weights are random but of a trained model's size: gains and biases are no ones and zeros, so that
a formula which leaves them out is found out.
"""

import tempfile
from functools import lru_cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 96
CONTEXT = 64

SPECIAL = ("<unk>", "<bos>", "<eos>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")
WORDS = (
    "the capital of France is Paris London Rome Berlin Madrid Italy Germany Spain Britain what "
    "which city in a an and cat dog sat on mat red blue green one two three four five six seven "
    "eight nine ten plus minus equals yes no John Mary gave drink to then went store book when"
).split()
BARE = ("The", "What", "Paris", "London", "yes", "no", "cat", "A", "is")
SIGNS = (".", ",", "?", "!", ":", "+", "=", "\u010a", "\u0120")

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gptj",
    "phi3",
    "olmo2",
    "opt",
    "qwen3_moe",
    "mixtral",
)
"""Hugging Face's `model_type` of each family."""

_MODERN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _MODERN),
    "mistral": ("Mistral", {**_MODERN, "sliding_window": 8}),
    "qwen2": ("Qwen2", _MODERN),
    "qwen3": ("Qwen3", {**_MODERN, "head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {**_MODERN, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            **_MODERN,
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "gpt_neox": (
        "GPTNeoX",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "gptj": (
        "GPTJ",
        {
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "rotary_dim": 4,
        },
    ),
    "phi3": ("Phi3", {**_MODERN, "original_max_position_embeddings": CONTEXT}),
    "olmo2": ("Olmo2", _MODERN),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_MODERN,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("Mixtral", {**_MODERN, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def remembers(rope: str, *, context: int) -> tuple[str, dict[str, Any]]:
    """Family and configuration of a model whose rotary frequencies depend on what ran before.

    Args:
        rope: "dynamic" or "longrope".
        context: tokens from which on the frequencies change.
    """
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "dynamic":
        return "llama", {"rope_parameters": parameters, "max_position_embeddings": context}
    parameters |= {
        "original_max_position_embeddings": context,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
    }
    return "phi3", {"rope_parameters": parameters, "max_position_embeddings": 4 * context}


def model(family: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A causal language model of two layers in eval mode; the same weights for the same seed.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights; the global random state is left as it was.
        config_overrides: fields of the family's configuration, under its own names.
    """
    prefix, settings = _CONFIGS[family]
    if family == "gemma2":
        # SDPA leaves out its cap of the scores in transformers 5.17, and is refused in 5.23.
        config_overrides.setdefault("attn_implementation", "eager")
    config = getattr(transformers, f"{prefix}Config")(
        **{"vocab_size": VOCAB, **_IDS, **settings, **config_overrides}
    )
    name = "Gemma3ForCausalLM" if family == "gemma3_text" else f"{prefix}ForCausalLM"
    if family == "gpt2":
        name = "GPT2LMHeadModel"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = getattr(transformers, name)(config)
        _randomise(built)
    return built.eval()


def _randomise(built: nn.Module) -> None:
    """Matrices of unit gain; norm gains, their offsets and biases moved off one and zero."""
    embeddings = {
        id(module.weight) for module in built.modules() if isinstance(module, nn.Embedding)
    }
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif id(parameter) in embeddings:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


def tokenizer() -> PreTrainedTokenizerFast:
    """A new word-level tokenizer of `VOCAB` tokens, as `from_pretrained` gives it.

    Words carry their leading space, as in GPT-2's vocabulary; a text starts with `<bos>`; it has
    a pad token and a chat template.
    """
    return PreTrainedTokenizerFast.from_pretrained(_saved_tokenizer().name)


@lru_cache(maxsize=1)
def _saved_tokenizer() -> "tempfile.TemporaryDirectory[str]":
    names = [*SPECIAL, *SIGNS, *BARE, *(f"\u0120{word}" for word in WORDS)]
    names += [f"<spare{i}>" for i in range(VOCAB - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    assert len(vocabulary) == VOCAB
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    directory = tempfile.TemporaryDirectory(prefix="tiny-tokenizer-")
    fast.save_pretrained(directory.name)
    return directory
