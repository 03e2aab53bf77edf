"""Trains in several processes with one engine, each way without and with the callback.

    torchrun ... -m tests.engines_script FOLDER "ENGINE: TRAINER TUNER [HOLDING...]"...

The trainer is "sft", "grpo" or "rollouts", which is GRPO that the callback is attached to; the
tuner is "lora", "dora", "full" or "nf4" (LoRA on such a base), and the weights are held as said, or
"auto". What each process found is written to FOLDER/rank-N.json.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import engines

if __name__ == "__main__":
    engines.prepare(sys.argv[2].split(":")[0])

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests import tiny
from tests.test_no_trace import fingerprint, peft_config
from tests.training import CAPITAL, SENTENCES
from tlens_callback import FrozenWeights, HeadAblation, MemorySink, Rollouts, TLensCallback
from tlens_callback.instruments import fast

STEPS = 4


def adapter(tuner: str) -> LoraConfig | None:
    return None if tuner == "full" else peft_config(use_dora=tuner == "dora")


def trainer(
    engine: str, kind: str, tuner: str, callbacks: list[TrainerCallback], folder: str, **args: Any
) -> Any:
    """A trainer of TRL that is about to train a tiny Llama with three layers."""
    set_seed(7)
    if tuner == "nf4":
        from tests.quantised import SHAPE, loaded

        model: Any = loaded(saved(tiny.model("llama", **SHAPE)), "nf4")
    else:
        model = tiny.model("llama", num_hidden_layers=3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    if engine.startswith("fsdp2 native"):
        model = natively_sharded(model)
    settings = dict(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
        seed=7,
        **engines.arguments(engine),
    )
    if kind in ("grpo", "rollouts"):
        # Without an adapter TRL would load the reference model from the Hub.
        beta = 0.0 if tuner == "full" else 0.05
        settings |= dict(num_generations=4, max_completion_length=6, beta=beta)
        return GRPOTrainer(
            model,
            args=GRPOConfig(**{**settings, **args}),
            train_dataset=Dataset.from_dict({"prompt": [s.rsplit(" ", 1)[0] for s in SENTENCES]}),
            reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
            processing_class=tiny.tokenizer(),
            peft_config=adapter(tuner),
            callbacks=callbacks,
        )
    data = Dataset.from_dict({"text": SENTENCES})
    return SFTTrainer(
        model,
        args=SFTConfig(**{**settings, **args}),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tiny.tokenizer(),
        peft_config=adapter(tuner),
        callbacks=callbacks,
    )


def natively_sharded(model: Any) -> Any:
    """The same model as transformers' own `DistributedConfig` shards it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder = saved(model)
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def saved(model: Any) -> Path:
    """The folder where rank 0 has saved the model, which is the same in all processes."""
    if "RANK" not in os.environ:
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        return Path(folder)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders, 0)
    if dist.get_rank() == 0:
        model.save_pretrained(folders[0])
    dist.barrier()
    return Path(folders[0])


def share(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if hasattr(value, "ds_tensor"):
        part: Any = value.ds_tensor  # type: ignore[attr-defined]
        left = value.ds_numel - dist.get_rank() * part.numel()  # type: ignore[attr-defined]
        return part[: max(0, left)]  # what follows is padding, which nothing writes
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]


def digest(value: Any) -> str:
    return hashlib.sha256(repr(fingerprint(value)).encode()).hexdigest()[:16]


def traces(trained: Any) -> dict[str, Any]:
    """All that a callback could have changed, of this process' share."""
    optimizer = trained.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [
        {k: share(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        for state in optimizer.state.values()
    ]
    logged = ("loss", "grad_norm", "reward", "kl", "entropy", "eval_loss")
    return {
        "weights": digest({n: share(p) for n, p in trained.model.named_parameters()}),
        "optimizer": digest(states),
        "random": digest(torch.get_rng_state()),
        "history": [{k: row[k] for k in logged if k in row} for row in trained.state.log_history],
        "training": digest([m.training for m in trained.model.modules()]),
    }


def watched(engine: str, kind: str, tuner: str, holding: Any, **args: Any) -> dict[str, Any]:
    """Trains with every fast instrument and a slow one at every step."""
    sink = MemorySink()
    instruments = [*fast(), HeadAblation(every=1), FrozenWeights(every=1)]
    if tuner == "full":
        instruments = [one for one in instruments if one.name != "adapter_spectrum"]
    instruments = list({one.name: one for one in instruments}.values())
    look = TLensCallback(
        [CAPITAL], instruments=instruments, every_n_steps=1, sinks=[sink], on_error="raise",
        weights=holding, rollouts=Rollouts(after_update=True) if kind == "rollouts" else None,
    )  # fmt: skip
    extra: list[int] = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if look.observer is not None and look.observer.shadow is not None:
                extra.append(look.observer.shadow.extra_bytes)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = trainer(engine, kind, tuner, [look, Counts()], folder, **args)
        if kind == "rollouts":
            look.attach(done)
        done.train()
    of = {**traces(done), "seconds": time.perf_counter() - began, "steps": list(sink.steps)}
    KEPT.append(done)
    if sink.steps:
        curve = sink.curve
        of["fidelity"] = float(max(curve("fidelity/max_abs_diff")[1]))
        of["kl"] = float(max(curve("fidelity/kl")[1]))
        of["written"] = float(max(curve("frozen_weights/changed")[1]))
        of["extra bytes"] = extra[-1]
        gathers = sink.readings.get("cost/gathers")
        of["gathers"] = int(gathers[sink.steps[-2]].values) if gathers else 0
        of["first"] = {
            key: summed(by_step[0])
            for key, by_step in sink.readings.items()
            if 0 in by_step and not key.startswith(("cost/", "trainer/", "fidelity/"))
        }
    if kind == "rollouts" and sink.steps:
        of["looked at"] = [*sink.readings["rollouts/entropy"]]
        of["changed by steps"] = [
            float(np.nanmax(np.abs(one.values)))
            for one in sink.readings["rollouts/step_change"].values()
        ]
        ratio = sink.readings.get("rollouts/log_ratio", {})
        of["from the base"] = [float(np.nanmax(np.abs(one.values))) for one in ratio.values()]
    return of


def summed(reading: Any) -> float:
    """A number that depends on every value of a reading and on its place."""
    values = np.nan_to_num(reading.values.astype(np.float64)).ravel()
    return float(values @ np.cos(np.arange(len(values))))


def resumed(engine: str, tuner: str, to: Path) -> dict[str, Any]:
    """A training that is stopped after two steps and goes on, not watched and watched; what the
    last observation says is compared with that of a training that was not stopped."""
    found: dict[str, Any] = {}
    last: dict[str, dict[str, float]] = {}
    for which in ("without", "auto", "not stopped"):
        watches = which != "without"
        folder = str(to / f"{engine} {which}".replace(" ", "-"))
        for steps in (STEPS,) if which == "not stopped" else (2, STEPS):
            sink = MemorySink()
            look = TLensCallback([CAPITAL], every_n_steps=1, sinks=[sink], on_error="raise")
            done = trainer(
                engine, "sft", tuner, [look] if watches else [], folder,
                save_strategy="steps", save_steps=2, lr_scheduler_type="constant", max_steps=steps,
            )  # fmt: skip
            done.train(
                resume_from_checkpoint=True if steps == STEPS and which != "not stopped" else None
            )
            KEPT.append(done)
        found[which] = {**traces(done), "steps": list(sink.steps)}
        if sink.steps:
            last[which] = {
                key: summed(by_step[STEPS])
                for key, by_step in sink.readings.items()
                if STEPS in by_step and key.startswith(("attention_drift", "activation_drift"))
            }
    if last:
        found["auto"]["drift"], found["not stopped"]["drift"] = last["auto"], last["not stopped"]
    return found


def unwatched(engine: str, kind: str, tuner: str, **args: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        done = trainer(engine, kind, tuner, [], folder, **args)
        done.train()
    KEPT.append(done)
    return traces(done)


KEPT: list[Any] = []
"""Models are not freed: torch 2.13 may wait for ever where DDP's reducer is."""


def main(to: str, *runs: str) -> None:
    found: dict[str, Any] = {}
    for run in runs:
        engine, training = run.split(": ")
        kind, tuner, *holdings = training.split()
        if kind == "resume":
            found[run] = resumed(engine, tuner, Path(to))
            continue
        of = found[f"{engine}: {kind} {tuner}"] = {}
        with contextlib.redirect_stdout(io.StringIO()) as said:
            of["without"] = unwatched(engine, kind, tuner)
            for holding in holdings or ["auto"]:
                of[holding] = watched(engine, kind, tuner, holding)
        of["said"] = [line for line in said.getvalue().splitlines() if line.startswith("tlens")]
    rank = int(os.environ.get("RANK", 0))
    (Path(to) / f"rank-{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # A process that ends with gloo's threads at work may be aborted.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
