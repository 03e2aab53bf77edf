"""Measures what a look at rollouts costs, beside bare forward passes of the same tokens.

    python scripts/measure_rollouts.py
    python scripts/measure_rollouts.py --device cuda --dtype bfloat16 --shapes qwen2.5-1.5b

32 rollouts of 256 tokens, in 4 groups, on a model with random weights and LoRA of r=16 on all
linear layers: a whole look, with the base; its passes alone; the measures of each token alone; and
the Hugging Face forward pass of the same tokens on a model without adapters, in eager attention.
They take turns, so that a busy machine slows all of them equally. On a GPU also the most memory
that a look takes.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from measure_overhead import SHAPES, arguments, lora_model, take_turns

from tlens_callback import Probe, ProbeBatch, Shadow
from tlens_callback.instruments.parts.predictions import compare
from tlens_callback.rollouts import Look, Recorder, Rollouts
from tlens_callback.rollouts.inside import inside, last_residuals, parts
from tlens_callback.rollouts.rollout import rollouts_of

ROLLOUTS, TOKENS, PROMPT, GROUPS = 32, 256, 64, 4


def sampled(recorder: Recorder, vocab: int) -> SimpleNamespace:
    """Gives the recorder random rollouts, and returns the settings of a trainer that has them."""
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(5, vocab, (n,), generator=draw).tolist()

    reward = recorder.reward(lambda completion_ids, **_: [float(sum(i)) for i in completion_ids])
    size = ROLLOUTS // GROUPS
    prompts = [prompt for _ in range(GROUPS) for prompt in [ids(PROMPT)] * size]
    completions = [ids(TOKENS - PROMPT) for _ in range(ROLLOUTS)]
    reward(prompts=prompts, completions=completions, completion_ids=completions)
    return SimpleNamespace(num_generations=size, scale_rewards="group", temperature=0.9)


def measure(shape: str, args: argparse.Namespace) -> None:
    device, dtype = args.device, args.dtype
    model: Any = lora_model(shape, device, dtype).train()
    bare = lora_model(shape, device, dtype).merge_and_unload().eval()
    shadow = Shadow.of(model)
    vocab = shadow.vocab_size
    batch = ProbeBatch.encode([Probe("probe", [1, 2, 3])], vocab_size=vocab, device=device)
    recorder = Recorder()
    of = sampled(recorder, vocab)
    look = Look(Rollouts(), recorder)
    assert recorder.latest is not None
    few = rollouts_of(recorder.latest, recorder, batch, of, model)
    run_together = parts(few, batch, 512)
    tokens = torch.cat([part.tokens for part in run_together])
    resid = torch.cat([last_residuals(shadow, part) for part in run_together])
    peak: list[float] = []

    def whole() -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        look.before_update(shadow, batch, model, of, 0)
        if device == "cuda":
            peak.append((torch.cuda.max_memory_allocated() - held) / 2**20)

    def passes() -> None:
        for part in run_together:
            inside(shadow, part, [])
            last_residuals(shadow, part)

    def plain() -> None:
        for part in run_together:
            last_residuals(shadow, part)

    @torch.no_grad()
    def forward() -> None:
        for part in run_together:
            bare(part.batch.tokens)

    rows = {
        "a look at all rollouts, with the base": whole,
        "    its passes: inside, and the base": passes,
        "    two passes without looking inside": lambda: (plain(), plain()),
        "    the measures of each token": lambda: compare(shadow, resid, resid, tokens),
        "bare Hugging Face forward of the same tokens": forward,
    }
    found = take_turns(rows, args.rounds, device)
    unit = found["bare Hugging Face forward of the same tokens"]
    print(f"\n| {shape}, {ROLLOUTS} rollouts of {TOKENS} tokens | | of a forward |")
    print("| --- | --- | --- |")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * seconds:,.0f} ms | {seconds / unit:.2f} |")
    if peak:
        print(f"| most memory for a while | {max(peak):,.0f} MiB | |")


def main() -> None:
    args = arguments(__doc__.splitlines()[0], ["smollm2-135m"], rounds=3)
    for shape in args.shapes:
        assert SHAPES[shape]["max_position_embeddings"] >= TOKENS, f"{shape} reads fewer tokens"
        measure(shape, args)


if __name__ == "__main__":
    main()
