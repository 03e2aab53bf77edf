"""A model for images and text is trained, on text and on images, and watched with text."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch import nn
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from tests import tiny, tiny_vision
from tests.test_no_trace import differences, state_of
from tests.training import CAPITAL, SENTENCES
from tlens_callback import MemorySink, Probe, TLensCallback

CHAT = Probe("chat", [{"role": "user", "content": "what is the capital of Italy"}], target=" Rome")


def images() -> Dataset:
    """Chats, each about an image of its own."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    said = [
        [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": sentence}]
        for sentence in SENTENCES[:8]
    ]
    return Dataset.from_dict(
        {"images": [[Image.fromarray(one)] for one in pixels], "messages": said}
    )


def sft(
    tmp_path: Any,
    callbacks: list[TLensCallback],
    family: str,
    *,
    data: Dataset,
    processing_class: Any,
    modules: str = tiny_vision.LANGUAGE,
) -> Any:
    set_seed(7)
    model = tiny_vision.model(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            max_length=None,
            seed=7,
        ),
        train_dataset=data,
        processing_class=processing_class,
        peft_config=LoraConfig(r=4, target_modules=modules, lora_dropout=0.3),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def check_no_trace(tmp_path: Any, family: str, probes: list[Probe], make: Any, **how: Any) -> None:
    memory = MemorySink()
    watcher = TLensCallback(probes, every_n_steps=1, sinks=[memory], on_error="raise")
    without, watched = (
        state_of(sft(tmp_path / str(len(some)), some, family, processing_class=make(), **how))
        for some in ([], [watcher])
    )
    assert differences(without, watched) == []
    assert list(memory.steps) == [0, 1, 2, 3]
    assert max(memory.curve("fidelity/max_abs_diff")[1]) < 1e-4
    assert len(set(memory.curve("target_scores/loss/capital")[1].tolist())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava", "qwen3_vl"])
def test_training_on_text_leaves_no_trace(tmp_path, family):
    data = Dataset.from_dict({"text": SENTENCES})
    check_no_trace(tmp_path, family, [CAPITAL], tiny.tokenizer, data=data)


@pytest.mark.slow
@pytest.mark.parametrize("modules", [tiny_vision.LANGUAGE, r".*(q_proj|v_proj|linear_1)"])
def test_training_on_images_leaves_no_trace(tmp_path, modules):
    """The second has adapters on the vision tower and on what leads from it to the text."""
    make = tiny_vision.processor
    how = {"data": images(), "modules": modules}
    check_no_trace(tmp_path, "llava", [CAPITAL, CHAT], make, **how)


def test_rows_with_images_are_no_probes(tmp_path, caplog):
    memory = MemorySink()
    callback = TLensCallback(sinks=[memory], on_error="raise")
    sft(
        tmp_path,
        [callback],
        "llava",
        data=images(),
        processing_class=tiny_vision.processor(),
    )
    assert "no probe texts were found in the training data" in caplog.text
    assert {0, 3} <= set(memory.steps) and "head_scores/induction" in memory.readings


def test_a_place_for_an_image_in_a_text_is_refused(tmp_path):
    make = tiny_vision.processor()
    probe = Probe("seen", f"{make.image_token} the cat")
    with pytest.raises(ValueError, match=r"Probe 'seen' has the token '.*', in the place of which"):
        sft(
            tmp_path,
            [TLensCallback([probe], sinks=[])],
            "llava",
            data=images(),
            processing_class=make,
        )
