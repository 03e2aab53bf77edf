"""What a run's summary says, against numpy on the store."""

import subprocess
import sys

import numpy as np
import pytest

from tests import tiny
from tests.described import as_read
from tests.offline.two_models import DOG, save, watched
from tests.sinks.samples import small
from tests.training import trainer
from tlens_callback import LocalSink, Reading, TLensCallback, read_store
from tlens_callback.events import Watch
from tlens_callback.offline.changes import (
    History,
    changed_keys,
    changed_roles,
    role_scores,
    roles_taken,
)
from tlens_callback.offline.summary import summary


def number(key, value):
    return Reading(key=key, values=np.array(value), unit="x")


def written(path, by_step):
    sink = LocalSink(path, page=False)
    for step, readings in by_step.items():
        sink.write(readings, step=step)
    sink.close()
    return read_store(path)


def block_scores(role, values):
    """[block, layer, head]."""
    key = f"head_scores/{role}_by_block"
    values = np.array(values)
    axes = ("block", "layer", "head")
    return as_read(Reading(key=key, values=values, axes=axes, unit="probability"))[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The store of a short training."""
    path = tmp_path_factory.mktemp("run")
    watching = TLensCallback([DOG], every_n_steps=2, sinks=[LocalSink(path / "tlens", page=False)])
    trainer(path, watching, logging_steps=1, learning_rate=3e-2).train()
    return read_store(path / "tlens")


def test_the_numbers_of_a_training(run):
    text = summary(run)
    flat = text.replace("\n  ", " ")
    assert flat.splitlines()[0] == "4 observations, steps 0 to 6, 1 probe, 2 layers x 4 heads"
    losses = [
        value
        for step in run.steps
        for r in run.readings(step, {"trainer/loss"})
        for value in r.values
    ]
    assert len(losses) == 6
    assert f"Training loss {losses[0]:.3g} -> {losses[-1]:.3g} (logged at steps 1 and 6)" in flat

    steps, chance = run.curve("target_scores/probability/dog")
    at = int(np.abs(np.diff(chance)).argmax())
    said = next(line for line in flat.splitlines() if line.startswith("P(target) dog"))
    assert f"-> {chance[-1]:.3f} (most in steps {steps[at]}-{steps[at + 1]}), rank " in said
    assert "\n  (rank: how many tokens are likelier)\n" in text

    js = run.curve("attention_drift/js")[1][-1]
    order = np.argsort(-js, axis=None)[:4]
    heads = [f"L{i // 4}H{i % 4} {js.flat[i]:.3g}" for i in order]
    assert f"Attention moved most: {', '.join(heads)} (JS" in flat

    far = run.curve("activation_drift/cosine")[1][-1]
    layer, part = np.unravel_index(far.argmax(), far.shape)
    name = ("resid", "attn", "mlp")[part]
    assert f"Activations moved most: layer {layer} {name} {far.max():.3g}" in flat

    found = {}
    for measure, name in (("head", "L{}H{}"), ("mlp", "L{} MLP")):
        _, curve = run.curve(f"logit_attribution/{measure}/dog")
        found |= {name.format(*i): (curve[0][i], curve[-1][i]) for i in np.ndindex(curve[0].shape)}
    most = max(found, key=lambda one: abs(found[one][1] - found[one][0]))
    first, last = found[most]
    assert f"Direct attribution changed most: {most} {first:.2f} -> {last:.2f} for dog" in flat

    _, off = run.curve("fidelity/max_abs_diff")
    assert f"at worst: {off.max():.1e} logits" in flat


def test_fits_a_commit_message(run):
    lines = summary(run).splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 72
    assert summary(run).isascii()


def test_roles_are_those_of_watch(tmp_path):
    rng = np.random.default_rng(0)
    first, last = rng.random((2, 3, 3, 6)).astype(np.float32)
    # At the thresholds, and too small a move across one.
    first[:, 0, :3], last[:, 0, :3] = [0.29, 0.31, 0.1], [0.31, 0.2, 0.3]
    none = block_scores("previous", first * 0)  # by which Watch knows a HeadScores
    steps = {
        0: [none, block_scores("induction", first)],
        5: [none, block_scores("induction", last)],
    }
    history = History(written(tmp_path / "s", steps))
    gained, lost = roles_taken(history, Watch())
    was, now = first.min(0), last.min(0)
    up, down = set(), set()
    for i, j in np.ndindex(was.shape):
        if was[i, j] < 0.3 <= now[i, j] and now[i, j] - was[i, j] >= 0.05:
            up.add(f"L{i}H{j} induction")
        if now[i, j] < 0.15 and was[i, j] >= 0.3 and was[i, j] - now[i, j] >= 0.05:
            down.add(f"L{i}H{j} induction")
    assert {one.what for one in gained} == up and {one.what for one in lost} == down
    assert "L0H2 induction" in up and "L0H0 induction" not in up and down

    watch = Watch()
    watch.look(steps[0])
    texts = [t for r in watch.look(steps[5]) if r.texts is not None for t in r.texts]
    said = {"new": up, "no": down}
    assert len(texts) == 2
    for text in texts:
        heads = said[text.split()[0]]
        assert len(heads) <= 8 and all(f"{head.split()[0]} (" in text for head in heads)

    other = Watch(takes=0.9, loses=0.01)
    assert roles_taken(history, other) == ([], [])


def test_many_heads_are_all_named(tmp_path):
    low, high = np.zeros((2, 2, 12)), np.ones((2, 2, 12))
    store = written(
        tmp_path / "s", {0: [block_scores("previous", low)], 1: [block_scores("previous", high)]}
    )
    gained, lost = roles_taken(History(store), Watch())
    assert len(gained) == 24 and not lost
    assert "Roles gained: L0H0 previous 0.00 -> 1.00" in summary(store)
    assert "and 20 more" in summary(store).replace("\n  ", " ")


def test_most_of_it_is_the_largest_interval(tmp_path):
    curve = {0: 0.1, 10: 0.2, 20: 0.15, 30: 0.6, 40: 0.65}
    scores = {s: [block_scores("duplicate", np.full((2, 1, 1), v))] for s, v in curve.items()}
    store = written(tmp_path / "s", scores)
    (change,) = changed_roles(History(store), 3)
    assert (change.what, change.when) == ("L0H0 duplicate", (20, 30))
    assert "L0H0 duplicate 0.10 -> 0.65 (most in steps 20-30)" in summary(store)


def test_a_role_of_one_length_only_is_none(tmp_path):
    """The minimum over the block lengths, as `Watch` takes it."""
    first, last = np.zeros((2, 1, 1)), np.array([[[0.9]], [[0.05]]])
    steps = {0: [block_scores("induction", first)], 1: [block_scores("induction", last)]}
    assert roles_taken(History(written(tmp_path / "s", steps)), Watch()) == ([], [])


def test_a_role_in_between_is_not_denied(tmp_path):
    scores = {s: [block_scores("induction", [[[v]]])] for s, v in ((0, 0.1), (5, 0.6), (9, 0.12))}
    text = summary(written(tmp_path / "s", scores))
    assert "No role gained or lost by the end; scores changed most:" in text


def test_what_is_not_a_number_has_no_rank_and_has_not_stood_still(tmp_path):
    def at(step, value):
        js = np.full((1, 2), value / 1e9)
        drift = Reading(key="attention_drift/js", values=js, axes=("layer", "head"), unit="bits")
        return [
            number("target_scores/probability/p", value),
            number("target_scores/rank/p", 0),
            drift,
        ]

    text = summary(written(tmp_path / "s", {0: at(0, 0.5), 4: at(4, np.nan)}))
    assert "P(target) p 0.500 -> nan" in text and "rank" not in text
    assert "not moved" not in text and "How far attention moved cannot be said" in text
    text = summary(written(tmp_path / "t", {0: at(0, 0.5), 4: at(4, 0.5)}))
    assert "P(target) p 0.500, rank 0" in text and "Attention has not moved" in text


def test_a_reward_is_told_beside_a_loss_that_says_little(tmp_path):
    def logged(name, **by_step):
        return Reading(
            key=f"trainer/{name}",
            values=np.array([*by_step.values()]),
            axes=("update",),
            unit="as logged",
            labels={"update": [at.removeprefix("at") for at in by_step]},
        )

    first = [number("a/b", 1), logged("loss", at1=0.0004), logged("reward", at1=0.25, at2=0.5)]
    last = [number("a/b", 2), logged("loss", at9=-0.0002), logged("reward", at8=0.5, at9=0.875)]
    lines = summary(written(tmp_path / "s", {2: first, 9: last})).splitlines()
    assert lines[1:3] == [
        "Training loss 0.0004 -> -0.0002 (logged at steps 1 and 9)",
        "Reward 0.25 -> 0.875 (logged at steps 1 and 9)",
    ]


def test_a_store_of_unknown_instruments(tmp_path):
    steps = {
        step: [
            number("mine/small", 1 + 0.001 * step),
            number("mine/large", 100 + 100 * step),
            Reading(key="mine/which", values=np.array(step), unit="index"),
            number("cost/seconds", 10.0**step),
            Reading(key="mine/some", values=np.full(4, 1 + step), axes=("x",), unit="x"),
        ]
        for step in (0, 1, 3)
    }
    store = written(tmp_path / "s", steps)
    assert summary(store).splitlines() == [
        "3 observations, steps 0 to 3",
        "Changed most relative to their size:",
        "  mine/large 100 -> 400",
        "  mine/some 2 -> 8",
        "  mine/small 1 -> 1.003",
    ]
    assert [one.what for one in changed_keys(History(store), 1)] == ["mine/large"]


def test_one_step_gives_values_only(tmp_path):
    folder = save(tiny.model("llama"), tmp_path / "base")
    text = summary(read_store(watched(tmp_path / "one", {7: folder})))
    assert text.startswith("1 observation, step 7, 2 probes, 2 layers x 4 heads\nP(target) ")
    assert "->" not in text and "most in" not in text and "moved" not in text
    store = written(tmp_path / "own", {0: [number("mine/score", 0.25)]})
    assert summary(store) == "1 observation, step 0\n  mine/score 0.25"


def test_events_are_told_and_counted(tmp_path):
    def events(*texts):
        return Reading(
            key="watch/events",
            values=np.zeros(len(texts)),
            axes=("event",),
            unit="event",
            texts=np.array(texts),
        )

    store = written(
        tmp_path / "s",
        {0: [number("a/b", 1)], 5: [events("one", "two " * 60)], 9: [events("three", "four")]},
    )
    lines = summary(store).splitlines()
    at = lines.index("Events:")
    assert lines[at + 1] == "  step 5: one" and lines[at + 3 :] == [
        "  step 9: three",
        "  and 1 more",
    ]
    assert lines[at + 2].startswith("  step 5: two two") and lines[at + 2].endswith(" ...")
    assert max(map(len, lines)) <= 72


def test_what_changes_its_shape_is_compared_since_then(tmp_path):
    """A run that was resumed with other blocks, say."""
    scores = {0: np.zeros((3, 1, 1)), 5: np.full((2, 1, 1), 0.1), 9: np.full((2, 1, 1), 0.8)}
    steps = {step: [block_scores("induction", values)] for step, values in scores.items()}
    assert "L0H0 induction 0.10 -> 0.80" in summary(written(tmp_path / "s", steps))


def test_odd_values(tmp_path):
    """NaN, infinity and every shape of reading."""
    store = written(tmp_path / "s", {0: small(0), 3: small(3), 4: small(4)})
    assert len(summary(store).splitlines()) > 2


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="has no complete step"):
        path = written(tmp_path / "s", {0: []}).path
        for file in path.glob("scores/*"):
            file.unlink()
        summary(read_store(path))


def test_roles_of_the_package_have_scores(run):
    roles = {role for role, _, _ in role_scores(History(run))}
    assert roles == {"previous", "duplicate", "induction"}


@pytest.mark.slow
def test_a_store_that_describes_itself_needs_no_model(run):
    """Else a summary takes the seconds in which transformers and TransformerLens are imported."""
    code = (
        "import sys\n"
        "from tlens_callback.offline.summary import summary\n"
        "from tlens_callback.store import read_store\n"
        "print(summary(read_store(sys.argv[1])))\n"
        "assert not {'transformers', 'transformer_lens'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, summary(run) + "\n"), done.stderr
