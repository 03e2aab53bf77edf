"""Ways to train in several processes that accelerate knows, made to run on CPUs."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.processes import python, torchrun


def prepare(engine: str) -> None:
    """Lets accelerate shard on CPUs, which it does on GPUs alone; before anything is imported."""
    if not _needs_gpus(engine):
        return
    if engine.startswith("fsdp"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_SYNC_MODULE_STATES"] = "false"
    on_cpus()


def _needs_gpus(engine: str) -> bool:
    return engine.startswith(("fsdp", "zero")) and not engine.startswith("fsdp2 native")


def on_cpus() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import state
    from accelerate.utils import DistributedType

    def backend(*_: Any, **__: Any) -> Any:
        return "gloo", DistributedType.MULTI_GPU

    state.PartialState._prepare_backend = backend


def arguments(engine: str) -> dict[str, Any]:
    """What TrainingArguments need for it."""
    if not _needs_gpus(engine):
        return {"use_cpu": True}
    name, *how = engine.split()
    if name.startswith("fsdp"):
        config: dict[str, Any] = {
            "fsdp_version": int(name[4]),
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        if name == "fsdp1":
            config |= {"use_orig_params": True, "sync_module_states": False}
        if "kept" in how:
            config["reshard_after_forward"] = False
        if "one-unit" in how:
            config["auto_wrap_policy"] = "NO_WRAP"
            del config["transformer_layer_cls_to_wrap"]
        return {"fsdp": True, "fsdp_config": config, "use_cpu": False}
    return {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": {
                "stage": int(name[4]),
                "stage3_param_persistence_threshold": 1000 if "kept" in how else 0,
            },
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        },
    }


def trained(folder: Path, *runs: str, processes: int = 2) -> list[dict[str, Any]]:
    """What each process found in the runs of `tests.engines_script`, which share an engine."""
    launch = python() if runs[0].startswith("one process") else torchrun(processes)
    done = subprocess.run(
        [*launch, "-m", "tests.engines_script", str(folder), *runs],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])
    found = sorted(folder.glob("rank-*.json"))
    return [json.loads(file.read_text()) for file in found]


TRACES = ("weights", "optimizer", "random", "history", "training")
"""What training leaves, and a callback must not change."""


def changed(ranks: list[dict[str, Any]], run: str, holding: str) -> list[str]:
    """What the callback has changed in any of the processes."""
    return [
        what
        for what in TRACES
        if any(rank[run][holding][what] != rank[run]["without"][what] for rank in ranks)
    ]
