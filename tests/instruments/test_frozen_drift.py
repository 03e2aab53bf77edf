"""FrozenWeights says how far frozen weights have moved, and what that looks like."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.instruments.test_sparsity import look
from tlens_callback import FrozenWeights, Reading, Shadow, Watch
from tlens_callback.instruments.frozen import _distance, places
from tlens_callback.run import baselines

MERGED = "merged into them and taken out again many times, as TRL does for generation with vLLM"
WRITTEN = "have changed since the start: something writes to weights that should not be trained"
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7}


def adapted(dtype: torch.dtype = torch.float32, *, dora: bool = False, **settings: Any) -> Any:
    """Some of its weights have more entries than are kept; the adapter is as after training."""
    tied = settings.pop("tied", False)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = dict(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
        base: Any = tiny.model("llama", **shape)
        model = get_peft_model(base.to(dtype), LoraConfig(use_dora=dora, **config))
        for name, parameter in model.named_parameters():
            if "lora_" in name and "_B" in name:
                parameter.normal_(std=0.05)
    return model


@torch.no_grad()
def generate(model: Any, times: int) -> None:
    """What each generation with vLLM does to a model, and a little training after it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        model.merge_adapter()
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                step = torch.randn(parameter.shape, generator=generator)
                parameter += step.to(parameter.dtype) * 1e-3


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """Name in a plain model -> copy of the base weight."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): copy.deepcopy(p.data)
        for name, p in model.named_parameters()
        if "lora_" not in name
    }


def sampled(size: int) -> list[int]:
    """The entries that the docstring names, in Python's numbers."""
    if size <= 4096:
        return list(range(size))
    golden, found = 0x9E3779B97F4A7C15, []
    for i in range(4096):
        number = i * golden % 2**64
        found.append((number - 2**64 if number >= 2**63 else number) % size)
    return found


def naive(first: torch.Tensor, now: torch.Tensor, places: list[int]) -> tuple[float, bool]:
    """Largest change as a share of the root mean square, and whether all of it is rounding."""
    before, after = (x.double().flatten().tolist() for x in (first, now))
    size = math.sqrt(sum(before[i] ** 2 for i in places) / len(places))
    most = math.sqrt(EPS[first.dtype]) / 4
    rounded = all(abs(after[i] - before[i]) <= most * max(abs(before[i]), size) for i in places)
    return max(abs(after[i] - before[i]) for i in places) / size, rounded


def numbers(readings: dict[str, Reading]) -> dict[str, float]:
    wanted = ("changed", "drifted", "written", "largest_change")
    return {name: float(readings[f"frozen_weights/{name}"].values) for name in wanted}


class Watched:
    """A model with its instrument and what is said about it."""

    def __init__(self, model: Any) -> None:
        self.shadow, self.instrument, self.watch = Shadow.of(model), FrozenWeights(), Watch()
        self.said: list[str] = []
        assert self.look() == {"changed": 0, "drifted": 0, "written": 0, "largest_change": 0}

    def look(self) -> dict[str, float]:
        readings = look(self.instrument, self.shadow)
        for reading in self.watch.look(readings.values()):
            self.said += [] if reading.texts is None else reading.texts.tolist()
        return numbers(readings)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.slow
def test_merging_is_told_from_writing_and_rounding_from_drift(dtype, dora):
    """After 1, 13 and 50 generations: the figures are those of a loop over copies."""
    model = adapted(dtype, dora=dora)
    first, found, random = base_weights(model), {}, torch.get_rng_state()
    watched, done = Watched(model), 0
    for times in (1, 13, 50):
        generate(model, times - done)
        done, now = times, base_weights(model)
        got = found[times] = watched.look()
        loops = {n: naive(w, now[n], sampled(w.numel())) for n, w in first.items()}
        assert got["largest_change"] == pytest.approx(max(share for share, _ in loops.values()))
        assert got["changed"] == sum(not torch.equal(w, now[n]) for n, w in first.items())
        assert got["changed"] == 14, "all linear layers but the head"
        assert got["drifted"] == sum(not rounded for _, rounded in loops.values())
        assert got["written"] == 0
        whole = {n: naive(w, now[n], list(range(w.numel())))[0] for n, w in first.items()}
        for name, (share, _) in loops.items():
            if first[name].numel() <= 4096:
                assert share == whole[name]
        assert 0.5 * max(whole.values()) <= got["largest_change"] <= 1.05 * max(whole.values())
    assert torch.equal(random, torch.get_rng_state())
    assert found[1]["drifted"] == 0, "once is rounding, in half precision too"
    if dtype == torch.float32:
        assert found[50]["drifted"] == 0 and 0 < found[50]["largest_change"] < 1e-5
        assert watched.said == []
    else:
        assert found[50]["drifted"] > 0
        assert found[50]["largest_change"] > 2 * found[1]["largest_change"] > 0.01
        (said,) = watched.said
        assert MERGED in said and WRITTEN not in said
    assert any(w.numel() > 4096 for w in first.values()), "it is a sample"


def test_without_merging_nothing_moves():
    """The control: training moves the adapters alone."""
    model = adapted(torch.bfloat16)
    watched = Watched(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    assert set(watched.look().values()) == {0} and watched.said == []


@pytest.mark.parametrize("merges", [0, 13])
def test_a_weight_without_adapters_that_somebody_writes_to(merges):
    """Beside merges too: then not all of the changes can be from them."""
    model = adapted(torch.bfloat16)
    watched = Watched(model)
    generate(model, merges)
    model.get_parameter("base_model.model.model.norm.weight").data[3] += 0.5
    got = watched.look()
    assert got["written"] == got["changed"] == (15 if merges else 1) and got["drifted"] == 0
    assert got["largest_change"] == pytest.approx(0.5, rel=0.05), "gains are near 1"
    (said,) = watched.said
    assert said.startswith(f"{got['written']:.0f} frozen") and WRITTEN in said
    assert MERGED not in said


def test_one_of_many_weights_under_adapters_was_not_changed_by_merging():
    model = adapted()
    watched = Watched(model)
    place = "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"
    model.get_parameter(place).data[3, 7] += 1e-6
    got = watched.look()
    assert got["changed"] == got["written"] == 1
    assert WRITTEN in watched.said[0]


def test_adapters_that_stay_merged_are_no_rounding():
    model = adapted()
    watched = Watched(model)
    model.merge_adapter()
    got = watched.look()
    assert got["written"] == got["changed"] == 14 and got["largest_change"] > 0.1
    model.unmerge_adapter()
    got = watched.look()
    assert got["written"] == got["drifted"] == 0 and got["changed"] == 14


def test_a_change_that_the_sample_misses_is_counted():
    model = adapted()
    watched = Watched(model)
    weight = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    kept = places(weight)
    assert kept.tolist() == sampled(weight.numel()) and weight.is_contiguous()
    missed = next(i for i in range(weight.numel()) if i not in set(kept.tolist()))
    weight.data.view(-1)[missed] += 1
    assert watched.look() == {"changed": 1, "drifted": 0, "written": 1, "largest_change": 0}


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
def test_a_tied_weight_under_an_adapter_of_the_head():
    """The embedding is the same parameter, and has no adapter of its own."""
    model = adapted(torch.bfloat16, tied=True, target_modules=["lm_head"])
    watched = Watched(model)
    generate(model, 1)
    got = watched.look()
    assert got["changed"] == 1 and got["written"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_and_numbers_that_are_none(dtype):
    zeros, ones = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    assert _distance(zeros, zeros).tolist() == [0, 0]
    assert _distance(ones, zeros).tolist() == [1, 1]
    assert _distance(ones, ones).tolist() == [0, 0]
    broken = ones.clone()
    broken[2] = torch.nan
    share, beyond = _distance(broken, ones).tolist()
    assert math.isnan(share) and beyond == 1


def test_a_large_entry_is_rounded_by_more_than_a_small_one():
    """Its rounding is a large share of the root mean square, and rounding all the same."""
    first = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    first[5] = 1.0
    now = first.clone()
    now[5] += EPS[torch.bfloat16]
    share, beyond = _distance(now, first).tolist()
    assert share > 0.3 and not beyond
    now[6] += 0.01
    assert _distance(now, first).tolist()[1]


@pytest.fixture
def kept(tmp_path):
    """A model after 13 generations, its instrument's file, and what was read then."""
    model = adapted(torch.bfloat16)
    watched = Watched(model)
    generate(model, 13)
    got, path = watched.look(), tmp_path / "tlens.memory"
    baselines.write(path, {"frozen_weights": watched.instrument.baseline}, {"run": "a"})
    return model, path, got


def resumed(model: Any, path: Any) -> dict[str, float]:
    instrument = FrozenWeights()
    about, held = {"run": "a"}, {"frozen_weights": instrument.baseline}
    assert baselines.restore(path, held, about, torch.device("cpu")) == {"frozen_weights"}
    return numbers(look(instrument, Shadow.of(model)))


def test_a_resumed_run_measures_from_the_same_start(kept):
    model, path, got = kept
    assert resumed(model, path) == got and got["largest_change"] > 0
    held = load_file(path)
    sizes = {name: np.prod(entries.shape) for name, entries in held.items() if "entries" in name}
    assert max(sizes.values()) == 4096 and len(sizes) == len(held) / 2
    assert held["frozen_weights/entries of model.norm.weight"].dtype == torch.bfloat16


def test_a_checkpoint_from_before_entries_were_kept(kept):
    """It says what has changed; how far is measured from where it goes on."""
    model, path, got = kept
    with safe_open(path, "pt") as file:
        about = file.metadata()
    held = {name: tensor for name, tensor in load_file(path).items() if "entries" not in name}
    save_file(held, path, metadata=about)
    again = resumed(model, path)
    assert again == got | {"drifted": 0, "largest_change": 0} and again["changed"] == 14
