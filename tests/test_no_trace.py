"""Training with the callback is bit for bit the training without it."""

import copy
import hashlib
import logging
import random
import re
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests import tiny
from tests.marks import exhaustive
from tests.training import CAPITAL, SENTENCES, Pace
from tlens_callback import LocalSink, MemorySink, TLensCallback, read_store


def fingerprint(value: Any) -> Any:
    """Bytes of every tensor in a nested value, so that equality is of bits."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.astype(np.int64))
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()
    if isinstance(value, dict):
        return {key: fingerprint(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    return value


def state_of(trainer: Any) -> dict[str, Any]:
    """Everything of a finished run that a callback could have changed."""
    model, tokenizer = trainer.model, trainer.processing_class
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    timing = ("runtime", "per_second", "step_time")
    return {
        "parameters": {n: fingerprint(p) for n, p in model.named_parameters()},
        "gradients wanted": {n: p.requires_grad for n, p in model.named_parameters()},
        "buffers": {n: fingerprint(b) for n, b in model.named_buffers()},
        "optimizer": fingerprint(trainer.optimizer.state_dict()),
        "history": [
            {k: v for k, v in row.items() if not any(word in k for word in timing)}
            for row in trainer.state.log_history
        ],
        "torch": fingerprint(torch.get_rng_state()),
        "numpy": fingerprint(list(np.random.get_state())),
        "python": random.getstate(),
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "tokenizer": {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"},
        "tokenizer backend": tokenizer.backend_tokenizer.to_str(),
        "modules": [(n, type(m).__qualname__) for n, m in model.named_modules()],
        "hooks": [(n, [len(vars(m)[h]) for h in hooks]) for n, m in model.named_modules()],
        "instance attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "what modules remember": {
            n: fingerprint(
                {k: v for k, v in vars(m).items() if isinstance(v, int | float | Tensor)}
            )
            for n, m in model.named_modules()
        },
        "training": [m.training for m in model.modules()],
        "grad mode": torch.is_grad_enabled(),
        "logger": {
            name: logging.getLogger(name).level for name in ("", "transformers", "trl", "peft")
        },
        "warning filters": [str(f) for f in warnings.filters],
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
    }


def peft_config(**kwargs: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.3, "target_modules": "all-linear"}
    return LoraConfig(**{**settings, **kwargs})


def sft(
    tmp_path: Any,
    callbacks: list[TrainerCallback],
    family: str = "llama",
    *,
    config: dict[str, Any] | None = None,
    texts: list[str] = SENTENCES,
    **args: Any,
) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=2,
        seed=7,
    )
    data = Dataset.from_dict({"text": texts})
    moe = family in ("qwen3_moe", "mixtral")
    # TRL 1.8 draws the first weights of the adapter before it seeds.
    set_seed(7)
    model = tiny.model(family, **(config or {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**{**settings, **args}),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tiny.tokenizer(),
        # PEFT has no dropout on expert parameters.
        peft_config=peft_config(lora_dropout=0.0 if moe else 0.3),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def grpo(tmp_path: Any, callbacks: list[TrainerCallback], **args: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        beta=0.05,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=7,
    )
    set_seed(7)
    trainer = GRPOTrainer(
        tiny.model("llama"),
        args=GRPOConfig(**{**settings, **args}),
        train_dataset=Dataset.from_dict({"prompt": [s.rsplit(" ", 1)[0] for s in SENTENCES]}),
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        processing_class=tiny.tokenizer(),
        peft_config=peft_config(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    """Trains without a callback and returns the state; the same training only once."""
    states: dict[str, Any] = {}

    def state(trains: Any = sft, *rest: Any, **args: Any) -> dict[str, Any]:
        key = f"{trains.__name__} {rest} {args}"
        if key not in states:
            states[key] = state_of(trains(tmp_path_factory.mktemp("unwatched"), [], *rest, **args))
        return states[key]

    return state


def watcher(**kwargs: Any) -> TLensCallback:
    sinks = kwargs.pop("sinks", None) or [MemorySink()]
    return TLensCallback([CAPITAL], every_n_steps=1, sinks=sinks, on_error="raise", **kwargs)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in one if one[key] != other[key]]


@pytest.mark.parametrize(
    "args",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"gradient_checkpointing": False, "dataloader_num_workers": 2},
            id="workers",
            marks=pytest.mark.slow,
        ),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation", marks=pytest.mark.slow),
    ],
)
def test_sft_leaves_no_trace(tmp_path, unwatched, args):
    without = unwatched(sft, **args)
    memory = MemorySink()
    watched = state_of(sft(tmp_path, [watcher(sinks=[memory])], **args))
    assert differences(without, watched) == []
    assert list(memory.steps) == [0, 1, 2, 3, 4, 5]
    moved = memory.curve("target_scores/loss/capital")[1]
    assert len(set(moved.tolist())) == 6, "the run watched was one that changes the model"


@pytest.mark.parametrize(
    "family",
    exhaustive(["gpt2", "gpt_neox", "phi3", "gemma2", "qwen3_moe"], {"gpt2", "gemma2"}),
)
def test_families_whose_shadow_is_costly_to_build_leave_no_trace(tmp_path, unwatched, family):
    """Fused projections draw random numbers when the bridge splits them."""
    without = unwatched(sft, family, max_steps=3)
    watched = state_of(sft(tmp_path, [watcher()], family, max_steps=3))
    assert differences(without, watched) == []


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_rows_before_leave_no_trace(tmp_path, unwatched, rope):
    """Rows are longer than the original context, probes are shorter; evaluation in between."""
    family, config = tiny.remembers(rope, context=8)
    # The later ones are shorter than the first, which decides about their frequencies too.
    rows = [" ".join(SENTENCES[:n]) for n in (4, 3, 3, 2, 2)]
    args = dict(config=config, texts=rows, eval_on_start=True, eval_steps=4)
    args |= dict(per_device_train_batch_size=1, train_sampling_strategy="sequential")
    without = unwatched(sft, family, **args)
    memory = MemorySink()
    callback = watcher(sinks=[memory], repeats=False)
    watched = state_of(sft(tmp_path, [callback], family, **args))
    assert differences(without, watched) == []
    assert len(memory.steps) == 6


@pytest.mark.slow
def test_grpo_leaves_no_trace(tmp_path, unwatched):
    without = unwatched(grpo)
    memory = MemorySink()
    watched = state_of(grpo(tmp_path, [watcher(sinks=[memory])]))
    assert differences(without, watched) == []
    assert list(memory.steps) == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("writing", ["wait", "drop_old", "inline"])
def test_default_probes_and_sinks_leave_no_trace(tmp_path, unwatched, writing):
    """The first rows of the training data are read, the local store is written."""
    callback = TLensCallback(every_n_steps=1, on_error="raise", writing=writing)
    without = unwatched()
    watched = state_of(sft(tmp_path, [callback]))
    assert differences(without, watched) == []
    assert (tmp_path / "tlens").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("writing", ["wait", "drop_old"])
def test_sinks_that_are_slower_than_training_leave_no_trace(tmp_path, unwatched, writing):
    """They write while batches are loaded, evaluated and trained on, and on workers forked."""
    pace = Pace()

    class Slow(LocalSink):
        def write(self, readings, *, step):
            if step > 0:  # the first is written before training goes on
                pace.reaches(min(step + 2, 5) if writing == "wait" else 5)
            super().write(readings, step=step)

    args = dict(dataloader_num_workers=1)
    without = unwatched(sft, **args)
    sink = Slow(tmp_path / "store")
    callback = watcher(sinks=[sink], writing=writing)
    watched = state_of(sft(tmp_path, [callback, pace], **args))
    assert differences(without, watched) == []
    steps = list(read_store(tmp_path / "store").steps)
    assert steps[-1] == 5 and (steps == [0, 1, 2, 3, 4, 5]) == (writing == "wait")


@pytest.mark.slow
@pytest.mark.parametrize("writing", ["wait", "drop_old"])
def test_pictures_and_tables_in_wandb_leave_no_trace(offline, capsys, writing):
    """W&B, plotly and the rest may draw random numbers of their own; the run's stay its own."""
    states = []
    for folder, callbacks in (
        ("a", []),
        ("b", [TLensCallback([CAPITAL], every_n_steps=1, on_error="raise", writing=writing)]),
    ):
        trainer = sft(offline / folder, callbacks, report_to="wandb")
        states.append(state_of(trainer))
        wandb.finish()
    assert differences(*states) == []
    # Two an observation; where it drops the older, how many depends on the machine, and is said.
    said = re.search(r"tlens: dropped (\d+) observation", capsys.readouterr().out)
    dropped = int(said[1]) if said and writing == "drop_old" else 0
    pictures = len(list(offline.glob("wandb/offline-*/files/media/images/**/*.png")))
    assert pictures == 2 * (6 - dropped) >= 2


class Draws(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        torch.rand(1)


class DrawsOnAThread(TrainerCallback):
    """What a sink would do that draws from the run's random numbers."""

    def on_step_end(self, args, state, control, **kwargs):
        thread = threading.Thread(target=torch.rand, args=(1,))
        thread.start()
        thread.join()


class LeavesEval(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()


class SwitchesAttention(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.config._attn_implementation = "eager"


class Pads(TrainerCallback):
    def on_train_begin(self, args, state, control, processing_class=None, **kwargs):
        processing_class.padding_side = "left"


class TakesABatch(TrainerCallback):
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        next(iter(train_dataloader))


class Merges(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.merge_adapter()
        model.unmerge_adapter()


@pytest.mark.parametrize(
    "culprit, found",
    [
        (Draws, "parameters"),
        (Draws, "torch"),
        (DrawsOnAThread, "torch"),
        (LeavesEval, "history"),
        (SwitchesAttention, "attention"),
        (Pads, "tokenizer"),
        (TakesABatch, "parameters"),
        (Merges, "parameters"),
    ],
)
def test_the_check_finds_a_callback_that_leaves_a_trace(tmp_path, unwatched, culprit, found):
    without = unwatched()
    traced = state_of(sft(tmp_path, [culprit()]))
    assert found in differences(without, traced)


def test_a_deep_copy_of_the_state_is_no_alias(tmp_path):
    """The fingerprint is of values, so a later step cannot make two states equal."""
    tensor = torch.zeros(3)
    before = fingerprint(tensor)
    tensor += 1
    assert fingerprint(tensor) != before and copy.deepcopy(before) == before
