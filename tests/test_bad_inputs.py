"""Bad inputs of every kind: each is refused in a sentence, in bounded time and memory."""

import itertools
import json
import os
import random
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import get_args

import numpy as np
import pytest
from click.testing import CliRunner

from tests import tiny
from tests.cli.saved import save_adapter, save_base
from tests.instruments.settings import SETTINGS
from tests.sae.layouts import extra, saelens, sparsify, weights
from tests.sinks.test_local import fill
from tlens_callback import LocalSink, Probe, ProbeBatch, Rule, TLensCallback, Watch, instruments
from tlens_callback.checkpoints import Checkpoint
from tlens_callback.cli import main
from tlens_callback.cli.options import parse_instrument
from tlens_callback.probes.file import read_probes
from tlens_callback.sae.files import load_sae

NONE_OF_THEM = [2.5, float("nan"), float("inf"), True, "3", [1], {}, 10**12, 1j, np.zeros(2)]
JSON = [None, True, 7, -1, 2.5, 1e999, "text", "", [], [1], {}, {"a": 1}, "9" * 500]


@contextmanager
def refused(within=10.0, mib=100):
    """A ValueError of one or more sentences, soon, and without much memory."""
    began = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as raised:
            yield
        assert tracemalloc.get_traced_memory()[1] < mib * 2**20
    finally:
        tracemalloc.stop()
    text = str(raised.value)
    assert 15 < len(text) < 2000 and text.rstrip()[-1] in ".?!)'", text
    assert time.perf_counter() - began < within


# --- numbers ---


def with_numbers():
    for name in instruments.__all__:
        kind = getattr(instruments, name)
        if isinstance(kind, type) and is_dataclass(kind) and "__post_init__" in vars(kind):
            for field in fields(kind):
                if field.init and int in (get_args(field.type) or (field.type,)):
                    yield kind, field.name


@pytest.mark.parametrize("kind, name", [*with_numbers()], ids=lambda x: getattr(x, "__name__", x))
def test_a_number_of_an_instrument_that_is_no_whole_number_is_refused(kind, name):
    given = SETTINGS.get(kind.__name__, [{}])[0]
    assert kind(**{**given, name: np.int64(3)}) is not None, "the control: a whole number passes"
    # A sequence is a choice of tokens there.
    for value in NONE_OF_THEM:
        if not (kind.__name__ == "CopyingScores" and isinstance(value, list | str | dict)):
            with refused():
                kind(**{**given, name: value})


@pytest.mark.parametrize("name", ["block", "times", "seed"])
@pytest.mark.parametrize("value", [*NONE_OF_THEM, 2**60, -(10**20)], ids=repr)
def test_a_repeated_block_of_no_whole_number_is_refused(name, value):
    given = {"block": 4, "times": 2, "seed": 0}
    if name == "seed" and isinstance(value, int) and value == 10**12:
        return  # a seed may be large
    with refused():
        Probe.repeated("repeat", **{**given, name: value})
    assert Probe.repeated("repeat", **given, **{}).block == 4


@pytest.mark.parametrize("value", [float("nan"), "1", [], True], ids=repr)
def test_thresholds_that_are_no_numbers_are_refused(value):
    for name in ("takes", "loses", "moves", "collapse", "fires", "cooldown", "pinned"):
        with refused():
            Watch(**{name: value})
    for name in ("above", "below", "jump"):
        with refused():
            Rule("a/b", **{name: value})
    assert Watch(moves=0.5, takes=float("inf")) and Rule("a/b", above=1)


# --- probes ---


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    for old, new in itertools.pairwise("abcdefghij")
)
TEXTS = {
    "laughs.yaml": BOMB,
    "laughs in a list.yaml": "- &a [x, x]\n- [*a, *a]\n",
    "a merge.yaml": "- &a {text: x}\n- <<: *a\n",
    "deep.yaml": "[" * 20_000,
    "deep.json": "[" * 100_000,
    "deep.jsonl": '{"a":' * 100_000,
    "number.json": "9" * 100_000,
    "nan.json": "[NaN]",
    "dates.yaml": "- 2001-01-01\n",
    "python.yaml": "- !!python/object/apply:os.system ['true']\n",
    "keys.yaml": "- {[a, b]: c}\n",
    "binary.yaml": "- !!binary aGVsbG8=\n",
    "nul.yaml": "- a\0b\n",
    "block.yaml": "- block: 1000000000\n  times: 1000000000\n",
    "tokens.json": '[{"tokens": [1e999]}]',
    "twice.json": '[{"text": "a", "text": "b"}]',
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.slow
def test_a_file_of_probes_that_is_none_is_refused(tmp_path, name):
    (tmp_path / name).write_text(TEXTS[name])
    with refused():
        read_probes(tmp_path / name)


def test_a_file_of_probes_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "probes.yaml")
    with refused():
        read_probes(tmp_path / "probes.yaml")


def test_half_a_surrogate_pair_in_a_probe_is_refused_by_name():
    tokenizer = tiny.tokenizer()
    for probe in (
        lambda: Probe("a", "the \ud800 capital"),
        lambda: Probe("a", [{"role": "user", "content": "the \udc00 capital"}]),
        lambda: Probe("a", "the capital", target="\ud800"),
    ):
        with refused():
            ProbeBatch.encode([probe()], tokenizer, vocab_size=tiny.VOCAB)
    with refused():
        read_probes("probes\ud800.yaml")


@pytest.mark.slow
def test_ten_thousand_probes_are_encoded_in_seconds(tmp_path):
    tokenizer, n = tiny.tokenizer(), 10_000
    began = time.process_time()  # however busy the machine is
    lines = "\n".join(json.dumps({"text": "the capital of France is"}) for _ in range(n))
    (tmp_path / "probes.jsonl").write_text(lines)
    probes = read_probes(tmp_path / "probes.jsonl")
    assert len(ProbeBatch.encode(probes, tokenizer, vocab_size=tiny.VOCAB).probes) == n
    blocks = [Probe.repeated(f"b{i}", block=8, seed=i) for i in range(n // 10)]
    assert len(ProbeBatch.encode(blocks, vocab_size=150_000).probes) == n // 10
    assert time.process_time() - began < 60


# --- names and places ---


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-0", "x" * 300, "", "a/b", "..", None])
def test_a_name_that_is_no_directory_of_ours_is_refused(name):
    with refused():
        TLensCallback(name=name)


@pytest.mark.parametrize("path", ["", None, 5, b"", [], "a\0b"], ids=repr)
def test_a_local_sink_without_a_place_is_refused(path):
    with refused():
        LocalSink(path)


def test_a_local_sink_with_a_place_is_none_of_these(tmp_path):
    assert LocalSink(tmp_path / "checkpoint-3") and TLensCallback(name="checkpoint")


# --- the command line ---


EXPRESSIONS = [
    "LogitLens(" + "(" * 300 + "1" + ")" * 300 + ")",
    "LogitLens(k=" + "-" * 5_000 + "1)",
    "[" * 5_000,
    "LogitLens(" * 3_000,
    "LogitLens(k=" + "9" * 6_000 + ")",
    "LogitLens(k=10**10**10)",
    "LogitLens(**{'k': 3})",
    "LogitLens({[]: 1})",
    "LogitLens(k=2.5)",
    "LogitLens(k=1e999)",
    "LogitLens(k=3, k=4)",
    "__import__('os')",
    "LogitLens\0",
    "lambda: 1",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_an_instrument_that_is_no_call_is_refused(text):
    with refused():
        parse_instrument(text)


@pytest.mark.parametrize("size", ["inf", "nan", "-inf", "1e999", "0", "-1", "x"])
def test_a_page_of_no_size_is_refused(tmp_path, size):
    store = fill(tmp_path / "tlens", (0, 1), page=False).path
    done = CliRunner().invoke(main, ["report", str(store), f"--most-mb={size}"])
    assert done.exit_code == 2 and "Error: " in done.output and "Traceback" not in done.output
    done = CliRunner().invoke(main, ["report", str(store), "--most-mb=1e300"])
    assert done.exit_code == 0, "the control: any size that is one"


# --- saved models and autoencoders ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    base = save_base(path / "base")
    return save_adapter(base, path / "adapter")


@pytest.mark.parametrize(
    "name", ["base_model_name_or_path", "revision", "peft_type", "r", "target_modules"]
)
def test_the_config_of_an_adapter_of_odd_types_is_refused_or_loads(saved, name):
    config = saved / "adapter_config.json"
    told = config.read_text()
    try:
        for value in JSON:
            config.write_text(json.dumps({**json.loads(told), name: value}))
            refuses_or_passes(lambda: Checkpoint.of(saved))
    finally:
        config.write_text(told)
    assert Checkpoint.of(saved).adapter == str(saved)


def refuses_or_passes(act):
    """Either a ValueError in words, or a result; nothing else."""
    try:
        act()
    except ValueError as error:
        assert len(str(error)) > 15, error


@pytest.mark.parametrize("text", ["[]", "7", "{", "[" * 100_000, "null", "NaN", "\udcff"])
def test_files_of_a_saved_model_that_are_no_json_are_refused(saved, text):
    for name in ("adapter_config.json", "../base/config.json"):
        file = saved / name
        told = file.read_text()
        file.write_text(text, errors="surrogateescape")
        try:
            with refused():
                Checkpoint.of(saved)
        finally:
            file.write_text(told)


@pytest.mark.parametrize("value", JSON, ids=repr)
def test_a_trainer_s_state_of_odd_types_is_no_step(saved, value):
    file = saved / "trainer_state.json"
    file.write_text(json.dumps({"global_step": value, "log_history": value}))
    assert Checkpoint.of(saved).step in (None, 7)
    assert isinstance(Checkpoint.of(saved).logged, list)


SAE_SETTINGS = (
    "architecture activation_fn_str activation_fn_kwargs k d_in d_sae hook_name hook_layer "
    "normalize_activations apply_b_dec_to_input finetuning_scaling_factor metadata meta "
    "model_from_pretrained_kwargs hook_name_out hook_head_index"
).split()


@pytest.mark.parametrize("name", SAE_SETTINGS)
def test_the_config_of_an_autoencoder_of_odd_types_is_refused_or_loads(tmp_path, name):
    good = {"architecture": "standard", "hook_name": "blocks.0.hook_resid_pre"}
    assert load_sae(saelens(tmp_path / "good", good, weights())).n_features == 30
    for i, value in enumerate(JSON):
        path = saelens(tmp_path / f"a{i}", {**good, name: value}, weights())
        refuses_or_passes(lambda path=path: load_sae(path))
        jump = {"architecture": "jumprelu", name: value}
        path = saelens(tmp_path / f"b{i}", jump, weights(threshold=extra(1)))
        refuses_or_passes(lambda path=path: load_sae(path))


@pytest.mark.parametrize("name", ["k", "d_in", "activation", "signed", "num_latents", "other"])
def test_the_config_of_sparsify_of_odd_types_is_refused_or_loads(tmp_path, name):
    for i, value in enumerate(JSON):
        path = sparsify(tmp_path / f"layers.{i}", {"k": 4, name: value}, weights())
        refuses_or_passes(lambda path=path: load_sae(path))


@pytest.mark.parametrize("text", ["[]", "7", "null", "{", "[" * 100_000, "\udcff"])
def test_the_config_of_an_autoencoder_that_is_no_object_is_refused(tmp_path, text):
    path = saelens(tmp_path / "sae", {}, weights())
    (path / "cfg.json").write_text(text, errors="surrogateescape")
    with refused():
        load_sae(path)


@pytest.mark.parametrize("scale", [float("nan"), 0, -1, "2", float("inf")])
def test_a_scale_of_an_autoencoder_that_is_none_is_refused(tmp_path, scale):
    config = {"normalize_activations": "expected_average_only_in"}
    path = saelens(tmp_path / "sae", config, weights())
    assert load_sae(path, scale=2.0)
    with refused():
        load_sae(path, scale=scale)


def test_the_weights_of_an_autoencoder_that_are_cut_short_or_of_odd_shapes_are_refused(tmp_path):
    path = saelens(tmp_path / "sae", {}, weights())
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with refused():
        load_sae(path)
    for name, shape in itertools.product(weights(), [(), (3,), (3, 3), (1, 1, 1), (0,)]):
        given = {**weights(), name: np.zeros(shape)}
        refuses_or_passes(lambda given=given: load_sae(saelens(tmp_path / "odd", {}, given)))


# --- a small fuzz ---


@pytest.mark.parametrize("seed", range(3))
def test_small_changes_of_good_files_are_refused_or_read(tmp_path, saved, seed):
    """Letters of good files are exchanged, removed and repeated."""
    draw = random.Random(seed)
    good = "- name: a\n  text: the capital\n  target: Paris\n- block: 4\n  times: 2\n"
    config = json.dumps({"architecture": "topk", "k": 3, "hook_name": "blocks.0.hook_resid_pre"})
    adapter = (saved / "adapter_config.json").read_text()
    sae = saelens(tmp_path / "sae", {}, weights())
    try:
        for _ in range(150):
            (tmp_path / "probes.yaml").write_text(changed(good, draw))
            refuses_or_passes(lambda: read_probes(tmp_path / "probes.yaml"))
            (sae / "cfg.json").write_text(changed(config, draw))
            refuses_or_passes(lambda: load_sae(sae))
            (saved / "adapter_config.json").write_text(changed(adapter, draw))
            refuses_or_passes(lambda: Checkpoint.of(saved))
    finally:
        (saved / "adapter_config.json").write_text(adapter)


def changed(text, draw):
    letters = list(text)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(letters))
        letters[at] = draw.choice(["", letters[at] * 2, *'[]{}:,"&*!-0Nn\n\t\0'])
    return "".join(letters)
