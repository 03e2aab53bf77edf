"""Measures weights that are held a layer at a time beside those that are all held, in one run.

    python scripts/measure_streamed.py
    python scripts/measure_streamed.py --device cuda --dtype bfloat16 --shapes qwen2.5-1.5b

For a plain base, and one in 4 bits (nf4, where bitsandbytes is installed), with LoRA of r=16 on all
linear layers and random weights: the time of an observation with every fast instrument, and of its
sync and forward pass alone; the memory that the shadow holds beyond the live model; on a GPU the
most that an observation takes beyond that; and the largest difference of a logit from the live
model. The rows of a base take turns, so that a busy machine slows all of them equally.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from measure_overhead import SHAPES, arguments, lora_model, take_turns
from torch import nn

from tlens_callback import ProbeBatch, Shadow, observe
from tlens_callback.instruments import fast
from tlens_callback.probes.builtin import repeated_blocks
from tlens_callback.shadow.fidelity import compare


def in_4_bits(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.detach()
    made = Linear4bit(
        layer.in_features, layer.out_features, bias=False, quant_type="nf4",
        compute_dtype=weight.dtype, compress_statistics=True,
    )  # fmt: skip
    made.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(weight.device)
    return made


def measure(shape: str, packs: bool, device: str, dtype: torch.dtype, rounds: int) -> None:
    model: Any = lora_model(shape, device, dtype, in_4_bits if packs else None).train()
    base = "nf4" if packs else str(dtype).removeprefix("torch.")
    shadows = {how: Shadow.of(model, weights=how) for how in ("resident", "streamed")}
    batch = ProbeBatch.encode(
        repeated_blocks(SHAPES[shape]["max_position_embeddings"]),
        vocab_size=SHAPES[shape]["vocab_size"],
        device=device,
    )
    peaks: dict[str, float] = {}
    work: dict[str, Callable[[], object]] = {}
    for how, shadow in shadows.items():
        instruments = fast()

        def look(shadow: Shadow = shadow, instruments: Any = instruments, how: str = how) -> None:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            shadow.sync()
            observe(shadow, batch, instruments)
            if device == "cuda":
                peaks[how] = (torch.cuda.max_memory_allocated() - held) / 2**20

        def forward(shadow: Shadow = shadow) -> None:
            shadow.sync()
            shadow.run(batch, [{"last_logits": lambda logits: logits}])

        work |= {how: look, f"{how}, forward": forward}
    found = take_turns(work, rounds, device)
    for how, shadow in shadows.items():
        row = [
            f"{base}, {how}",
            f"{1e3 * found[how]:,.1f} ms",
            f"{1e3 * found[f'{how}, forward']:,.1f} ms",
            f"{found[how] / found['resident']:.2f}",
            f"{shadow.extra_bytes / 2**20:,.1f} MiB",
            f"{peaks[how]:,.1f} MiB" if how in peaks else "",
            f"{compare(model, shadow, batch)[0].max_abs_diff:.1e}",
        ]
        print("|", " | ".join(row), "|")


def main() -> None:
    args = arguments(__doc__.splitlines()[0], ["smollm2-135m"], rounds=5)
    for shape in args.shapes:
        print(f"\n| {shape} | an observation | sync and forward pass | of resident | held | for a "
              f"while | largest difference |\n{'| --- ' * 7}|")  # fmt: skip
        for packs in (False, True) if find_spec("bitsandbytes") else (False,):
            measure(shape, packs, args.device, args.dtype, args.rounds)


if __name__ == "__main__":
    main()
