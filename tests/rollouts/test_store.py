"""`store.rollouts`: what was looked at, as tables."""

import numpy as np
import pytest

from tests.rollouts.test_look import shown
from tests.rollouts.trained import distinct, short, watched
from tlens_callback import LocalSink, MemorySink, read_store


@pytest.mark.parametrize("texts", [True, False])
def test_rollouts_as_tables(tmp_path, texts):
    memory, local = MemorySink(), LocalSink(tmp_path / "store", page=False)
    of, _ = watched(
        tmp_path,
        rewards=(distinct, short),
        max_steps=2,
        sinks=[memory, local],
        rollouts={"texts": texts},
    )
    store = read_store(tmp_path / "store")
    rollouts, tokens = store.rollouts(1)
    rows = rollouts.to_dict("list")
    assert rows["rollout"] == ["1.1", "1.2", "1.3", "1.4", "2.1", "2.2", "2.3", "2.4"]
    assert rows["group"] == [1] * 4 + [2] * 4 and set(rows["step"]) == {1}
    np.testing.assert_array_equal(rows["reward_distinct"], [*of._logs["rewards"]["distinct"]])
    np.testing.assert_allclose(rows["advantage"], [*of._logs["advantages"]], atol=1e-6)
    assert ("completion" in rows) == ("prompt" in rows) == ("token" in tokens) == texts
    for i, name in enumerate(rows["rollout"]):
        mine = tokens[tokens["rollout"] == name]
        assert mine["pos"].tolist() == [*range(len(mine))]
        assert len(mine) == rows["length"][i]
        if not texts:
            continue
        one = shown(memory, 1)[i]
        assert mine["token_id"].tolist() == one["completion"]
        np.testing.assert_array_equal(mine["entropy"], one["entropy"])
        assert "".join(mine["token"]) == rows["completion"][i]
        assert rows["prompt"][i] == rows["prompt"][4 * (i // 4)]
    with pytest.raises(ValueError, match=r"Step 2 .* has no rollouts.*attach"):
        store.rollouts(2)
    with pytest.raises(ValueError, match="no complete step 7"):
        store.rollouts(7)
