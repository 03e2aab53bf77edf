"""Measures the cost of each instrument: time, bytes that leave the device, forward passes.

    python scripts/measure_instruments.py
    python scripts/measure_instruments.py --device cuda --dtype bfloat16

The shapes of SmolLM2-135M with random weights, LoRA with r=16 on all linear layers, four texts
of 48 tokens and the built-in repeated blocks. An instrument's time is that of its `taps`, its
reductions and its `read`, taken while it alone shares the forward pass; on a GPU the device is
waited for around each of them. Forwards of its own are counted in layers that run, of the whole
batch of probes: 1.00 is what the shared forward pass takes. At the end all fast instruments
together are compared with the bare Hugging Face forward pass of the same tokens, taking turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
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
from tlens_callback.shadow.taps import as_tuple


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
    """Times an instrument, and counts the bytes that it takes and the forward passes it runs."""

    def __init__(self, instrument: Instrument, shadow: Shadow, batch: ProbeBatch) -> None:
        self.instrument, self.name = instrument, instrument.name
        self.seconds, self.taken, self.layers = 0.0, 0, 0.0
        self.whole = shadow.n_layers * batch.tokens.numel()
        self.device = shadow.device

    @contextmanager
    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> dict[str, Callable]:
        with self.clock(), self.counted(shadow):
            taps = self.instrument.taps(shadow, batch)

        def timed(reduce: Callable) -> Callable:
            def take(value: Any) -> Any:
                with self.clock():
                    result = reduce(value)
                self.taken += sum(t.numel() * t.element_size() for t in as_tuple(result))
                return result

            return take

        return {name: timed(reduce) for name, reduce in taps.items()}

    def read(self, taken: Any, shadow: Shadow, batch: ProbeBatch) -> list[Any]:
        with self.clock(), self.counted(shadow):
            return list(self.instrument.read(taken, shadow, batch))

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
    print("| instrument | ms | KiB | forwards |\n| --- | --- | --- | --- |")
    for instrument in fast():
        show(instrument, shadow, batch, args.rounds)
    print("| | | | |")
    for instrument in slow(vocabulary):
        show(instrument, shadow, batch, 1)
    together(model, shadow, batch, args.rounds)


def show(instrument: Instrument, shadow: Shadow, batch: ProbeBatch, rounds: int) -> None:
    times: list[float] = []
    meter = Meter(instrument, shadow, batch)
    for turn in range(rounds + (rounds > 1)):
        meter = Meter(instrument, shadow, batch)
        observe(shadow, batch, [meter])
        if turn or rounds == 1:  # the first turn warms up
            times.append(meter.seconds)
    ms = 1e3 * statistics.median(times)
    print(f"| {type(instrument).__name__} | {ms:,.1f} | {meter.taken / 1024:,.1f} "
          f"| {meter.layers:.2f} |", flush=True)  # fmt: skip


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


if __name__ == "__main__":
    main()
