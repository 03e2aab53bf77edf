"""A training with a quantised base through TRL's own route leaves no trace, and is watched."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.quantised import linear_layers, loaded
from tests.test_examples import run, small  # noqa: F401
from tests.test_no_trace import SENTENCES, differences, peft_config, state_of, watcher
from tlens_callback import MemorySink, read_store


def qlora(tmp_path, folder, kind, dtype, callbacks):
    """TRL casts the adapters to bfloat16, and prepares the base for training."""
    data = Dataset.from_dict({"text": SENTENCES})
    set_seed(7)
    model = loaded(folder, kind, dtype)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4,
            learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no",
            use_cpu=True, bf16=False, disable_tqdm=True, seed=7,
        ),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config(lora_dropout=0.3, target_modules=linear_layers(model)),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("nf4", torch.float32),
        ("nf4", torch.bfloat16),
        ("int8", torch.float32),
        ("hqq", torch.float32),
    ],
    ids=str,
)
def test_training_on_a_quantised_base_leaves_no_trace(tmp_path, folder, kind, dtype):
    without = state_of(qlora(tmp_path / "without", folder, kind, dtype, []))
    memory = MemorySink()
    trainer = qlora(tmp_path / "with", folder, kind, dtype, [watcher(sinks=[memory])])
    assert differences(without, state_of(trainer)) == []
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert kinds == ({torch.bfloat16} if kind == "nf4" else kinds), "what TRL does to adapters"
    assert list(memory.steps) == [0, 1, 2, 3, 4]
    assert len(set(memory.curve("target_scores/loss/capital")[1].tolist())) == 5
    assert all(kl < 1e-2 for kl in memory.curve("fidelity/kl")[1])
    assert (memory.curve("frozen_weights/changed")[1] == 0).all()


class Evaluates(TrainerCallback):
    """Runs the model in eval mode, as a comparison that does not know of the packing would."""

    def on_train_begin(self, args, state, control, model, **_):
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 20, 21]]))
        model.train()


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit.*autograd kernel was not registered")
def test_the_check_finds_a_base_that_was_packed_anew(tmp_path, folder):
    """The control, on the CPUs on which bitsandbytes does so."""
    without = qlora(tmp_path / "without", folder, "nf4", torch.float32, [])
    layer = next(m for m in without.model.modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs nothing anew on this CPU")
    repacked = qlora(tmp_path / "with", folder, "nf4", torch.float32, [Evaluates()])
    assert differences(state_of(without), state_of(repacked))


@pytest.mark.slow
def test_the_example(run, small, tmp_path, capsys):  # noqa: F811
    run("qlora", "--model", small, "--steps", "2", "--every", "1")
    store = read_store(tmp_path / "runs" / "qlora" / "tlens")
    steps, values = store.curve("target_scores/probability/france")
    assert list(steps) == [0, 1, 2] and values[0] != values[-1]
    assert "weights='streamed'" in capsys.readouterr().out
