"""Vision-language models of every family that the bridge takes, small enough for a test.

As in `tests.tiny`, weights are random but of a trained model's size.
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin

from tests import tiny

_TEXT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": tiny.CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_GEMMA = {
    **_TEXT,
    "head_dim": 8,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
IMAGE = tiny.VOCAB - 1
"""Id of the token that stands for an image, or a part of it."""
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_CLIP = {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16}
LANGUAGE = r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"
"""Names of the language model's linear layers, for PEFT; not those of the image's."""

VISION = r".*(vision_tower|visual)\..*\.(q_proj|k_proj|v_proj|fc1|fc2|qkv|linear_fc1|linear_fc2)"
"""Names of linear layers of LLaVA's and Qwen's vision towers."""

_QWEN_IMAGE = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE - 1,
    "vision_start_token_id": IMAGE - 2,
    "vision_end_token_id": IMAGE - 3,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_QWEN3_VISION = {
    **_QWEN_VISION,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
_QWEN3_TEXT = {**_TEXT, "head_dim": 8, "rope_parameters": _M_ROPE}
_LLAMA = {**_TEXT, "model_type": "llama"}

_EMU_VOCABULARY = {f"<|visual token {i:06d}|>": 80 + i for i in range(8)} | {"<image>": IMAGE}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": _GEMMA,
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
    ),
    "llava": (
        "Llava",
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": IMAGE},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**_TEXT, "rope_parameters": _M_ROPE},
            "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **_QWEN_IMAGE,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"text_config": _QWEN3_TEXT, "vision_config": _QWEN3_VISION, **_QWEN_IMAGE},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {
            "text_config": {
                **_QWEN3_TEXT,
                "moe_intermediate_size": 24,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
            "vision_config": _QWEN3_VISION,
            **_QWEN_IMAGE,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "text_config": {
                **_QWEN3_TEXT,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
            **_QWEN_IMAGE,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": 8, "head_dim": 8},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_token_index": IMAGE,
        },
    ),
    "idefics3": (
        "Idefics3",
        {
            "text_config": _LLAMA,
            "vision_config": {k: v for k, v in _SIGLIP.items() if k != "model_type"},
            "image_token_id": IMAGE,
        },
    ),
    "llava_next": (
        "LlavaNext",
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": IMAGE},
    ),
    "llava_onevision": (
        "LlavaOnevision",
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": IMAGE - 1,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "text_config": {
                **_TEXT,
                "head_dim": 8,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": tiny.VOCAB,
                "hidden_size_per_layer_input": 8,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": IMAGE - 1,
            "audio_token_id": IMAGE - 2,
        },
    ),
    "glm4v": (
        "Glm4v",
        {
            "text_config": {**_TEXT, "rope_parameters": {**_M_ROPE, "partial_rotary_factor": 1.0}},
            "vision_config": {**_QWEN_VISION, "image_size": 16},
            "image_token_id": IMAGE,
            "video_token_id": IMAGE - 1,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {
                **_TEXT,
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "attention_chunk_size": 64,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": IMAGE,
        },
    ),
    "muse_glimmer": (
        "MuseGlimmer",
        {
            "text_config": {
                **_TEXT,
                "head_dim": 8,
                "sliding_window": 8,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "image_token_id": IMAGE,
            "video_token_id": IMAGE - 1,
            "out_hidden_size": 64,
            "projector_hidden_size": 24,
        },
    ),
    "emu3": (
        "Emu3",
        {
            "text_config": _TEXT,
            "vq_config": {
                "codebook_size": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "hidden_size": 4,
                "attn_resolutions": [],
            },
            "vocabulary_map": _EMU_VOCABULARY,
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {**_TEXT, "rope_parameters": _M_ROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
            },
            **_QWEN_IMAGE,
        },
    ),
}


FAMILIES = tuple(family for family in _CONFIGS if family != "qwen2_vl")
"""Hugging Face's `model_type` of each family that the bridge takes."""

MAIN = ("gemma3", "llava", "qwen2_5_vl", "qwen3_vl")


def config(family: str) -> dict[str, Any]:
    """The fields of a family's configuration."""
    return _CONFIGS[family][1]


def with_image(family: str) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass over one image and a text behind it."""
    qwen = family.startswith("qwen")
    tokens = 4 if qwen or family == "gemma3" else 16
    ids = torch.tensor([[1, *[IMAGE] * tokens, 20, 21, 22]])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((16, 3 * 2 * 4 * 4) if qwen else (1, 3, 16, 16), generator=generator)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if qwen:
        grid, kinds = torch.tensor([[1, 4, 4]]), (ids == IMAGE).int()
        inputs |= {"image_grid_thw": grid, "mm_token_type_ids": kinds}
    return inputs


def model(family: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A vision-language model in eval mode; the same weights for the same seed."""
    prefix, settings = _CONFIGS[family]
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
        tiny._randomise(built)
    return built.eval()


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""As the templates of LLaVA: the content is a list of parts, and of a string nothing is written."""


def processor() -> ProcessorMixin:
    """A processor of images and texts for the model "llava"."""
    tokenizer = tiny.tokenizer()
    image = tokenizer.convert_ids_to_tokens(IMAGE)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    tokenizer.chat_template = None
    side = {"height": 16, "width": 16}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=image,
        chat_template=TEMPLATE.replace("<image>", image),
    )
