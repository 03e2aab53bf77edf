"""Ways to train in several processes that accelerate knows, made to run on CPUs."""

import os
from typing import Any

ENGINES = ("one process", "ddp", "zero2", "zero3", "fsdp1", "fsdp2", "fsdp2 native")


def prepare(engine: str) -> None:
    """Lets accelerate shard on CPUs, which it does on GPUs alone; before anything is imported."""
    if engine.startswith("fsdp2 native") or not engine.startswith(("fsdp", "zero")):
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if engine.startswith("fsdp"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_SYNC_MODULE_STATES"] = "false"
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import state
    from accelerate.utils import DistributedType

    def backend(*_: Any, **__: Any) -> Any:
        return "gloo", DistributedType.MULTI_GPU

    state.PartialState._prepare_backend = backend


def arguments(engine: str) -> dict[str, Any]:
    """What TrainingArguments need for it."""
    if engine.startswith("fsdp2 native") or not engine.startswith(("fsdp", "zero")):
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
