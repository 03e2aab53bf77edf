"""GRPO that merges the live adapter at each generation, as TRL does for vLLM, and is watched."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from tests import tiny
from tests.test_no_trace import differences, peft_config, state_of
from tests.training import CAPITAL, SENTENCES
from tlens_callback import FrozenWeights, MemorySink, TargetScores, TLensCallback

pytestmark = pytest.mark.slow


class Merging(GRPOTrainer):
    """Sends the weights to a vLLM that is not there, with TRL's own code, before it generates."""

    merges = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        generation: Any = object.__new__(VLLMGeneration)
        generation.model, generation.accelerator = self.model, self.accelerator
        generation._dist = DistributedBackend(self.accelerator)
        merged = [name for name, _ in generation._iter_named_params() if "q_proj" in name]
        assert merged == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
        self.merges += 1
        return super()._generate_single_turn(*args, **kwargs)


def grpo(
    tmp_path: Any, callbacks: list[Any], dtype: torch.dtype, trains: type[GRPOTrainer] = Merging
) -> GRPOTrainer:
    set_seed(7)
    trainer = trains(
        tiny.model("llama").to(dtype),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            learning_rate=3e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            logging_steps=1,
            seed=7,
        ),
        train_dataset=Dataset.from_dict({"prompt": [s.rsplit(" ", 1)[0] for s in SENTENCES]}),
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        processing_class=tiny.tokenizer(),
        peft_config=peft_config(lora_alpha=32),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def watched(tmp_path: Any, dtype: torch.dtype, **args: Any) -> tuple[GRPOTrainer, MemorySink]:
    sink = MemorySink()
    callback = TLensCallback(
        [CAPITAL],
        instruments=[FrozenWeights(every=1), TargetScores()],
        every_n_steps=1,
        sinks=[sink],
        on_error="raise",
    )
    return grpo(tmp_path, [callback], dtype, **args), sink


def said(sink: MemorySink) -> list[str]:
    found = sink.readings.get("watch/events", {}).values()
    return [str(text) for reading in found for text in reading.texts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_generations_with_vllm_are_watched(tmp_path, dtype):
    """No trace; a shadow that equals the model after each merge; one event, in bfloat16 alone."""
    plain = grpo(tmp_path / "plain", [], dtype)
    trainer, sink = watched(tmp_path / "watched", dtype)
    assert trainer.merges == plain.merges == 12
    assert differences(state_of(plain), state_of(trainer)) == []
    steps, apart = sink.curve("fidelity/max_abs_diff")
    assert steps.tolist() == [0, 1, 12]
    assert apart.max() < (1e-4 if dtype == torch.float32 else 0.2), "logits are up to 4"
    largest = sink.curve("frozen_weights/largest_change")[1]
    assert sink.curve("frozen_weights/changed")[1].tolist()[-1] == 14
    assert np.count_nonzero(sink.curve("frozen_weights/written")[1]) == 0
    if dtype == torch.float32:
        assert 0 < largest[-1] < 1e-5 and said(sink) == []
    else:
        assert largest[-1] > 2 * largest[2] > 0.01, "the first merge was of an adapter that is zero"
        (event,) = said(sink)
        assert "under adapters" in event and "as TRL does for generation with vLLM" in event


def test_without_merging_there_is_nothing_to_say(tmp_path):
    _, sink = watched(tmp_path, torch.bfloat16, trains=GRPOTrainer)
    for measure in ("changed", "largest_change", "drifted", "written"):
        assert not sink.curve(f"frozen_weights/{measure}")[1].any()
    assert said(sink) == []
