"""One damaged step is left out, with a line; no file of a store is waited for or believed."""

import json
import logging
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save, save_file

from tests.page.decode import Page
from tests.sinks.samples import everything, pattern, same
from tests.sinks.test_local import fill
from tlens_callback.cli import main
from tlens_callback.offline.summary import summary
from tlens_callback.store import read_store
from tlens_callback.store.format import is_store

PATTERN = pattern().key
CURVE = "cost/seconds"


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "run", (0, 10, 20), page=False).path


def arrays(path):
    return path / "arrays/step-00000010.safetensors"


def scores(path):
    return path / "scores/step-00000010.parquet"


def rewritten(path, change):
    """The same arrays with other metadata; `change` gets the description of every reading."""
    from safetensors import safe_open

    with safe_open(arrays(path), "np") as file:
        told = file.metadata()
    about = json.loads(told["readings"])
    about = change(about, told) or about
    if isinstance(about, dict):
        told["readings"] = json.dumps(about)
    save_file(load_file(arrays(path)), arrays(path), {k: str(v) for k, v in told.items()})


def entry(**fields):
    return lambda about, told: about[PATTERN].update(fields)


def metadata(name, text):
    return lambda about, told: told.update({name: text}) or "as it is"


DAMAGES = {
    "no metadata": lambda path: arrays(path).write_bytes(save({"x": np.zeros(1)})),
    "no readings": lambda path: arrays(path).write_bytes(save({"x": np.zeros(1)}, {"a": "b"})),
    "no arrays": lambda path: arrays(path).unlink(),
    "an empty file": lambda path: arrays(path).write_bytes(b""),
    "a header beyond the file": lambda path: arrays(path).write_bytes(b"\xff" * 8 + b"{}"),
    "a folder": lambda path: (arrays(path).unlink(), arrays(path).mkdir()),
    "an empty table": lambda path: scores(path).write_bytes(b""),
    "a pipe of arrays": lambda path: (arrays(path).unlink(), os.mkfifo(arrays(path))),
    "a pipe of scores": lambda path: (scores(path).unlink(), os.mkfifo(scores(path))),
    "an odd type of number": lambda path: arrays(path).write_bytes(_bfloat16()),
    **{
        f"metadata {i}": lambda path, change=change: rewritten(path, change)
        for i, change in enumerate(
            [
                metadata("readings", "null"),
                metadata("readings", "[]"),
                metadata("readings", "{"),
                metadata("readings", "[" * 100_000),
                metadata("readings", '{"a/b": null}'),
                lambda about, told: {**about, "not/there": about[PATTERN]},
                lambda about, told: {**about, PATTERN: 7},
                entry(shape=[10**6] * 4),
                entry(shape=[10**30]),
                entry(shape=[1, 1, -3, -3]),
                entry(shape=["2", "3", "9", "9"]),
                entry(shape=None),
                entry(packing="zip"),
                entry(packing=None),
                entry(axes=["layer"]),
                entry(axes="abcd"),
                entry(axes=[1, 2, 3, 4]),
                entry(axes=["layer", "layer", "query", "key"]),
                entry(unit=None),
                entry(unit=""),
                entry(labels=[]),
                entry(labels={"layer": "no list"}),
                entry(labels={"layer": [None, 1]}),
                entry(labels={"nowhere": []}),
                entry(labels={"layer": []}),
                entry(limits=[1]),
                entry(limits=["0", "1"]),
                entry(limits=[1, 0]),
                entry(limits={"low": 0}),
                metadata(f"texts/{PATTERN}", "[]"),
                metadata(f"texts/{PATTERN}", "7"),
                metadata("instruments", "[]"),
                metadata("instruments", '{"a": null}'),
                metadata("instruments", '{"a": {"needs": 7, "measures": {}, "others": {}}}'),
                metadata(
                    "instruments",
                    '{"a": {"title": 7, "group": "", "kind": "", "sentence": "", "needs": [], '
                    '"measures": {}, "others": {}}}',
                ),
            ]
        )
    },
}


def _bfloat16():
    import torch
    from safetensors.torch import save as save_torch

    about = dict(axes=["a"], unit="1", labels={}, limits=None, shape=[2], packing=None)
    told = {"readings": json.dumps({"x/y": about}), "instruments": "{}"}
    return save_torch({"x/y": torch.zeros(2, dtype=torch.bfloat16)}, told)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_step_is_left_out_and_the_others_are_read(store, damage):
    assert read_store(store).steps == (0, 10, 20), "the control: before the damage it is there"
    began = time.perf_counter()
    damage(store)
    found = read_store(store)
    assert (found.steps, found.torn) == ((0, 20), (10,))
    assert PATTERN in found.keys and found.curve(CURVE)[0].tolist() == [0, 20]
    assert set(found.frame().step) == set(found.frame(PATTERN).step) == {0, 20}
    assert summary(found).startswith("2 observations, steps 0 to 20")
    assert set(Page(found.page().text).steps) == {0, 20}
    assert all(
        same(a, b, atol=2**-12) for a, b in zip(found.readings(20), everything(20), strict=True)
    )
    with pytest.raises(ValueError, match="no complete step 10"):
        found.readings(10)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("command", ["summary", "report"])
def test_the_commands_say_which_step_is_left_out(store, command):
    DAMAGES["no metadata"](store)
    done = CliRunner().invoke(main, [command, str(store)])
    assert done.exit_code == 3 and "steps 10" in done.output


def bad_table(path):
    content = bytearray(scores(path).read_bytes())
    content[4:-100] = b"\0" * (len(content) - 104)
    scores(path).write_bytes(content)


TABLES = {
    "zeros inside": bad_table,
    "another table": lambda path: pq.write_table(pa.table({"a": [1]}), scores(path)),
    "a column of another type": lambda path: pq.write_table(
        pa.table({"step": ["ten"], "key": ["a"], "value": ["b"]}), scores(path)
    ),
}


@pytest.mark.parametrize("damage", TABLES.values(), ids=TABLES.keys())
def test_a_damaged_table_leaves_the_frame_of_the_others_and_a_line(store, caplog, damage):
    damage(store)
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        frame = read_store(store).frame()
    assert set(frame.step) == {0, 20}
    assert "step 10" in caplog.text and "left out" in caplog.text


def test_a_run_goes_on_in_a_store_whose_first_table_is_damaged(store):
    (store / "scores/step-00000000.parquet").write_bytes(b"PAR1")
    fill(store, (20, 30))
    assert read_store(store).steps == (10, 20, 30)


MANIFESTS = [
    *("[]", "7", "null", '"tlens_callback"', "{}", "{", "[" * 100_000, "NaN", '["tlens_callback"]'),
    *(f'{{"tlens_callback": {one}}}' for one in ("true", "null", '"1"', "[1]", "1.5", "1e999")),
    *('{"tlens_callback": ' + "9" * 5000 + "}", '{"tlens_callback": 99}', "\0", " " * 3_000_000),
]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_manifest_of_odd_types_is_refused_in_a_sentence(store, text):
    (store / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"not a tlens_callback store|store format"):
        read_store(store)
    done = CliRunner().invoke(main, ["summary", str(store)])
    assert done.exit_code == 2 and done.output.startswith("Error: ")


def test_a_manifest_that_is_a_pipe_or_no_text_is_not_waited_for(store):
    (store / "manifest.json").write_bytes(b"\xff\xfe")
    assert not is_store(store)
    (store / "manifest.json").unlink()
    os.mkfifo(store / "manifest.json")
    assert not is_store(store)
