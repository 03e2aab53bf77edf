"""Measures what an observation costs, beside other ways to do the same, in one run.

    python scripts/measure_overhead.py
    python scripts/measure_overhead.py --device cuda --dtype bfloat16 --rounds 20

Six things are measured in turn, so that a busy machine slows all of them equally:

(a) a default observation of this callback, as training sees it: sync, forward pass, instruments,
    and the hand-over to the thread that writes; that thread then works while nothing is measured;
(a') the same observation, written before training goes on: into the local store with its page,
    and into an offline W&B run;
(b) the bare Hugging Face forward pass, eager attention, of the same probe tokens, on a model
    without adapters (and, below it, with the logits of the last tokens only, as the shadow has);
(c) a memory copy of the weights that the adapter changes;
(d) the same by hand: deep copy, `merge_and_unload`, bridge, `run_with_cache` of everything, one
    plotly figure for each head of each pictured probe;
(e) one forward pass of the live model itself that returns its attentions and hidden states, and
    nothing more: no hooks, no merged weights, no numbers about them.

The models have random weights: the shapes of SmolLM2-135M, and a tiny Llama. LoRA with r=16 on
all linear layers.
"""

import argparse
import copy
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tlens_callback import Instrument, LocalSink, Probe, Reading, Sink, WandbSink
from tlens_callback.instruments import fast
from tlens_callback.probes.builtin import repeated_blocks
from tlens_callback.run.observer import Observer
from tlens_callback.run.settings import Settings
from tlens_callback.run.writer import Writer
from tlens_callback.shadow import Shadow, bridge

SHAPES = {
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
}


def lora_model(
    shape: str,
    device: str,
    dtype: torch.dtype,
    linear: Callable[[nn.Linear], nn.Module] | None = None,
) -> PeftModel:
    """Random weights, the same at each call.

    Args:
        linear: makes another layer of each linear layer of the blocks.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], attn_implementation="eager"))
    model.to(device, dtype)
    for module in [*model.model.modules()] if linear else ():
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear):
                setattr(module, name, linear(layer))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return peft


def by_hand(model: PeftModel, tokens: torch.Tensor, pictured: list[int]) -> int:
    """(d); returns the number of figures."""
    import plotly.graph_objects as go

    merged = copy.deepcopy(model).merge_and_unload()
    merged.eval()
    hooked = bridge.build(merged, tokens.device)
    _, cache = hooked.run_with_cache(tokens)
    figures = 0
    for layer in range(merged.config.num_hidden_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].float().cpu().numpy()
        for probe in pictured:
            for head in range(pattern.shape[1]):
                go.Figure(go.Heatmap(z=pattern[probe, head])).to_json()
                figures += 1
    return figures


class Parts:
    """Seconds of what happens inside observations."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self.reads = self.last_read = 0.0

    def add(self, part: str, seconds: float) -> None:
        self.spent.setdefault(part, []).append(seconds)


class TimedInstrument:
    def __init__(self, instrument: Instrument, parts: Parts) -> None:
        self._instrument, self._parts = instrument, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instrument, name)

    def read(self, *args: Any) -> list[Reading]:
        began = time.perf_counter()
        readings = list(self._instrument.read(*args))
        self._parts.last_read = time.perf_counter()
        self._parts.reads += self._parts.last_read - began
        return readings


class TimedSink:
    def __init__(self, sink: Sink, parts: Parts) -> None:
        self._sink, self._parts = sink, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    def write(self, readings: Sequence[Reading], *, step: int) -> None:
        began = time.perf_counter()
        self._sink.write(readings, step=step)
        if threading.current_thread() is not threading.main_thread():
            self._parts.add(type(self._sink).__name__, time.perf_counter() - began)


def take_turns(
    work: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    seldom: Collection[str] = (),
    between: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each, all of them taking turns.

    Args:
        seldom: in a third of the rounds.
        between: what is done after each, and not measured.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, act in work.items():
            if name in seldom and turn > max(3, rounds // 3):
                continue
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            act()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - began)
            between()
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    shape: str, device: str, dtype: torch.dtype, rounds: int, out: Path
) -> dict[str, float]:
    model = lora_model(shape, device, dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[shape]["vocab_size"]
    texts = [
        Probe(
            f"text-{i}", torch.randint(3, vocabulary, (48,), generator=generator), target=7, foil=9
        )
        for i in range(2)
    ]
    context = SHAPES[shape]["max_position_embeddings"]
    parts, store = Parts(), LocalSink(out / shape)
    sinks = [TimedSink(sink, parts) for sink in (store, WandbSink(store=store))]
    instruments = [TimedInstrument(instrument, parts) for instrument in fast()]
    watcher = Observer(Settings(instruments=instruments, on_error="raise"), sinks)
    began = time.perf_counter()
    watcher.start(model, None, lambda shadow: texts + repeated_blocks(context), step=0)
    start_seconds = time.perf_counter() - began
    shadow, tokens = watcher.shadow, watcher.batch.tokens
    assert isinstance(shadow, Shadow)
    plain = LlamaForCausalLM(model.get_base_model().config).to(device, dtype).eval()
    adapted = [m.base_layer.weight for m in model.modules() if hasattr(m, "lora_A")]
    copies = [torch.empty_like(weight) for weight in adapted]
    shadow.run(watcher.batch, [])
    step = iter(range(1, 10**6))
    watcher._next_check = None  # fidelity is computed three times a run, not at every observation

    mask, last = watcher.batch.mask.long(), torch.unique(watcher.batch.last)

    def forward(**kwargs: Any) -> None:
        with torch.no_grad():
            plain(tokens, attention_mask=mask, use_cache=False, **kwargs)

    def live() -> None:
        with torch.no_grad():
            kept = dict(output_attentions=True, output_hidden_states=True)
            model(tokens, attention_mask=mask, use_cache=False, **kept)

    def memory_copy() -> None:
        with torch.no_grad():
            for own, weight in zip(copies, adapted, strict=True):
                own.copy_(weight)

    thread, inline = watcher.writer, Writer(sinks, writing="inline", on_error="raise")

    def observation() -> None:
        watcher.writer, parts.reads = thread, 0.0
        watcher.after_update(next(step), observe=True, last=False)
        parts.add("hand-over", time.perf_counter() - parts.last_read)
        parts.add("reads", parts.reads)

    def written_at_once() -> None:
        watcher.writer = inline
        watcher.after_update(next(step), observe=True, last=False)

    taps = [instrument.taps(shadow, watcher.batch) for instrument in watcher.instruments]
    work: dict[str, Callable[[], object]] = {
        "a": observation,
        "a'": written_at_once,
        "b": forward,
        "b, last logits": lambda: forward(logits_to_keep=last),
        "c": memory_copy,
        "d": lambda: by_hand(model, tokens, [0, 1, 2]),
        "e": live,
        "sync": shadow.sync,
        "shadow forward": lambda: shadow.run(watcher.batch, [{"last_logits": lambda t: t}]),
        "with reductions": lambda: shadow.run(watcher.batch, taps),
    }
    model.eval()
    found = take_turns(work, rounds, device, seldom={"d"}, between=thread.drain)
    for part, seconds in parts.spent.items():
        found[part] = statistics.median(seconds[1:])
        found[f"{part}, 90 %"] = statistics.quantiles(seconds[1:], n=10, method="inclusive")[-1]
    found["adapted bytes"] = sum(w.numel() * w.element_size() for w in adapted)
    found["extra bytes"] = shadow.extra_bytes
    found["start"] = start_seconds
    found["tokens"] = tokens.numel()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        shadow.sync()
        found["sync peak bytes"] = torch.cuda.max_memory_allocated() - held
    watcher.writer = thread
    watcher.close()
    inline.close()
    return found


def report(shape: str, found: dict[str, float]) -> None:
    a, inline, b, c, d, e = (found[name] for name in ("a", "a'", "b", "c", "d", "e"))
    ms = {name: f"{1e3 * found[name]:,.1f} ms" for name in found}
    rows = [
        ("(a) a default observation, as training sees it", ms["a"]),
        ("    of which sync", ms["sync"]),
        ("    of which forward pass, without and with reductions",
         f"{ms['shadow forward']}, {ms['with reductions']}"),
        ("    of which the reads of all instruments", ms["reads"]),
        ("    of which the hand-over: median, 90th percentile",
         f"{1e3 * found['hand-over']:.2f} ms, {1e3 * found['hand-over, 90 %']:.2f} ms"),
        ("    beside it, the thread that writes: store with page, W&B",
         f"{ms['LocalSink']}, {ms['WandbSink']}"),
        ("(a') the same observation, written before training goes on", ms["a'"]),
        ("(b) bare Hugging Face forward of the same tokens", ms["b"]),
        ("    with the logits of the last tokens only", ms["b, last logits"]),
        ("(c) memory copy of the adapted weights", ms["c"]),
        ("(d) by hand: deepcopy, merge, cache everything, a figure a head", ms["d"]),
        ("(e) a forward of the live model with attentions and hidden states", ms["e"]),
        ("once, when training begins: build, check, first observation", ms["start"]),
        ("that / (b)", f"{found['start'] / b:.1f}"),
        ("sync / (c)", f"{found['sync'] / c:.2f}"),
        ("(a) / ((b) + (c)), (a') / ((b) + (c))",
         f"{a / (b + c):.2f}, {inline / (b + c):.2f}"),
        ("(a) / (e)", f"{a / e:.2f}"),
        ("((d) - (b)) / ((a) - (b))", f"{(d - b) / (a - b):.1f}" if a > b else "(a) is below (b)"),
        ("extra memory / adapted weights",
         f"{found['extra bytes'] / found['adapted bytes']:.3f} "
         f"({found['extra bytes'] / 2**20:,.1f} MiB)"),
    ]  # fmt: skip
    if "sync peak bytes" in found:
        rows.append(("scratch during a sync", f"{found['sync peak bytes'] / 2**20:,.1f} MiB"))
    print(f"\n| {shape}, {found['tokens']:.0f} probe tokens | |\n| --- | --- |")
    for what, value in rows:
        print(f"| {what} | {value} |")


def arguments(description: str, shapes: list[str], rounds: int) -> argparse.Namespace:
    """Reads the command line, and prints what the figures below it were measured on."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=list(SHAPES))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, "
          f"{torch.get_num_threads()} threads, median of {args.rounds}")  # fmt: skip
    args.dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args = arguments(__doc__.splitlines()[0], ["smollm2-135m", "tiny"], rounds=7)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
        for shape in args.shapes:
            report(shape, measure(shape, args.device, args.dtype, args.rounds, Path(folder)))


if __name__ == "__main__":
    main()
