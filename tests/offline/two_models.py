"""Saved tiny models to compare, and stores of runs that came by at them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.training import CAPITAL
from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.offline.stages import Stage, observe_stages
from tlens_callback.probes import Probe
from tlens_callback.run.settings import Settings
from tlens_callback.sinks import LocalSink

DOG = Probe("dog", "the cat sat on the mat and the dog", target=" sat", foil=" gave")


def moved(model, seed, size=0.3):
    """With noise on its weights, of a share of their own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator)
                # What is zero, as the half of an adapter that starts there, gets some too.
                weight += noise * (size * weight.std() or 0.05)
    return model


def save(model, path: Path, tokenizer=None) -> Path:
    model.save_pretrained(path)
    (tokenizer or tiny.tokenizer()).save_pretrained(path)
    return path


def fine_tune(path: Path, seed: int) -> Path:
    return save(moved(tiny.model("llama"), seed), path)


def adapter(path: Path, base: Path, seed: int, **lora) -> Path:
    """An adapter over the base, whose B is random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora})
    return save(moved(get_peft_model(model, config), seed), path)


def asked(probes=(CAPITAL, DOG), **given) -> Settings:
    return Settings(
        list(probes),
        **{
            "instruments": None,
            "sinks": None,
            "watch": None,
            "every_n_steps": 1,
            "repeats": True,
            "device": None,
            "dtype": None,
            "on_error": "raise",
            "writing": "inline",
            "name": "tlens",
            **given,
        },
    )


def watched(path: Path, checkpoints, probes=(CAPITAL, DOG), **given) -> Path:
    """The store of a run that came by at these checkpoints: step -> directory."""
    stages = [Stage(step, Checkpoint.of(folder)) for step, folder in checkpoints.items()]
    sink = LocalSink(path, page=False)
    arguments = asked(probes, **given)
    observe_stages(stages, Loader(), arguments, [sink], tokenizer=tiny.tokenizer())
    return sink.path
