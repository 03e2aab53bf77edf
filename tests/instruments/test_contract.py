"""What every exported instrument promises, on every family: found by its export, nothing listed."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest

from tests import tiny
from tests.instruments.common import LONG_ANSWER, PROBES, TEXTS, encoded
from tests.instruments.common import adapted as shadow
from tests.instruments.settings import SETTINGS
from tlens_callback import (
    Description,
    Instrument,
    Meaning,
    Needs,
    Reading,
    instruments,
    observe,
)
from tlens_callback.meaning import described
from tlens_callback.shadow import Stack, Unembedded, stacks

EXPORTED = [
    exported
    for exported in (getattr(instruments, name) for name in instruments.__all__)
    if inspect.isclass(exported)
]
DOCUMENTED = re.compile(
    r"^(?P<key>\w+/\S+): \[(?P<axes>[\w, ]*)\], (?P<unit>[\w ]+), (?P<range>[^;]+)(;.*)?$"
)


def variants(exported: type) -> list[Instrument]:
    return [exported(**kwargs) for kwargs in SETTINGS.get(exported.__name__, [{}])]


def first(exported: type, **more) -> Instrument:
    """With the first of its settings."""
    return exported(**SETTINGS.get(exported.__name__, [{}])[0], **more)


def section(exported: type, title: str) -> str:
    """The text of one section of the class's docstring."""
    found = re.search(rf"^{title}:\n(.*?)(?=^\S|\Z)", inspect.getdoc(exported) or "", re.M | re.S)
    assert found, f"{exported.__name__} documents no {title}"
    return inspect.cleandoc(found[1])


def documented(exported: type) -> list[re.Match]:
    lines = []
    for line in section(exported, "Keys").splitlines():
        if line.startswith(" "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    matches = [DOCUMENTED.match(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return matches  # type: ignore[return-value]


def pattern_of(key: str, exported: type) -> re.Pattern:
    """A documented key as a pattern; `<measure>` is any that has a line of its own."""
    own = [m["key"].partition("/")[2] for m in documented(exported) if "<" not in m["key"]]
    probes = "|".join(re.escape(probe.name) for probe in PROBES)
    expression = re.escape(key)
    expression = expression.replace("<measure>", f"({'|'.join(own)})")
    return re.compile(expression.replace("<probe>", f"({probes})"))


def every_reading(exported: type) -> list[Reading]:
    """Over dense models, experts and a mixture, in all variants."""
    shadows = [shadow("llama"), shadow("mixtral"), shadow("qwen3_moe", mixed=True)]
    batch = encoded([*PROBES[:-1], dataclasses.replace(LONG_ANSWER, name=PROBES[-1].name)])
    batch = dataclasses.replace(
        batch, training=lambda n: [[1, *range(20, 30 + i)] for i in range(n)]
    )
    return [
        reading
        for of in shadows
        for instrument in variants(exported)
        for reading in observe(of, batch, [instrument])
    ]


def test_the_exports_are_found():
    names = {exported.__name__ for exported in EXPORTED}
    assert {"AttentionPatterns", "HeadScores", "TopNeurons", "TargetScores"} <= names
    assert {type(instrument) for instrument in instruments.fast()} <= set(EXPORTED)


@pytest.mark.parametrize("exported", EXPORTED)
def test_is_a_frozen_dataclass_with_a_name(exported):
    instrument = first(exported)
    assert isinstance(instrument, Instrument)
    with pytest.raises(dataclasses.FrozenInstanceError):
        instrument.name = "other"  # type: ignore[misc]
    assert first(exported) == first(exported)
    assert re.fullmatch(r"[a-z_]+", instrument.name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_runs_on_every_family(family):
    """All in one forward pass: finite numbers under unique keys, with labels, within limits."""
    of, batch = shadow(family), encoded()
    made = [instrument for exported in EXPORTED for instrument in variants(exported)[:1]]
    got = observe(of, batch, made)
    assert {reading.instrument for reading in got} == {instrument.name for instrument in made}
    for reading in got:
        # A list of tokens may end before its place does.
        ended = False if reading.texts is None else reading.texts == ""
        assert (np.isfinite(reading.values) | ended).all(), reading.key
        if reading.limits is not None:
            low, high = reading.limits
            assert reading.values.min() >= low, reading.key
            assert reading.values.max() <= high, reading.key
        if reading.probe is not None:
            row = [probe.name for probe in batch.probes].index(reading.probe)
            for axis in {"query", "key", "pos"} & set(reading.axes):
                assert reading.labels[axis] == batch.labels[row], reading.key
        if "layer" in reading.axes and "layer" not in reading.labels:
            assert reading.values.shape[reading.axes.index("layer")] == of.n_layers, reading.key


@pytest.mark.parametrize("exported", EXPORTED)
def test_documented_keys_are_the_emitted_ones(exported):
    """Both ways: each emitted key has a line with its axes and unit, each line an emitted key."""
    lines, used = documented(exported), set()
    for reading in every_reading(exported):
        at = [m for m in lines if pattern_of(m["key"], exported).fullmatch(reading.key)]
        assert len(at) == 1, (reading.key, [m["key"] for m in at])
        used.add(at[0]["key"])
        axes = tuple(axis.strip() for axis in at[0]["axes"].split(",") if axis.strip())
        assert reading.axes == axes, reading.key
        if at[0]["unit"] != "unit of the measure":
            assert reading.unit == at[0]["unit"], reading.key
        if at[0]["range"] in ("0..1", "-1..1"):
            low, high = map(float, at[0]["range"].split(".."))
            # Composition's scores are far from what they could be: their colours follow the values.
            wide = (low, high), (-1.0, 1.0), None if reading.unit == "score" else (low, high)
            assert reading.limits in wide, reading.key
            assert not (reading.values < low).any(), reading.key
            assert not (reading.values > high).any(), reading.key
    assert used == {m["key"] for m in lines}


def test_a_key_without_documentation_is_found():
    """The check above can fail."""

    class Drifted(instruments.TargetScores):
        """Renamed a key and forgot the line.

        Keys:
            target_scores/chance/<probe>: [], probability, 0..1
        """

    with pytest.raises(AssertionError, match="target_scores/probability"):
        test_documented_keys_are_the_emitted_ones(Drifted)


@pytest.mark.parametrize("exported", EXPORTED)
def test_says_what_it_reads_costs_and_comes_from(exported):
    for title in ("Reads", "Cost", "Source"):
        assert section(exported, title)


@pytest.mark.parametrize("exported", EXPORTED)
def test_reads_the_hooks_it_documents(exported):
    text = " ".join(section(exported, "Reads").split())
    for family, mixed in (("llama", False), ("gemma2", False), ("qwen3_moe", True)):
        for key, reduce in first(exported).taps(shadow(family, mixed=mixed), encoded()).items():
            for name in key.hooks if isinstance(key, Stack) else [key]:
                assert re.sub(r"blocks\.\d+\.", "blocks.{layer}.", name) in text, name
            assert not isinstance(reduce, Unembedded) or "unembedded" in text


@pytest.mark.parametrize("exported", EXPORTED)
def test_another_name_goes_into_every_key(exported):
    named = [first(exported), first(exported, name="other")]
    got = observe(shadow("llama"), encoded(), named)
    for one, other in zip(got[: len(got) // 2], got[len(got) // 2 :], strict=True):
        assert other.key == one.key.replace(named[0].name, "other", 1)
        np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize("exported", EXPORTED)
def test_two_looks_are_equal(exported):
    """No random numbers, no hidden state: the same weights give the same readings."""
    looks = [observe(shadow("gpt2"), encoded(), [first(exported)]) for _ in range(2)]
    for one, other in zip(*looks, strict=True):
        assert one.key == other.key
        np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize("exported", EXPORTED)
def test_one_batch_serves_several_models(exported):
    """What is kept with the batch depends on nothing else."""
    batch = encoded()
    for family, mixed in (("llama", False), ("qwen3_moe", True), ("llama", False)):
        of = shadow(family, mixed=mixed)
        again = observe(of, batch, [first(exported)])
        for one, other in zip(again, observe(of, encoded(), [first(exported)]), strict=True):
            assert one.key == other.key
            np.testing.assert_array_equal(one.values, other.values, err_msg=one.key)


@pytest.mark.parametrize("exported", EXPORTED)
def test_groups_of_layers_give_what_single_layers_give(exported, monkeypatch):
    """On a GPU more layers are reduced together than on a CPU."""
    looks = []
    for limit in (0, 2**28):
        monkeypatch.setattr(stacks, "_ON_CPU", limit)
        instrument = first(exported)
        for seed in (0, 1):  # the second is compared with the first
            of = shadow("qwen3_moe", seed=seed, mixed=True)
            looks.append(observe(of, encoded(), [instrument]))
    for alone, together in zip(looks[:2], looks[2:], strict=True):
        for one, other in zip(alone, together, strict=True):
            assert one.key == other.key
            np.testing.assert_allclose(
                other.values, one.values, atol=1e-6, rtol=1e-5, err_msg=one.key
            )


@pytest.mark.parametrize("exported", EXPORTED)
def test_one_text_is_enough_or_a_sentence_says_what_is_not(exported):
    batch = encoded(TEXTS[2:])
    try:
        got = observe(shadow("llama"), batch, [first(exported)])
    except ValueError as error:
        assert "probes" in str(error)
    else:
        assert all(np.isfinite(reading.values).all() for reading in got)


def test_bfloat16_weights():
    """Half precision goes through every instrument and comes out as float32."""
    import torch

    of = shadow("llama", dtype=torch.bfloat16)
    got = observe(of, encoded(), instruments.fast())
    wide = {r.key: r for r in observe(shadow("llama"), encoded(), instruments.fast())}
    assert of.dtype == torch.bfloat16
    for reading in got:
        assert reading.values.dtype == np.float32
        assert np.isfinite(reading.values).all()
        if reading.unit == "probability":
            assert np.abs(reading.values - wide[reading.key].values).max() < 0.1, reading.key


@pytest.mark.parametrize("exported", EXPORTED)
def test_describes_itself_and_each_of_its_measures(exported):
    """With the axes that the readings have; where a measure does not say that it is read only
    sometimes, it is read in the first of the settings."""
    said = described(first(exported))
    assert said.title and said.group and said.sentence.startswith(tuple("ACMRSTL"))
    readings = every_reading(exported)
    measures = {reading.measure for reading in readings}
    assert set(said.measures) == measures, measures ^ set(said.measures)
    for reading in readings:
        assert reading.description == said
        assert reading.meaning.title and reading.meaning.axes == reading.axes, reading.key
        if reading.meaning.alarm:
            assert not reading.axes
    usual = [r for of in (shadow("llama"),) for r in observe(of, encoded(), [first(exported)])]
    always = {name for name, meaning in said.measures.items() if not meaning.sometimes}
    assert always - {reading.measure for reading in usual} <= UNUSUAL.get(exported.__name__, set())


UNUSUAL = {
    "HeadAblation": {
        f"{of}{kind}"
        for of in ("loss", "logit_diff", "token_loss")
        for kind in ("_error", "_rank_correlation")
    }
    | {"token_loss"}
}
"""Headlines wherever they are read, that the first settings do not ask for."""


def test_a_description_that_is_none_is_refused():
    class Wrong:
        description = "heads"

    with pytest.raises(ValueError, match=r"Wrong\.description must be a"):
        described(Wrong())


@pytest.mark.parametrize("exported", EXPORTED)
def test_its_description_survives_a_file(exported):
    said = described(first(exported))
    assert Description.from_json(json.loads(json.dumps(said.as_json()))) == said
    newer = said.as_json() | {"mood": "good", "needs": ["BLOCKS", "LUCK"]}
    newer["measures"] = {"new": {"quantity": "nobody_knows", "more": 1, "axes": ["layer"]}}
    read = Description.from_json(newer)
    assert read.needs is Needs.BLOCKS and read.meaning("new") == Meaning(axes=("layer",))
