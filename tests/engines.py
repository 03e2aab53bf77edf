"""Ways to train in several processes that TRL's trainer knows, made to run on CPUs."""

import os
from typing import Any

ENGINES = ("ddp", "fsdp1", "fsdp2", "fsdp2 native", "zero2", "zero3")


def prepare(engine: str) -> None:
    """Lets accelerate shard on CPUs, which it does on GPUs alone; before anything is imported."""
    if engine in ("ddp", "fsdp2 native"):
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


def arguments(engine: str, *, layer: str = "LlamaDecoderLayer", **fsdp: Any) -> dict[str, Any]:
    """What TrainingArguments need for it."""
    if engine in ("ddp", "fsdp2 native"):
        return {"use_cpu": True}
    if engine.startswith("fsdp"):
        config = {
            "fsdp_version": int(engine[4]),
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [layer],
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "SHARDED_STATE_DICT",
            **({"use_orig_params": True, "sync_module_states": False} if engine == "fsdp1" else {}),
            **fsdp,
        }
        return {"fsdp": True, "fsdp_config": config, "use_cpu": False}
    return {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": {
                "stage": int(engine[4]),
                "stage3_param_persistence_threshold": 0,
                **fsdp,
            },
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        },
    }
