"""`Settings`: what a file of probes adds, and names. The rest is seen through the callback."""

import logging
from pathlib import Path

import pytest

from tests.training import CAPITAL, Constant, trainer
from tlens_callback import MemorySink, Probe, TargetScores, TLensCallback, Watch

FILE = '- name: capital\n  text: the capital of France is\n  target: " Paris"\n  foil: " London"\n'


@pytest.mark.parametrize("kind", [str, Path])
def test_probes_from_a_file_are_those_of_the_list(tmp_path, kind):
    path = tmp_path / "probes.yaml"
    path.write_text(FILE)
    curves = []
    for probes in (kind(path), [CAPITAL]):
        memory = MemorySink()
        callback = TLensCallback(probes, instruments=[TargetScores()], sinks=[memory])
        path.unlink(missing_ok=True)  # read at construction
        trainer(tmp_path / "run", callback).train()
        curves.append(memory.curve("target_scores/logit_diff/capital"))
    for one, other in zip(*curves, strict=True):
        assert list(one) == list(other) and len(one) == 2


def test_a_broken_file_raises_at_construction(tmp_path):
    path = tmp_path / "probes.yaml"
    path.write_text("- text: a\n- text: 5\n")
    with pytest.raises(ValueError, match=r"probes\.yaml, entry 2 \(line 2\): text must be a"):
        TLensCallback(str(path), sinks=[])


@pytest.mark.parametrize(
    "given, says",
    [
        ("none.yaml", r"There is no file of probes none\.yaml: looked for from"),
        (Path("The capital"), "There is no file of probes The capital"),
        (
            "The capital of France is",
            r"list of Probe objects or the path of a file of probes \(.*no file 'The capital.*"
            r"probes=\[Probe\('name', 'The capital of France is'\)\]",
        ),
        ("A text. It ends", "If it is the text of a probe"),
        ("", "If it is the text of a probe"),
        (b"probes.yaml", "probes must be a list, .*got bytes|Probe objects, got int"),
        (Probe("p", "x"), "probes must be a list, .*got Probe"),
    ],
)
def test_what_is_neither_a_list_nor_a_file_is_named(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        TLensCallback(given, sinks=[])


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "probes.txt").write_text("The capital of France is\n")
    with pytest.raises(ValueError, match="Rename the file"):
        TLensCallback(str(tmp_path / "probes.txt"), sinks=[])


@pytest.mark.parametrize("name", ["a/b", "", "/"])
def test_a_name_that_splits_keys_is_refused(name):
    """What it remembers would be taken for another's when a run is resumed."""
    for settings in ({"instruments": [Constant(name)]}, {"watch": Watch(name=name)}):
        with pytest.raises(ValueError, match=f"first segment of its keys.*got '{name}'"):
            TLensCallback([Probe("p", "x")], sinks=[], **settings)


@pytest.mark.parametrize("count", [256, 257])
def test_a_test_set_for_probes_is_worth_a_word(caplog, count):
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        TLensCallback([Probe(f"p{i}", "x") for i in range(count)], sinks=[])
    assert ("257 probes are a lot" in caplog.text) == (count == 257)
