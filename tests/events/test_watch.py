"""Events: raised when something happens, once, and not otherwise."""

import re

import numpy as np
import pytest

from tests import tiny
from tests.described import as_read
from tests.instruments.test_contract import documented
from tlens_callback import HeadScores, ProbeBatch, Reading, Rule, Shadow, Watch, observe
from tlens_callback.probes.builtin import repeated_blocks

R = "(previous|duplicate|induction)"


def scores(induction=(), previous=(), entropy=0.5, layers=None) -> list[Reading]:
    """Head scores of two layers of three heads: mostly nothing, and some heads as given.

    Args:
        induction, previous: (layer, head, score at block length 8, score at 24).
    """
    labels = {} if layers is None else {"layer": layers}
    made = []
    for role, some in (("induction", induction), ("previous", previous), ("duplicate", ())):
        values = np.full((2, 2, 3), 0.02)
        for layer, head, short, long in some:
            values[:, layer, head] = short, long
        made.append(
            Reading(
                key=f"head_scores/{role}_by_block",
                values=values,
                axes=("block", "layer", "head"),
                unit="probability",
                labels={"block": ["8", "24"], **labels},
            )
        )
    entropies = np.full((2, 3), 0.5)
    entropies[1] = entropy
    made.append(
        Reading(
            key="head_scores/entropy",
            values=entropies,
            axes=("layer", "head"),
            unit="fraction",
            labels=labels,
        )
    )
    return as_read(*made)


def number(key: str, value: float) -> Reading:
    return as_read(Reading(key=key, values=np.asarray(value), unit="1"))[0]


def sentences(watch: Watch, readings) -> list[str]:
    got = {reading.key: reading for reading in watch.look(readings)}
    events = got.get("watch/events")
    found = [] if events is None else list(events.texts)
    assert got["watch/count"].values == len(found)
    if events is not None:
        assert events.values.shape == (len(found),)
    return found


def test_a_head_takes_a_role_once():
    watch = Watch()
    assert sentences(watch, scores()) == []
    (said,) = sentences(watch, scores(induction=[(1, 2, 0.5, 0.6)]))
    assert said == "new induction head, seen in its attention pattern: L1H2 (0.02 -> 0.50)"
    for _ in range(30):
        assert sentences(watch, scores(induction=[(1, 2, 0.5, 0.6)])) == []


def test_a_positional_copy_takes_no_role():
    """High at one block length is high at one block length only."""
    watch = Watch()
    sentences(watch, scores())
    assert sentences(watch, scores(induction=[(1, 2, 0.95, 0.03)])) == []
    assert len(sentences(watch, scores(induction=[(1, 2, 0.95, 0.9)]))) == 1


def test_what_a_head_is_at_first_is_no_event():
    watch = Watch()
    assert sentences(watch, scores(induction=[(0, 1, 0.9, 0.9)])) == []
    assert sentences(watch, scores(induction=[(0, 1, 0.8, 0.9)])) == []


def test_a_role_is_lost_and_taken_by_another():
    watch = Watch()
    sentences(watch, scores(previous=[(0, 1, 0.9, 0.9)]))
    said = sentences(watch, scores(previous=[(0, 1, 0.05, 0.9), (0, 2, 0.7, 0.8)]))
    assert said == [
        "new previous head, seen in its attention pattern: L0H2 (0.02 -> 0.70)",
        "no previous head any more: L0H1 (0.90 -> 0.05); best is L0H2 0.70",
    ]


def test_what_several_heads_do_at_once_is_one_event():
    watch = Watch()
    sentences(watch, scores())
    (said,) = sentences(watch, scores(induction=[(0, 0, 0.5, 0.6), (1, 2, 0.4, 0.9)]))
    what = "new induction head, seen in its attention pattern"
    assert said == f"{what}: L0H0 (0.02 -> 0.50), L1H2 (0.02 -> 0.40)"


def test_the_value_of_an_event_is_the_highest_score_of_its_heads():
    watch = Watch()
    sentences(watch, scores())
    found = {r.key: r for r in watch.look(scores(induction=[(0, 0, 0.7, 0.6), (1, 2, 0.4, 0.9)]))}
    assert found["watch/events"].values.tolist() == pytest.approx([0.6])


def test_between_the_thresholds_nothing_changes():
    """Neither does a head that hovers about one of them raise an event at each observation."""
    watch = Watch(takes=0.5, loses=0.3, cooldown=0)
    sentences(watch, scores())
    raised = [
        bool(sentences(watch, scores(induction=[(1, 0, s, s)])))
        for s in (0.4, 0.55, 0.45, 0.35, 0.52, 0.31, 0.29, 0.35, 0.49, 0.51)
    ]
    assert np.flatnonzero(raised).tolist() == [1, 6, 9]


def test_a_head_that_was_nearly_there_has_to_move():
    watch = Watch()
    sentences(watch, scores(induction=[(1, 0, 0.298, 0.298)]))
    assert sentences(watch, scores(induction=[(1, 0, 0.301, 0.301)])) == []
    assert sentences(watch, scores(induction=[(1, 0, 0.36, 0.36)])) == [
        "new induction head, seen in its attention pattern: L1H0 (0.30 -> 0.36)"
    ]


def test_a_head_that_nearly_had_the_role_has_to_move_to_lose_it():
    watch = Watch(moves=0.2)
    held = [(1, 0, 0.31, 0.31)]
    sentences(watch, scores(induction=held))
    assert sentences(watch, scores(induction=[(1, 0, 0.14, 0.14)])) == []
    assert sentences(watch, scores(induction=[(1, 0, 0.10, 0.10)])) == [
        "no induction head any more: L1H0 (0.31 -> 0.10); best is L1H0 0.10"
    ]


def test_the_same_event_waits_for_the_cooldown():
    watch = Watch(cooldown=5)
    sentences(watch, scores())
    raised = [
        bool(sentences(watch, scores(induction=[(1, 0, 0.9, 0.9)] if i % 2 else [])))
        for i in range(1, 14)
    ]
    # Taken at 1, lost at 2, then quiet until both have waited for more than five observations.
    assert (1 + np.flatnonzero(raised)).tolist() == [1, 2, 7, 8, 13]


def test_what_waits_for_the_cooldown_is_told_in_the_end():
    """Otherwise the last that was said of a head would not be what it is."""
    watch = Watch(cooldown=3)
    sentences(watch, scores())
    said = [
        sentences(watch, scores(induction=[(1, 0, s, s)]))
        for s in (0.9, 0.05, 0.8, 0.8, 0.8, 0.8, 0.8)
    ]
    assert said[:2] == [
        ["new induction head, seen in its attention pattern: L1H0 (0.02 -> 0.90)"],
        ["no induction head any more: L1H0 (0.90 -> 0.05); best is L1H0 0.05"],
    ]
    assert said[2:] == [
        [],
        [],
        ["new induction head, seen in its attention pattern: L1H0 (0.05 -> 0.80)"],
        [],
        [],
    ]


def test_scores_that_are_no_numbers_change_nothing():
    watch = Watch()
    sentences(watch, scores(induction=[(1, 0, 0.9, 0.9)]))
    assert sentences(watch, scores(induction=[(1, 0, np.nan, 0.9)], entropy=np.nan)) == []
    assert sentences(watch, scores(induction=[(1, 0, 0.9, 0.9)])) == []
    two = [(1, 0, 0.01, 0.9), (0, 0, np.nan, np.nan)]
    assert sentences(watch, scores(induction=two)) == [
        "no induction head any more: L1H0 (0.90 -> 0.01); best is L0H1 0.02"
    ]


@pytest.mark.parametrize("scores_", [HeadScores(name="mine"), HeadScores(strict=False)])
def test_any_head_scores_are_followed(scores_):
    live = tiny.model("llama")
    batch = ProbeBatch.encode(repeated_blocks(64), vocab_size=tiny.VOCAB)
    readings = observe(Shadow(live), batch, [scores_])
    kind = "" if scores_.strict else "_diagonal"
    by_block = {r.measure: r for r in readings}[f"induction{kind}_by_block"]
    (curve,) = [r for r in Watch().look(readings) if r.measure.startswith("induction_L")]
    assert curve.values == by_block.values.min(0).max()


@pytest.mark.parametrize("watch", [Watch(heads=[(0, 0)]), Watch(scores="head_scores")])
def test_heads_without_scores_are_refused(watch):
    with pytest.raises(ValueError, match="needs an instrument that scores heads in a role"):
        watch.look([number("a/b", 1)])


def test_documented_keys_are_the_emitted_ones():
    found: dict[str, list[Reading]] = {match["key"]: [] for match in documented(Watch)}
    lines = {match["key"]: match for match in documented(Watch)}
    watch = Watch()
    looks = [scores(induction=[(1, 0, s, s)]) for s in (0.0, 0.9)]
    for reading in [r for readings in looks for r in watch.look(readings)]:
        (key,) = [
            key
            for key in found
            if re.fullmatch(
                re.sub(r"<(layer|head)>", r"\\d+", key.replace("<role>", R)), reading.key
            )
        ]
        found[key].append(reading)
        assert list(reading.axes) == [a for a in lines[key]["axes"].split(", ") if a]
        assert reading.unit == lines[key]["unit"]
        low, high = (float(end) for end in lines[key]["range"].split(".."))
        assert (low <= reading.values).all() and (reading.values <= high).all()
    assert all(found.values())


def test_only_named_heads():
    watch = Watch(heads=[(1, 2)])
    sentences(watch, scores())
    both = scores(induction=[(1, 1, 0.9, 0.9), (1, 2, 0.9, 0.9)])
    (said,) = sentences(watch, both)
    assert "L1H2" in said and "L1H1" not in said


def test_a_head_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no head \(2, 0\).*3 heads in each of the layers 0, 1"):
        watch = Watch(heads=[(2, 0)])
        watch.look(scores())


def test_pinned_heads_have_curves():
    """The first observation's best, for the whole run, whatever becomes of them."""
    watch = Watch()
    first = {r.key: float(r.values) for r in watch.look(scores(induction=[(1, 2, 0.7, 0.9)]))}
    assert first["watch/induction_L1H2"] == pytest.approx(0.7)
    then = {r.key: r for r in watch.look(scores(induction=[(0, 0, 0.95, 0.95)]))}
    assert then["watch/induction_L1H2"].values == pytest.approx(0.02)
    assert "watch/induction_L0H0" not in then


def test_layers_of_a_hybrid_model_have_their_own_numbers():
    watch = Watch()
    sentences(watch, scores(layers=["3", "7"]))
    (said,) = sentences(watch, scores(induction=[(1, 2, 0.5, 0.6)], layers=["3", "7"]))
    assert "L7H2" in said


def test_entropy_collapse():
    watch = Watch()
    assert sentences(watch, scores(entropy=0.6)) == []
    assert sentences(watch, scores(entropy=0.2)) == []
    (said,) = sentences(watch, scores(entropy=0.05))
    assert said.startswith("attention entropy of layer 1 collapsed: 0.60 at first, now 0.05")
    assert sentences(watch, scores(entropy=0.04)) == []


def test_entropy_that_stays_low_is_told_once():
    """With no cooldown that would keep it back."""
    watch = Watch(cooldown=0)
    raised = [bool(sentences(watch, scores(entropy=e))) for e in (0.6, 0.05, 0.04, 0.5, 0.05)]
    assert raised == [False, True, False, False, True]


def test_a_layer_s_entropy_is_the_mean_of_its_heads():
    """One head whose attention is on one token is no collapse of its layer."""
    watch = Watch()
    sentences(watch, scores(entropy=0.6))
    assert sentences(watch, scores(entropy=[0.0, 0.6, 0.6])) == []
    (said,) = sentences(watch, scores(entropy=[0.0, 0.0, 0.15]))
    assert "0.60 at first, now 0.05" in said


def frequency(names, values) -> list[Reading]:
    return as_read(
        Reading(
            key="sparse_features/frequency",
            values=np.array(values),
            axes=("feature",),
            unit="fraction",
            labels={"feature": names},
        )
    )


def test_a_feature_begins_to_fire_and_another_falls_silent():
    watch = Watch()
    assert sentences(watch, frequency(["7", "90"], [0.4, 0.0])) == []
    assert sentences(watch, frequency(["7", "90"], [0.05, 0.05])) == []
    assert sentences(watch, frequency(["7", "90"], [0.0, 0.2])) == [
        "sparse_features: new feature: 90 (0.00 -> 0.20)",
        "sparse_features: silent feature: 7 (0.40 -> 0.00)",
    ]


def test_other_features_are_no_change_of_these():
    """What is shown may be chosen anew; then nobody has begun or stopped."""
    watch = Watch()
    sentences(watch, frequency(["7", "90"], [0.4, 0.0]))
    assert sentences(watch, frequency(["8", "91"], [0.0, 0.4])) == []


def test_features_that_are_chosen_anew_leave_nothing_behind():
    watch = Watch()
    for i in range(5):
        sentences(watch, frequency([str(i), str(i + 1)], [0.4, 0.0]))
        sentences(watch, frequency([str(i), str(i + 1)], [0.0, 0.4]))
    assert len([key for key in watch.baseline if "features" in key]) == 5


def test_a_changed_frozen_weight():
    watch = Watch()
    assert sentences(watch, [number("frozen_weights/written", 0)]) == []
    (said,) = sentences(watch, [number("frozen_weights/written", 2)])
    assert said.startswith("2 frozen weights")
    assert sentences(watch, [number("frozen_weights/changed", 2)]) == [], "rounding counts here too"


def test_memory_goes_on_where_another_watch_stopped():
    """What a resumed run does: the same settings, the memory of the first part."""
    first, second = Watch(), Watch()
    sentences(first, scores(entropy=0.6))
    sentences(first, scores(induction=[(1, 2, 0.5, 0.6)], entropy=0.6))
    second.baseline.update(first.baseline)
    assert sentences(second, scores(induction=[(1, 2, 0.5, 0.6)], entropy=0.6)) == []
    assert len(sentences(second, scores(induction=[(1, 2, 0.01, 0.6)], entropy=0.01))) == 2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Watch(takes=0.1, loses=0.2), "at most takes"),
        (lambda: Watch(collapse=1), "below 1, got 1"),
        (lambda: Watch(cooldown=-1), "0 or more"),
        (lambda: Watch(fires=0), "fires must be a share"),
        (lambda: Watch(["head_scores/sink"]), "Rule objects"),  # type: ignore[list-item]
        (lambda: Rule("a/b"), "has no condition"),
        (lambda: Rule("a/b", jump=0), "more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_previous_token_head_is_announced_no_later_than_the_induction_head_behind_it():
    """Scores of a training: it stays less sharp, at 0.2 to 0.3 when the others are at 0.4."""
    watch = Watch()
    assert sentences(watch, scores(previous=[(0, 0, 0.1, 0.1)])) == []
    said = sentences(watch, scores(previous=[(0, 0, 0.28, 0.3)], induction=[(1, 2, 0.4, 0.4)]))
    assert sorted(said) == [
        "new induction head, seen in its attention pattern: L1H2 (0.02 -> 0.40)",
        "new previous head, seen in its attention pattern: L0H0 (0.10 -> 0.28)",
    ]
    uniform = sentences(Watch(), scores(previous=[(0, 0, 0.17, 0.17)]))
    assert uniform == [], "what uniform attention has on a short row"
