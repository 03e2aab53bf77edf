"""`skeleton`: an empty model of a live model's class."""

import copy

import torch
from transformers import PreTrainedModel

from tlens_callback.shadow.twins import plain_class


def skeleton(base: PreTrainedModel) -> PreTrainedModel:
    """Makes an empty model of the live model's class, on the meta device, with its own config.

    Nothing is drawn or allocated. A deep copy of the live model would not work: trainers patch
    `forward` on the instance, and the patch of a copy would still call the live model.
    """
    config = copy.deepcopy(base.config)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
        part.tie_word_embeddings = False
        part.use_cache = False
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = plain_class(type(base))(config)
    # It says at which tokens an answer ends; that made from the config knows fewer of them.
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.eval()
