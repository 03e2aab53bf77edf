"""A run that is watched at every save, for the tests that look at its checkpoints again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.training import CAPITAL, SENTENCES, trainer
from tlens_callback import (
    Instrument,
    Probe,
    Rule,
    Store,
    TLensCallback,
    TokenLoss,
    Watch,
    read_store,
)
from tlens_callback.checkpoints import Loader
from tlens_callback.offline.replay import Replay, replay
from tlens_callback.run.settings import Settings

PROBES = [CAPITAL, Probe("story", "John gave Mary a book and went to the", target=" store")]
SAVES = dict(max_steps=6, save_strategy="steps", save_steps=2, logging_steps=1)

_COMPARED = {f"fidelity/{name}" for name in ("max_abs_diff", "kl", "top1_agreement")}


def surplus(live: Store) -> list[str]:
    """What `unlike` is to find between a live store and its replay, and nothing else.

    The replay says which checkpoint a step is, and compares shadow and model at each. The live run
    compared them at its start, after the first update that moved the model, and at its end.
    """
    steps = [step for step in live.steps if step != 1]
    found = [f"steps {live.steps} {tuple(steps)}"]
    for step in steps:
        fidelity = _COMPARED if step not in (steps[0], steps[-1]) else set()
        found += [
            f"{step} {key} in the other only" for key in sorted({"checkpoint/name"} | fidelity)
        ]
    assert {reading.key for reading in live.readings(1)} == _COMPARED
    return found


def watch(instruments: Sequence[Instrument]) -> Watch:
    """One that has something to say about a run as short as these."""
    names = [one.name for one in instruments if isinstance(one, TokenLoss)]
    rules = [Rule(f"{name}/change/capital", above=1e-3, below=-1e-3) for name in names]
    return Watch(rules, cooldown=0)


def train(
    folder: Path,
    instruments: Sequence[Instrument],
    *,
    family: str = "llama",
    adapter: LoraConfig | None = None,
    trl: bool = False,
    seed: int = 0,
    saved: torch.dtype = torch.float32,
    **args: Any,
) -> Store:
    """Trains in float32 a model that is `saved` in `<folder>/base`, writes `<folder>/run`; the live
    store."""
    adapter = copy.deepcopy(adapter)  # PEFT writes the base's name into it
    base = tiny.model(family, seed=seed).to(saved)
    base.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    callback = TLensCallback(
        PROBES,
        instruments=instruments,
        watch=watch(instruments),
        every_n_steps=2,
        on_error="raise",
    )
    settings: dict[str, Any] = {**SAVES, **args}
    if trl:
        common = dict(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        run = SFTTrainer(
            model,
            args=SFTConfig(**{**common, **settings}),
            train_dataset=Dataset.from_dict({"text": SENTENCES}),
            processing_class=tiny.tokenizer(),
            peft_config=adapter,
            callbacks=[callback],
        )
    else:
        model = model if adapter is None else get_peft_model(model, adapter)
        run = trainer(folder / "run", callback, model=model, **settings)
    run.train()
    return read_store(folder / "run" / "tlens")


def arguments(instruments: Sequence[Instrument] | None = None, **changes: Any) -> Settings:
    settings: dict[str, Any] = dict(
        probes=PROBES,
        instruments=instruments,
        sinks=None,
        watch=None if instruments is None else watch(instruments),
        every_n_steps=1,
        repeats=True,
        device=None,
        dtype=None,
        on_error="raise",
        writing="inline",
        name="tlens",
    )
    return Settings(**{**settings, **changes})


def replayed(
    folder: Path, instruments: Sequence[Instrument] | None = None, /, **kwargs: Any
) -> Replay:
    asked = arguments(instruments, **kwargs.pop("arguments", {}))
    loader = Loader(device="cpu", dtype=kwargs.pop("dtype", None))
    return replay(folder / "run", asked, loader, **kwargs)


def unlike(one: Store, other: Store, *, without: tuple[str, ...] = ("cost/",)) -> list[str]:
    """What is not the same in two stores: steps, keys, axes, labels, texts, or numbers by more than
    1e-6."""
    found = [f"steps {one.steps} {other.steps}"] if one.steps != other.steps else []
    for step in sorted(set(one.steps) & set(other.steps)):
        ones, others = (
            {r.key: r for r in store.readings(step) if not r.key.startswith(without)}
            for store in (one, other)
        )
        found += [f"{step} {key} in one only" for key in sorted(set(ones) - set(others))]
        found += [f"{step} {key} in the other only" for key in sorted(set(others) - set(ones))]
        for key in sorted(set(ones) & set(others)):
            a, b = ones[key], others[key]
            if (a.axes, a.unit, a.labels, a.limits) != (b.axes, b.unit, b.labels, b.limits):
                found.append(f"{step} {key} means something else")
            elif a.values.shape != b.values.shape:
                found.append(f"{step} {key} {a.values.shape} {b.values.shape}")
            elif not np.allclose(a.values, b.values, rtol=0, atol=1e-6, equal_nan=True):
                found.append(f"{step} {key} {np.nanmax(np.abs(a.values - b.values)):.1e}")
            elif (a.texts is None) != (b.texts is None) or not np.array_equal(
                [] if a.texts is None else a.texts, [] if b.texts is None else b.texts
            ):
                found.append(f"{step} {key} says something else")
    return found
