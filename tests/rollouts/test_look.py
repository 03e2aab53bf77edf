"""Looks at rollouts of real trainings, held against what the trainer says of the same tokens."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from tests.rollouts.trained import distinct, look, short, trainer, watched
from tests.tiny import VOCAB
from tlens_callback import MemorySink

pytestmark = pytest.mark.slow


class Seeing(GRPOTrainer):
    """Keeps what its loss is computed from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, dict[str, torch.Tensor]]] = []

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        kept = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        self.seen.append((self.state.global_step, kept))
        return super()._compute_loss(model, inputs)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One dict for each rollout that was trained on after this step."""
        found = []
        for at, batch in self.seen:
            for i in range(len(batch["completion_ids"]) if at == step else 0):
                row = {k: v[i] for k, v in batch.items() if v.ndim}
                n = int(row["completion_mask"].sum())
                found.append(
                    row
                    | {
                        "prompt": row["prompt_ids"][row["prompt_mask"].bool()].tolist(),
                        "completion": row["completion_ids"][:n].tolist(),
                        "n": n,
                    }
                )
        return found


def logged(of: Any, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in of.state.log_history if name in row}


def shown(sink: MemorySink, step: int) -> list[dict[str, Any]]:
    """One dict for each rollout of the readings of a step."""
    at: Any = {k.removeprefix("rollouts/"): r[step] for k, r in sink.readings.items() if step in r}
    group = at["group"].values.astype(int)
    ids, prompts = at["token"].values, at["prompt"].values
    rows = []
    for i in range(len(group)):
        real = ~np.isnan(ids[i])
        prompt = prompts[group[i]]
        row: dict[str, Any] = {"prompt": prompt[~np.isnan(prompt)].astype(int).tolist()}
        for name, reading in at.items():
            if reading.axes == ("rollout", "pos"):
                row[name] = reading.values[i][real]
            elif reading.axes[:1] == ("rollout",) and name != "attention":
                row[name] = reading.values[i]
        rows.append(row | {"completion": row["token"].astype(int).tolist()})
    return rows


def paired(of: Seeing, sink: MemorySink, step: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What was shown of each rollout beside what was trained on."""
    trained = of.rows(step)
    pairs = []
    for row in shown(sink, step):
        same = [
            one
            for one in trained
            if (one["prompt"], one["completion"]) == (row["prompt"], row["completion"])
            and abs(float(one["advantages"]) - row["advantage"]) < 1e-6
        ]
        assert same, "these tokens were never trained on"
        trained = [one for one in trained if one is not same[0]]
        pairs.append((row, same[0]))
    assert not trained
    return pairs


@pytest.mark.parametrize("accumulates", [1, 2])
def test_what_is_looked_at_is_what_is_trained_on(tmp_path, accumulates):
    """The same ids, advantages, entropies and divergences: with the weights that sampled them."""
    of, sink = watched(
        tmp_path,
        trains=Seeing,
        beta=0.05,
        temperature=0.8,
        per_device_train_batch_size=8 // accumulates,
        gradient_accumulation_steps=accumulates,
    )
    assert sink.readings["rollouts/token"].keys() == {0, 1, 2}, "the last step samples nothing more"
    entropy, kl = logged(of, "entropy"), logged(of, "kl")
    assert kl[1] == 0 and kl[3] > 1e-3
    for step in (0, 1, 2):
        pairs = paired(of, sink, step)
        assert len(pairs) == 8
        for row, theirs in pairs:
            assert torch.allclose(
                theirs["ref_per_token_logps"][: theirs["n"]],
                torch.from_numpy(row["base_logp"]),
                atol=2e-5,
            )
            if step == 0:
                assert not row["log_ratio"].any() and not row["js"].any() and not row["kl"].any()
        # TRL logs the mean of the batches' means.
        batches: dict[bytes, list[Any]] = {}
        for at, batch in of.seen:
            if at == step:
                batches[batch["completion_ids"].numpy().tobytes()] = []
        for row, theirs in pairs:
            for at, batch in of.seen:
                if at == step and any(
                    torch.equal(theirs["completion_ids"], ids) for ids in batch["completion_ids"]
                ):
                    batches[batch["completion_ids"].numpy().tobytes()].append(row)
                    break
        means = [
            np.concatenate([row["entropy"] for row in rows]).mean() for rows in batches.values()
        ]
        d = [-np.concatenate([row["log_ratio"] for row in rows]) for rows in batches.values()]
        k3 = [(np.exp(one) - one - 1).mean() for one in d]
        assert np.mean(means) == pytest.approx(entropy[step + 1], abs=1e-5)
        assert np.mean(k3) == pytest.approx(kl[step + 1], abs=1e-5)
        if accumulates == 1:
            curve = dict(zip(*sink.curve("rollouts/entropy_mean"), strict=True))
            assert curve[step] == pytest.approx(entropy[step + 1], abs=1e-5)
            curve = dict(zip(*sink.curve("rollouts/kl_k3"), strict=True))
            assert curve[step] == pytest.approx(kl[step + 1], abs=1e-5)


def test_weights_of_another_step_are_found_out(tmp_path):
    """The control of the test above: after the update the same tokens have other numbers."""
    some = {"beta": 0.05, "temperature": 0.8, "max_steps": 2}
    of, sink = watched(tmp_path, rollouts={"after_update": True}, **some)
    off = sink.readings["rollouts/entropy_mean"][1].values - logged(of, "entropy")[1]
    assert np.abs(off) > 1e-3
    change = sink.readings["rollouts/step_change"]
    assert change.keys() == {0, 1}
    assert np.nanmax(np.abs(change[1].values)) > 1e-2


def test_the_look_after_an_update_is_a_forward_pass_of_then(tmp_path):
    class Later(Seeing):
        """Runs what it has trained on once more, after the step."""

        after: ClassVar[dict[tuple[int, tuple[int, ...]], Any]] = {}

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step
            if step and self.seen:
                rows, model = self.rows(step - 1), self.model
                model.eval()
                with torch.no_grad():
                    for row in rows:
                        ids = torch.tensor([[*row["prompt"], *row["completion"]]])
                        # TRL's head gives log probabilities of the labels, divided by temperature.
                        z = model(ids, logits_to_keep=0, return_dict=True).logits[0].float()
                        here = slice(len(row["prompt"]) - 1, -1)
                        log = (z[here] / self.temperature).log_softmax(1)
                        own = log.gather(1, torch.tensor(row["completion"])[:, None])[:, 0]
                        self.after[step - 1, tuple(row["completion"])] = own.numpy()
                model.train()
            return super().training_step(*args, **kwargs)

    some = {"after_update": True}
    of, sink = watched(tmp_path, trains=Later, rollouts=some, temperature=0.8, max_steps=2)
    for step in (0,):
        for row in shown(sink, step):
            after = of.after[step, tuple(row["completion"])]
            np.testing.assert_allclose(row["step_change"], after - row["logp"], atol=3e-5)
            assert row["sum_step_change"] == pytest.approx(row["step_change"].sum(), abs=1e-5)
        gain = np.array([row["advantage"] for row in shown(sink, step)])
        moved = np.array([row["sum_step_change"] for row in shown(sink, step)])
        found = float(sink.readings["rollouts/update_gain"][step].values)
        assert found == pytest.approx((gain * moved).sum() / np.abs(gain).sum(), rel=1e-4)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {}),
    ("grpo", {"scale_rewards": "batch"}),
    ("grpo", {"scale_rewards": "none"}),
    ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}),
    ("grpo", {"reward_weights": [0.5, -2.0]}),
    ("rloo", {"beta": 0.0}),
    ("rloo", {"beta": 0.0, "normalize_advantages": True, "reward_clip_range": (-6.0, 6.0)}),
]


@pytest.mark.parametrize(
    ("name", "args", "private"),
    # The buffers hold what the trainer computed, whatever its settings are.
    [
        pytest.param(*of, False, marks=[pytest.mark.exhaustive] * (i in (1, 2, 5)))
        for i, of in enumerate(SETTINGS)
    ]
    + [pytest.param(*of, True, marks=pytest.mark.exhaustive) for of in SETTINGS[1:]]
    + [(*SETTINGS[0], True)],
)
def test_advantages_and_rewards_are_the_trainers(tmp_path, name, args, private, monkeypatch):
    """Also where its buffers cannot be read; with a function that gives nothing for some."""
    if not private:
        monkeypatch.setattr("tlens_callback.rollouts.rollout.buffered", lambda *_, **__: None)
    of, sink = watched(tmp_path, name, rewards=(distinct, short), max_steps=1, **args)
    rows = shown(sink, 0)
    logs = of._logs
    np.testing.assert_allclose([r["advantage"] for r in rows], [*logs["advantages"]], atol=1e-5)
    for i, function in enumerate(("distinct", "short")):
        np.testing.assert_array_equal([r["rewards"][i] for r in rows], [*logs["rewards"][function]])
    assert np.isnan([r["rewards"][1] for r in rows]).any()
    assert sink.readings["rollouts/rewards"][0].labels["function"] == ("distinct", "short")
    weights = np.array(args.get("reward_weights", [1.0, 1.0]))
    total = np.nansum(np.array([r["rewards"] for r in rows]) * weights, 1)
    np.testing.assert_allclose([r["weighted_reward"] for r in rows], total, rtol=1e-6)
    decoded = of.processing_class.batch_decode(
        [row["completion"] for row in rows], skip_special_tokens=True
    )
    assert decoded == [*logs["completion"]]


def test_rollouts_that_are_cut_off_and_not_trained_on_are_marked(tmp_path):
    """With `mask_truncated_completions` TRL counts only completions that end."""
    of, sink = watched(
        tmp_path, mask_truncated_completions=True, max_steps=1, max_completion_length=40, seed=3
    )
    rows = shown(sink, 0)
    cut = [row["truncated"] for row in rows]
    assert 0 < sum(cut) < len(cut)
    for row in rows:
        assert (row["completion"][-1] in (2, 3)) == (not row["truncated"])
        assert (row["trained"] == (0 if row["truncated"] else 1)).all()
    kept = np.concatenate([row["entropy"] for row in rows if not row["truncated"]])
    assert kept.mean() == pytest.approx(logged(of, "entropy")[1], abs=1e-5)
    found = float(sink.readings["rollouts/entropy_mean"][0].values)
    assert found == pytest.approx(kept.mean(), abs=1e-6)


def test_several_updates_of_one_generation(tmp_path):
    """`num_iterations`, `steps_per_generation`: the rollouts grow older, and stay these."""
    of, sink = watched(
        tmp_path, trains=Seeing, num_iterations=2, steps_per_generation=2, max_steps=5,
        per_device_train_batch_size=4,
    )  # fmt: skip
    ages = sink.curve("rollouts/age")[1].tolist()
    assert ages == [0, 1, 2, 3, 0]
    tokens = [sink.readings["rollouts/token"][s].values for s in range(5)]
    assert all(np.array_equal(tokens[0], t, equal_nan=True) for t in tokens[1:4])
    assert not np.array_equal(tokens[0], tokens[4], equal_nan=True)
    for step in range(4):
        for row in of.rows(step):
            assert any(row["completion"] == one["completion"] for one in shown(sink, step))


@pytest.mark.parametrize("attached", [True, False], ids=["attach", "reward"])
def test_without_texts_no_token_is_written(tmp_path, attached):
    callback, sink = look(rollouts={"texts": False})
    if attached:
        of = trainer(tmp_path, max_steps=1)
        callback.attach(of)
    else:
        of = trainer(
            tmp_path, max_steps=1, rewards=[callback.reward(distinct)], callbacks=[callback]
        )
    of.train()
    names = {key for key in sink.readings if key.startswith("rollouts/")}
    assert "rollouts/entropy" in names and "rollouts/contrast_direct" in names
    with_texts = {k for k in names for r in sink.readings[k].values() if r.texts is not None}
    assert all(key.startswith("rollouts/contrast_neuron") for key in with_texts)
    assert not {f"rollouts/{n}" for n in ("token", "prompt", "gained", "lost")} & names


def test_a_wrapped_function_is_enough(tmp_path):
    """`reward_funcs=[look.reward(f)]`, without a word to the trainer."""
    callback, sink = look()
    of = trainer(
        tmp_path,
        max_steps=1,
        rewards=[callback.reward(distinct), callback.reward(short)],
        callbacks=[callback],
    )
    of.train()
    plain, others = watched(tmp_path / "attached", max_steps=1, rewards=[distinct, short])
    assert sink.readings.keys() == others.readings.keys()
    for key in sink.readings:
        if key.startswith("rollouts/"):
            for step, reading in sink.readings[key].items():
                np.testing.assert_allclose(
                    reading.values, others.readings[key][step].values, atol=1e-6, err_msg=key
                )
    assert of.state.log_history[0]["reward"] == plain.state.log_history[0]["reward"]


def test_few_of_many(tmp_path):
    _, sink = watched(
        tmp_path,
        per_device_train_batch_size=24,
        num_generations=6,
        max_steps=1,
        rollouts={"groups": 2, "per_observation": 8, "max_tokens": 14},
    )
    group = sink.readings["rollouts/group"][0].values.tolist()
    assert group == [0] * 4 + [1] * 4
    token, prompt = (sink.readings[f"rollouts/{n}"][0].values for n in ("token", "prompt"))
    lengths = (~np.isnan(prompt)).sum(1)[np.array(group, int)] + (~np.isnan(token)).sum(1)
    assert lengths.max() == 14 and np.nanmax(token) < VOCAB
    assert sink.readings["rollouts/length"][0].values.max() == 10, "of the whole completion"


@pytest.mark.parametrize("peft", [None, pytest.param("lora", marks=pytest.mark.exhaustive)])
def test_a_copy_of_the_model_is_the_base(tmp_path, peft):
    """Under full fine-tuning there is no other; with an adapter it is the model without it."""
    _, without = watched(tmp_path / "without", peft=peft)
    _, sink = watched(tmp_path / "copy", peft=peft, rollouts={"base": "copy"})
    assert ("rollouts/log_ratio" in without.readings) == (peft is not None)
    first = trainer(tmp_path / "first", peft=peft).model
    for step in (0, 1, 2):
        for row in shown(sink, step):
            ids = torch.tensor([[*row["prompt"], *row["completion"]]])
            with torch.no_grad():
                z = first(ids, logits_to_keep=0, return_dict=True).logits[0].float()
            log = z[len(row["prompt"]) - 1 : -1].log_softmax(1)
            own = log.gather(1, torch.tensor(row["completion"])[:, None])[:, 0]
            np.testing.assert_allclose(row["base_logp"], own, atol=2e-5)
            if step == 0:
                assert not row["log_ratio"].any() and not row["js"].any()
    last = max(abs(row["log_ratio"]).max() for row in shown(sink, 2))
    assert last > 1e-2, "and the model has moved away from it"
    if peft is not None:
        for key in ("rollouts/log_ratio", "rollouts/js"):
            for step, reading in sink.readings[key].items():
                np.testing.assert_allclose(
                    reading.values, without.readings[key][step].values, atol=2e-5
                )
