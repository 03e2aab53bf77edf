"""What a summary says of rollouts, against numpy on the store of a real training."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.rollouts.test_lines import compared
from tests.rollouts.trained import distinct, short, watched
from tlens_callback import LocalSink, Reading, read_store
from tlens_callback.offline.summary import WIDTH, summary
from tlens_callback.rollouts import Look


def stored(path, **settings):
    sinks = [LocalSink(path / "store", page=False)]
    watched(path / "out", rewards=(distinct, short), sinks=sinks, **settings)
    return read_store(path / "store")


def flat(store):
    return re.sub(r"\n  ", " ", summary(store)).splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    some = {"fdr": 0.9999, "neurons": 0}
    return stored(tmp_path_factory.mktemp("run"), rollouts=some, max_steps=4)


def test_what_became_of_the_rollouts(run):
    (line,) = [line for line in flat(run) if line.startswith("Rollouts")]
    first, last = ({r.measure: r.values for r in run.readings(step)} for step in (0, 3))
    assert first["reward_mean"] != last["reward_mean"]

    def change(form, name):
        ends = [form.format(float(np.nanmean(of[name]))) for of in (first, last)]
        return " -> ".join(dict.fromkeys(ends))

    assert line == (
        f"Rollouts, steps 0 to 3: reward {change('{:.3g}', 'reward_mean')}, "
        f"length {change('{:.3g}', 'length')} tokens, "
        f"cut off {change('{:.0%}', 'truncated_share')}, "
        f"groups without spread {change('{:.0%}', 'dead_groups')}"
    )


def test_what_tells_winners_from_losers(run):
    (line,) = [line for line in flat(run) if line.startswith("Winners")]
    at = {r.measure: r for r in run.readings(3)}
    found, of = (int(at[name].values) for name in ("discoveries", "looked_at"))
    start = f"Winners and losers at step 3: {found} of {of} numbers compared tell them apart: "
    assert found > 3 and line.startswith(start)
    *named, more = line.removeprefix(start).split("; ")
    assert len(named) == 3 and more == f"and {found - 3} more"
    q = []
    for one in named:
        where = r"L(\d+)(?:H(\d+)| MLP) .* \((\w+) ([-+][\d.e-]+) \w+\), q ([\d.]+)(.*)"
        matched = re.fullmatch(where, one)
        assert matched is not None, one
        layer, head, measure, value, rate, rest = matched.groups()
        place = (int(layer),) if head is None else (int(layer), int(head))
        values, signs = (at[f"contrast_{measure}{x}"].values for x in ("", "_sign"))
        q.append(at[f"contrast_{measure}_q"].values[place])
        assert float(value) == pytest.approx(values[place], rel=0.06)
        assert float(rate) == pytest.approx(q[-1], rel=0.06)
        earlier = [run.reading(f"rollouts/contrast_{measure}", step).values for step in range(4)]
        known = [np.sign(of[place]) for of in earlier if not np.isnan(of).any()]
        same = np.mean([sign == np.sign(values[place]) for sign in known])
        assert signs[place] == pytest.approx(np.mean(known))
        assert f", same sign in {same:.0%} of observations" in rest
        long = at[f"contrast_{measure}_length"].values[place]
        assert ("may be length" in rest) == (abs(long) > 0.7)
    every = [r.values.ravel() for m, r in at.items() if re.fullmatch(r"contrast_\w+(?<!_run)_q", m)]
    assert q == sorted(np.concatenate(every))[:3]


def test_what_the_whole_run_tells(run):
    (line,) = [line for line in flat(run) if line.startswith("Over all observations so far: ")]
    at = {r.measure: r for r in run.readings(3)}
    found, of = (int(at[name].values) for name in ("run_discoveries", "looked_at"))
    assert f"{found} of {of} numbers compared tell them apart: " in line
    measure, value, rate = re.search(r"\((\w+) ([-+][\d.e-]+) sd\), q ([\d.e-]+)", line).groups()
    place = re.search(r"apart: L(\d+)(?:H(\d+))?", line)
    q, z = (at[f"contrast_{measure}_run{x}"].values for x in ("_q", ""))
    at_place = tuple(int(one) for one in place.groups() if one is not None)
    assert float(rate) == pytest.approx(q[at_place], rel=0.06)
    assert float(value) == pytest.approx(z[at_place], rel=0.06)
    every = [r.values.min() for m, r in at.items() if re.fullmatch(r"contrast_\w+_run_q", m)]
    assert q[at_place] == min(every)


@pytest.mark.slow
def test_the_command_says_the_same(run):
    command = [sys.executable, "-m", "tlens_callback", "summary", str(run.path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == summary(run)
    assert all(len(line) <= WIDTH for line in told.stdout.splitlines())


def test_nothing_tells_them_apart(tmp_path):
    store = stored(tmp_path, rollouts={"fdr": 1e-6}, max_steps=1)
    line = "Winners and losers at step 0: none of 140 numbers compared tells them apart"
    assert line in flat(store)
    (changed,) = [line for line in flat(store) if line.startswith("Rollouts, step 0: ")]
    assert "->" not in changed


def test_no_group_has_spread(tmp_path, capsys):
    def same(completions, **_):
        return [1.0] * len(completions)

    sinks = [LocalSink(tmp_path / "store", page=False)]
    watched(tmp_path / "out", rewards=(same,), sinks=sinks, max_steps=1)
    (line,) = [line for line in flat(read_store(tmp_path / "store")) if "Winners" in line]
    assert line == "Winners and losers at step 0: no group has spread, so there are none to compare"
    assert "rollouts: at step 0, no group has spread, so there are no" in capsys.readouterr().out


def test_a_contrast_that_may_be_length_is_said_to_be(tmp_path):
    sink = LocalSink(tmp_path, page=False)
    group = Reading(key="rollouts/group", values=np.zeros(2), axes=("rollout",), unit="index")
    numbers = compared(
        contrast_direct=[0.1, -0.2, 0.3, 0.4],
        contrast_direct_q=[0.5, 0.02, 0.01, 1],
        contrast_direct_length=[0, -0.8, 0.1, 0],
        contrast_direct_sign=[0, -0.5, 1, 1],
        discoveries=2.0,
        looked_at=99.0,
    )
    both = [group.described(Look.description), *numbers]
    for step in (2, 4):
        sink.write(both, step=step)
    sink.close()
    assert (
        "Winners and losers at step 4: 2 of 99 numbers compared tell them apart: L9H0 adds more to "
        "the sampled tokens (direct +0.3 logit), q 0.01, same sign in 100% of observations; L3H1 "
        "adds less to the sampled tokens (direct -0.2 logit), q 0.02, same sign in 75% of "
        "observations, may be length (correlation -0.80)"
    ) in flat(read_store(tmp_path))
