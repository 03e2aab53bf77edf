"""What a trainer's own buffers are asked for, and that nothing unexpected is believed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rollouts.test_look import shown
from tests.rollouts.trained import watched
from tlens_callback.rollouts.buffers import buffered

PAD = 3
IDS = [[5, 6, 2], [7, 8], [5, 6, 2], [9], [7, 8], [4, 4, 4]]
"""Two groups of three; the second one shares two completions with the first."""
PROMPTS = [[11, 12]] * 3 + [[13]] * 3
GAINS = [1.0, -1.0, 0.5, 2.0, -2.0, 0.25]


def trainer(order: Any = (4, 0, 2, 5, 1, 3), **more: Any) -> Any:
    """One with the rows in this order, in two batches."""
    rows = [*order]
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    of: dict[str, list[Any]] = {name: [] for name in names}
    for i in rows:
        left, right = 2 - len(PROMPTS[i]), 3 - len(IDS[i])
        of["prompt_ids"].append([PAD] * left + PROMPTS[i])
        of["prompt_mask"].append([0] * left + [1] * len(PROMPTS[i]))
        of["completion_ids"].append(IDS[i] + [PAD] * right)
        of["completion_mask"].append([1] * len(IDS[i]) + [0] * right)
    tensors = {name: torch.tensor(value) for name, value in of.items()}
    tensors["advantages"] = torch.tensor([GAINS[i] for i in rows])
    for name, value in more.items():
        tensors[name] = torch.tensor([value[i] for i in rows])
    batches = [{n: t[:3] for n, t in tensors.items()}, {n: t[3:] for n, t in tensors.items()}]
    batches[0]["num_items_in_batch"] = torch.tensor(14)
    return SimpleNamespace(
        _buffered_inputs=batches, processing_class=SimpleNamespace(pad_token_id=PAD)
    )


def read(of: Any, prompts: Any = PROMPTS, near: Any = GAINS, ids: Any = IDS) -> Any:
    return buffered(of, ids, 3, prompts=prompts, near=near)


def test_each_completion_has_its_own_row():
    found = read(trainer())
    assert [one.prompt for one in found] == PROMPTS
    assert [one.advantage for one in found] == GAINS, "equal completions are told apart by it"
    assert [one.trained for one in found] == [[True] * len(ids) for ids in IDS]
    assert {one.sampled_with for one in found} == {None}
    # Prompts that somebody encodes differently do not matter, nor do unknown advantages.
    again = read(trainer((0, 1, 2, 3, 4, 5)), prompts=[[1]] * 6, near=[float("nan")] * 6)
    assert [one.prompt for one in again] == PROMPTS
    assert sorted(one.advantage for one in again[:3]) == sorted(GAINS[:3])


def test_tools_and_another_sampler_are_seen():
    tools = [[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0]]
    logps = [[-0.1 * i, -0.2, -0.3] for i in range(6)]
    found = read(trainer(tool_mask=tools, sampling_per_token_logps=logps))
    for i, one in enumerate(found):
        n = len(IDS[i])
        assert one.trained == [bool(x) for x in tools[i][:n]]
        assert one.sampled_with == pytest.approx(logps[i][:n])


def test_groups_of_equal_completions_are_told_apart_by_their_prompts():
    same = [[5, 6, 2]] * 6
    of = trainer()
    for batch in of._buffered_inputs:
        batch["completion_ids"][:] = torch.tensor(same[0])
        batch["completion_mask"][:] = 1
    assert [one.prompt for one in read(of, ids=same)] == PROMPTS
    assert read(of, ids=same, prompts=[[1]] * 6) is None


def broken(name: str, change: Any) -> Any:
    of = trainer()
    for batch in of._buffered_inputs:
        batch[name] = change(batch[name])
    return of


@pytest.mark.parametrize(
    "of",
    [
        SimpleNamespace(),
        SimpleNamespace(_buffered_inputs=None),
        SimpleNamespace(_buffered_inputs={}),
        SimpleNamespace(_buffered_inputs=[]),
        SimpleNamespace(_buffered_inputs=[1]),
        broken("prompt_ids", lambda t: t.tolist()),
        broken("advantages", lambda t: t[:2]),
        broken("advantages", lambda t: t[:, None]),
        broken("completion_mask", lambda t: t[:, :1]),
        broken("prompt_mask", lambda t: t[:, :1]),
        broken("completion_ids", lambda t: t + 1),
        broken("completion_ids", lambda t: t.flip(0)[:2]),
    ],
)
def test_what_is_not_as_expected_is_not_believed(of):
    assert read(of) is None


def test_a_sampler_that_is_off_is_told(tmp_path, monkeypatch):
    """With vLLM the trainer has the log probabilities of the sampler, and the shadow says who is
    off: here every third token is, by 0.3."""
    from tlens_callback.rollouts import rollout as module

    usual = module.buffered

    def sampled(of: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        for batch in of._buffered_inputs:
            zero = torch.zeros(batch["completion_ids"].shape)
            zero[:, ::3] = -0.3
            batch["sampling_per_token_logps"] = batch["old_per_token_logps"] + zero
        return usual(of, ids, *args, **kwargs)

    monkeypatch.setattr(module, "buffered", sampled)
    # Several updates of one generation: the trainer keeps the log probabilities it began with.
    _, sink = watched(tmp_path, max_steps=1, num_iterations=2)
    rows = shown(sink, 0)
    for row in rows:
        n = len(row["completion"])
        wanted = [0.3 if i % 3 == 0 else 0.0 for i in range(n)]
        assert row["sampler_gap"].tolist() == pytest.approx(wanted, abs=2e-5)
    share = sum(-(-len(row["completion"]) // 3) for row in rows) / sum(
        len(row["completion"]) for row in rows
    )
    assert float(sink.readings["rollouts/off_policy"][0].values) == pytest.approx(share)
