"""Small trainings with rewards, whose rollouts are looked at."""

from typing import Any

from datasets import Dataset
from torch import nn
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests import tiny
from tests.test_no_trace import peft_config
from tests.training import CAPITAL, SENTENCES
from tlens_callback import MemorySink, Rollouts, TLensCallback

PROMPTS = [s.rsplit(" ", 1)[0] for s in SENTENCES]


def distinct(completion_ids: Any, **_: Any) -> list[float]:
    return [float(len(set(ids))) for ids in completion_ids]


def short(completions: Any, completion_ids: Any, **_: Any) -> list[float | None]:
    """Gives nothing for completions whose first token is even."""
    return [None if ids[0] % 2 == 0 else -float(len(ids)) for ids in completion_ids]


def kind(name: str) -> tuple[type, type]:
    return {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[name]


def trainer(
    folder: Any,
    name: str = "grpo",
    *,
    rewards: Any = (distinct,),
    prompts: Any = PROMPTS,
    callbacks: Any = (),
    trains: Any = None,
    dropout: float = 0.0,
    model: Any = None,
    peft: Any = "lora",
    evaluates: bool = False,
    **args: Any,
) -> Any:
    set_seed(7)
    made, config = kind(name)
    settings = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=10,
        learning_rate=3e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
        seed=7,
    )
    if evaluates:
        settings |= dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    data = Dataset.from_dict({"prompt": prompts})
    return (trains or made)(
        tiny.model("llama") if model is None else model,
        args=config(**{**settings, **args}),
        train_dataset=data,
        eval_dataset=data.select(range(2)) if evaluates else None,
        reward_funcs=list(rewards),
        reward_processing_classes=[
            tiny.tokenizer() if isinstance(one, nn.Module) else None for one in rewards
        ],
        processing_class=tiny.tokenizer(),
        peft_config=peft_config(lora_dropout=dropout) if peft == "lora" else peft,
        callbacks=list(callbacks),
    )


def look(**settings: Any) -> tuple[TLensCallback, MemorySink]:
    sink = MemorySink()
    wanted = dict(
        instruments=[], every_n_steps=1, sinks=[sink], on_error="raise", repeats=False, watch=False
    )
    rollouts = Rollouts(**settings.pop("rollouts", {}))
    return TLensCallback([CAPITAL], **{**wanted, **settings}, rollouts=rollouts), sink


def watched(folder: Any, name: str = "grpo", **given: Any) -> tuple[Any, MemorySink]:
    """Trains while the rollouts of every step are looked at."""
    of_look = ("rollouts", "sinks", "every_n_steps", "instruments")
    looks = {k: given.pop(k) for k in of_look if k in given}
    of = trainer(folder, name, **given)
    callback, sink = look(**looks)
    callback.attach(of)
    of.train()
    return of, sink
