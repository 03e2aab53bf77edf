"""How a replay differs from the run that was watched: what has changed, and what it cannot know.

Most are controls of `test_replay`.
"""

import shutil

import pytest
import torch
from peft import LoraConfig

from tests import tiny
from tests.offline.replaying import replayed, surplus, train, unlike
from tests.offline.test_replay import RUNS
from tlens_callback import FrozenWeights, HeadScores, ResidualNorms, TargetScores, TokenLoss, fast
from tlens_callback.instruments import TrainedFeatures, UpdateSparsity

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


FEW = TargetScores, TokenLoss, ResidualNorms, HeadScores, FrozenWeights


def few():
    return [kind() for kind in FEW]


def test_swapped_checkpoints_are_found_unequal(tmp_path):
    live = train(tmp_path, few(), **RUNS["SFT with LoRA"])
    run = tmp_path / "run"
    names = [run / f"checkpoint-{step}" for step in (2, 4)]
    for name in names:
        name.rename(f"{name}.was")
    for name, other in zip(names, reversed(names), strict=True):
        shutil.copytree(f"{name}.was", name)
        shutil.copy(f"{other}.was/adapter_model.safetensors", name)
    found = unlike(live, replayed(tmp_path, few()).store)
    assert {f"{step} target_scores/loss/capital" for step in (2, 4)} <= {
        each.rsplit(" ", 1)[0] for each in found
    }
    assert not [each for each in found if each.startswith(("0 target", "6 target", "2 trainer"))]


@pytest.mark.parametrize("run", ["SFT with LoRA", "full"])
def test_another_base_is_found_unequal(tmp_path, run):
    """Below adapters it is at every step, and after full fine-tuning at the first."""
    live = train(tmp_path, few(), **RUNS[run])
    other = tmp_path / "other" / "base"
    tiny.model("llama", seed=1).save_pretrained(other)
    found = unlike(live, replayed(tmp_path, few(), base=other).store)
    wrong = {int(each.split()[0]) for each in found if " target_scores/loss/capital" in each}
    assert wrong == ({0, 2, 4, 6} if run == "SFT with LoRA" else {0})
    assert any(" token_loss/change/capital" in each for each in found if each.startswith("6 "))


def test_without_a_base_the_first_checkpoint_is_what_changes_are_measured_from(tmp_path, capsys):
    live = train(tmp_path, few())
    again = replayed(tmp_path, few()).store
    assert (
        "there is no step 0, so changes are measured from checkpoint-2 on" in capsys.readouterr()[0]
    )
    assert again.steps == (2, 4, 6)
    assert (again.reading("token_loss/change/capital", 2).values == 0).all()
    assert again.reading("trainer/loss", 2).labels["update"] == ("1", "2")
    at_six = [each for each in unlike(live, again) if each.startswith("6 ")]
    assert any("token_loss/change" in each for each in at_six)
    assert not any("target_scores" in each for each in at_six)


def test_an_adapter_that_began_at_random_has_no_step_0(tmp_path, capsys):
    random = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    live = train(tmp_path, few(), adapter=random)
    again = replayed(tmp_path, few())
    assert "so changes are measured from the first checkpoint on: an" in capsys.readouterr()[0]
    assert again.store.steps == (2, 4, 6) and not again.left_out
    assert (again.store.reading("token_loss/change/capital", 2).values == 0).all()
    found = unlike(live, again.store)
    assert not any("target_scores" in each for each in found)
    assert any("token_loss/change" in each for each in found)
    assert replayed(tmp_path, few()).store.steps == (2, 4, 6)
    assert "all checkpoints have been observed already" in capsys.readouterr()[0]


def test_a_base_in_bfloat16_that_was_fully_trained_in_float32(tmp_path):
    """Step 0 is in the precision of the checkpoints, as it was in the run."""
    live = train(tmp_path, [*few(), UpdateSparsity()], saved=torch.bfloat16)
    again = replayed(tmp_path, [*few(), UpdateSparsity()], base=tmp_path / "base")
    assert unlike(live, again.store) == surplus(live)


def test_adapters_over_a_base_in_bfloat16_that_were_trained_in_float32(tmp_path, capsys):
    """No adapter says in which precision it was trained; what was watched does."""
    live = train(tmp_path, few(), **RUNS["SFT with LoRA"], saved=torch.bfloat16)
    again = replayed(tmp_path, few(), dtype=torch.float32, out=tmp_path / "same")
    assert unlike(live, again.store) == surplus(live)
    assert "computes in" not in capsys.readouterr()[0]
    assert unlike(live, replayed(tmp_path, few()).store) != surplus(live)
    said = "the run was watched in float32, and the replay computes in bfloat16"
    assert said in capsys.readouterr()[0]
    for memory in (tmp_path / "run").glob("checkpoint-*/tlens.memory"):
        memory.unlink()
    replayed(tmp_path, [TokenLoss()])
    assert "the replay computes in bfloat16, in which the base was saved" in capsys.readouterr()[0]


def test_what_learns_from_training_rows_has_the_probes_alone(tmp_path):
    """What a replay cannot know, and nothing else differs."""
    made = [TrainedFeatures("blocks.1.hook_resid_pre", steps=3, every=1), *few()]
    live = train(tmp_path, made, **RUNS["SFT with LoRA"])
    again = [TrainedFeatures("blocks.1.hook_resid_pre", steps=3, every=1), *few()]
    found = unlike(live, replayed(tmp_path, again).store, without=("cost/", "fidelity/"))
    differing = {each.split()[1].partition("/")[0] for each in found if each[0].isdigit()}
    assert differing == {"trained_features", "checkpoint"}


def test_default_instruments_and_no_probes(tmp_path, capsys):
    train(tmp_path, few(), **RUNS["SFT with LoRA"])
    again = replayed(tmp_path, None, arguments=dict(probes=[])).store
    assert "so the models see only repeated random blocks" in capsys.readouterr().out
    assert again.steps == (0, 2, 4, 6)
    assert {i.name for i in fast()} > {key.partition("/")[0] for key in again.keys} - {
        *("checkpoint", "cost", "fidelity", "trainer", "watch")
    }
    assert not [key for key in again.keys if key.endswith("/capital")]
