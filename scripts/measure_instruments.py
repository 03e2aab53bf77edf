"""Measures the cost of each instrument: time, what the machine could do it in, forward passes.

    python scripts/measure_instruments.py
    python scripts/measure_instruments.py --device cuda --dtype bfloat16

The shapes of SmolLM2-135M with random weights, LoRA with r=16 on all linear layers, four texts
of 48 tokens and the built-in repeated blocks. An instrument's time is that of its `taps`, of
gathering and reducing, of its share of the unembedding, and of its `read`, taken while it alone
shares the forward pass; on a GPU the device is waited for around each of them. Beside it are the
kernels of the same work, the bytes that it reads and writes, its floating point operations, and the
time that the machine needs for them at least, by a copy and a product that are timed first
(`scripts/counted.py`). Forwards of its own are counted in layers that run, of the whole batch of
probes: 1.00 is what the shared forward pass takes. At the end all fast instruments together are
compared with the bare Hugging Face forward pass of the same tokens, taking turns, and the kernels
of a layer are counted.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from counted import Counted, launches, machine
from measure_overhead import SHAPES, lora_model, take_turns
from transformers import LlamaForCausalLM

from tlens_callback import Instrument, Probe, ProbeBatch, Shadow, observe
from tlens_callback.instruments import (
    ActivationPatching,
    Composition,
    Contrast,
    CopyingScores,
    Generations,
    HeadAblation,
    TokenChange,
    fast,
)
from tlens_callback.probes.builtin import repeated_blocks
from tlens_callback.shadow import Stack, stacks, taps, unembed
from tlens_callback.shadow.stacks import Gathering, as_tuple


def texts(vocabulary: int, rows: int, tokens: int = 48) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (rows, tokens), generator=generator).tolist()


def slow(vocabulary: int) -> list[Instrument]:
    having, without = texts(vocabulary, 16, 24)[:8], texts(vocabulary, 16, 24)[8:]
    return [
        HeadAblation(),
        ActivationPatching(clean="text-0", corrupt="text-1"),
        Contrast(having=having, without=without),
        TokenChange(),
        Generations(),
        CopyingScores(),
        Composition(),
    ]


class Meter:
    """Times an instrument, and counts what it takes and the forward passes that it runs.

    Args:
        counts: counts what it runs instead of timing it.
    """

    def __init__(
        self, instrument: Instrument, shadow: Shadow, batch: ProbeBatch, counts: Counted | None
    ) -> None:
        self.instrument, self.name = instrument, instrument.name
        self.seconds, self.taken, self.layers = 0.0, 0, 0.0
        self.whole = shadow.n_layers * batch.tokens.numel()
        self.device, self.counts, self.inside = shadow.device, counts, False

    @contextmanager
    def clock(self):
        if self.inside:
            yield
            return
        self.inside = True
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with self.counts or nullcontext():
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        self.inside = False

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> dict[Any, Any]:
        with self.clock(), self.counted(shadow):
            taps = self.instrument.taps(shadow, batch)
        return {
            key: reduce if isinstance(key, Stack) else self._timed(reduce)
            for key, reduce in taps.items()
        }

    def read(self, taken: Any, shadow: Shadow, batch: ProbeBatch) -> list[Any]:
        self.taken = sum(
            t.numel() * t.element_size() for value in taken.values() for t in as_tuple(value)
        )
        with self.clock(), self.counted(shadow):
            return list(self.instrument.read(taken, shadow, batch))

    def observe(self, shadow: Shadow, batch: ProbeBatch) -> None:
        """Makes an observation with this instrument alone."""
        whole = (Gathering, "take"), (taps._Run, "unembed")
        for of, name in whole:
            method = getattr(of, name)
            setattr(of, name, self._timed(method))
        try:
            observe(shadow, batch, [self])
        finally:
            for of, name in whole:
                setattr(of, name, getattr(of, name).__wrapped__)

    def _timed(self, method: Callable) -> Callable:
        @functools.wraps(method)
        def act(*args: Any) -> Any:
            with self.clock():
                return method(*args)

        return act

    @contextmanager
    def counted(self, shadow: Shadow):
        """Counts the layers that run inside, in tokens."""

        def ran(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.layers += hidden.shape[0] * hidden.shape[1] / self.whole

        blocks: Any = shadow.bridge.blocks
        handles = [b.attn.register_forward_pre_hook(ran, with_kwargs=True) for b in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow", action="store_true", help="the slow instruments, too")
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    args = parser.parse_args()
    model = lora_model(args.shape, args.device, getattr(torch, args.dtype)).eval()
    vocabulary, context = (SHAPES[args.shape][k] for k in ("vocab_size", "max_position_embeddings"))
    probes = [
        Probe(f"text-{i}", ids, target=7 + i, foil=9)
        for i, ids in enumerate(texts(vocabulary, 4, min(48, context)))
    ]
    shadow = Shadow.of(model)
    batch = ProbeBatch.encode(
        probes + repeated_blocks(context), vocab_size=vocabulary, device=shadow.device
    )
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.shape}, "
          f"{batch.tokens.numel()} probe tokens, {torch.get_num_threads()} threads, "
          f"median of {args.rounds}, of 1 below the line\n")  # fmt: skip
    speed = machine(shadow.device, shadow.dtype)
    print(f"a copy moves {speed[0] / 1e9:,.1f} GB/s, a product computes "
          f"{speed[1] / 1e9:,.0f} GFLOP/s\n")  # fmt: skip
    print("| instrument | ms | at least | kernels | MB | GFLOP | KiB that leave | forwards |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for instrument in fast():
        show(instrument, shadow, batch, args.rounds, speed)
    print("| | | | | | | | |")
    for instrument in slow(vocabulary) if args.slow else []:
        show(instrument, shadow, batch, 1, speed)
    together(model, shadow, batch, args.rounds)


def show(
    instrument: Instrument,
    shadow: Shadow,
    batch: ProbeBatch,
    rounds: int,
    speed: tuple[float, float],
) -> None:
    times: list[float] = []
    for turn in range(rounds + (rounds > 1)):
        meter = Meter(instrument, shadow, batch, None)
        meter.observe(shadow, batch)
        if turn or rounds == 1:  # the first turn warms up
            times.append(meter.seconds)
    ms, counts = 1e3 * statistics.median(times), Counted()
    meter = Meter(instrument, shadow, batch, counts)
    meter.observe(shadow, batch)
    least = 1e3 * max(counts.bytes / speed[0], counts.flops / speed[1])
    print(f"| {type(instrument).__name__} | {ms:,.1f} | {least:,.1f} | {counts.kernels:,} "
          f"| {counts.bytes / 1e6:,.1f} | {counts.flops / 1e9:,.2f} "
          f"| {meter.taken / 1024:,.1f} | {meter.layers:.2f} |", flush=True)  # fmt: skip


def together(model: Any, shadow: Shadow, batch: ProbeBatch, rounds: int) -> None:
    plain = LlamaForCausalLM(model.get_base_model().config).to(shadow.device, shadow.dtype).eval()
    instruments, mask = fast(), batch.mask.long()

    def bare() -> None:
        with torch.no_grad():
            plain(batch.tokens, attention_mask=mask, use_cache=False)

    work: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "shadow": lambda: shadow.run(batch, [{"logits": lambda t: t[:1, :1]}]),
        "fast": lambda: observe(shadow, batch, instruments),
    }
    found = take_turns(work, rounds, shadow.device.type)
    ms = {name: 1e3 * seconds for name, seconds in found.items()}
    print(f"\nall fast instruments in one observation {ms['fast']:,.1f} ms, bare Hugging Face "
          f"forward {ms['bare']:,.1f} ms, shadow's forward {ms['shadow']:,.1f} ms: "
          f"{ms['fast'] / ms['bare']:.2f} times the bare forward")  # fmt: skip
    # As many layers together as on a GPU; on a CPU fewer are, for its caches.
    stacks._ON_CPU, unembed.IN_CACHE = stacks._ELSEWHERE, unembed.CHUNK
    kernels = {name: launches(act, shadow.device) / shadow.n_layers for name, act in work.items()}
    every_pass = [one for one in instruments if one.taps(shadow, batch)]
    run = [one.taps(shadow, batch) for one in every_pass]
    inside = launches(lambda: shadow.run(batch, run), shadow.device) / shadow.n_layers
    print(f"kernels a layer: bare {kernels['bare']:.1f}, shadow {kernels['shadow']:.1f}, with all "
          f"that share the pass {inside:.1f}: {inside / kernels['bare']:.2f} times the bare "
          f"forward")  # fmt: skip


if __name__ == "__main__":
    main()
