# /// script
# dependencies = ["tlens-callback", "accelerate"]
# ///
"""A two-layer model grows induction heads while the callback watches, in about a minute.

The data are repeated random blocks of tokens. The only thing to learn is to find the last
occurrence of a token and copy what followed it. After about 300 steps the loss drops sharply: a
previous-token head in the first layer and an induction head in the second layer now work together.
One layer cannot do it.

    python examples/induction.py

# The control: one layer
    python examples/induction.py --layers 1 --output-dir runs/induction-1

`scripts/induction_figure.py` draws both runs in one figure.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from tlens_callback import TLensCallback, read_store

VOCAB = CONTEXT = 64
BATCH = 64


def model(layers: int = 2) -> LlamaForCausalLM:
    """A small Llama with random weights, from torch's global random state."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=None,
        )
    )


def repeated_blocks(rows: int, *, seed: int, shortest: int = 8, longest: int = 24) -> Tensor:
    """[row, pos]: `[BOS, block, block, ...]` cut at the context, each row with a random block of a
    random length. One length for all would teach "copy from so many tokens back" instead."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(1, VOCAB, (rows, longest), generator=generator)
    lengths = torch.randint(shortest, longest + 1, (rows, 1), generator=generator)
    tokens = torch.zeros(rows, CONTEXT, dtype=torch.long)
    tokens[:, 1:] = blocks.gather(1, torch.arange(CONTEXT - 1) % lengths)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="steps between two observations")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/induction"))
    args = parser.parse_args()

    # No probes of our own: the built-in repeated blocks, of three lengths, are all we need.
    callback = TLensCallback([], every_n_steps=args.every)
    set_seed(args.seed)
    tokens = repeated_blocks(args.steps * BATCH, seed=args.seed)
    trainer = Trainer(
        model(args.layers),
        TrainingArguments(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=5,
            save_strategy="no",
            seed=args.seed,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_state()

    recorded = read_store(callback.sinks[0].path)
    steps, induction = recorded.curve("head_scores/max_induction")
    _, previous = recorded.curve("head_scores/max_previous")
    print("step  previous  induction")
    for step, before, after in zip(steps, previous, induction, strict=True):
        print(f"{step:4d}  {before:8.2f}  {after:9.2f}  {'#' * round(40 * after)}")


if __name__ == "__main__":
    main()
