# /// script
# dependencies = ["tlens-callback"]
# ///
"""An instrument of one's own: how much each head looks at the tokens just before it.

It needs nothing of the package's inside. It is passed in a list beside those of `fast()`, and what
it says about itself gives it a curve, a panel with its explanation and events.

    python examples/own_instrument.py

    python examples/own_instrument.py --steps 100 --output-dir runs/short
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tlens_callback import (
    Description,
    LocalSink,
    Meaning,
    Probe,
    ProbeBatch,
    Quantity,
    Reading,
    Shadow,
    TLensCallback,
    fast,
    read_store,
)

HEADS = ("layer", "head")


class RecentAttention:
    """The share of each head's attention that goes to the last few tokens, the query among them.

    Of the pattern A of a head it is the sum of A[q, j] over q - last < j <= q, averaged over the
    queries q >= last: before those it is 1 whatever the head does. Queries of all probes count
    alike; a head that attends evenly has last / (q + 1) at query q. The repeated blocks are left
    out, because it depends on the other instruments whether there are any.

    Keys:
        recent/share: [layer, head], probability, 0..1
        recent/mean: [], probability, 0..1; mean of the share over all heads
        recent/change: [layer, head], probability, -1..1; share less that of the first observation

    Reads:
        hook_pattern, [probe, head, query, key], of each layer.

    Args:
        last: how many tokens count as the last ones, with the query itself.

    Raises:
        ValueError: if no probe has more than `last` tokens.
    """

    name = "recent"
    optional = True
    description: ClassVar[Description] = Description(
        title="Attention to the last tokens",
        group="Heads",
        measures={
            "share": Meaning(
                title="Attention of each head to the last tokens",
                axes=HEADS,
                headline=True,
                quantity=Quantity.HEAD_ROLE,
                role="local",
            ),
            "mean": Meaning(title="Attention to the last tokens", axes=(), headline=True),
            "change": Meaning(title="Change of it since the start", axes=HEADS, of_run=True),
        },
    )

    def __init__(self, last: int = 3) -> None:
        self.last = last
        self.baseline: dict[str, torch.Tensor] = {}

    def taps(self, shadow: Shadow, batch: ProbeBatch) -> Mapping:
        rows = torch.tensor([probe.block is None for probe in batch.probes])
        counted = batch.mask & rows.to(batch.mask.device)[:, None]
        counted[:, : self.last] = False
        if not counted.any():
            raise ValueError(f"No probe has more than {self.last} tokens; ask a longer one.")

        def share(pattern: torch.Tensor) -> torch.Tensor:  # [probe, head, query, key]
            recent = pattern.float().triu(1 - self.last).sum(-1)  # nothing is above the diagonal
            return recent.transpose(1, 2)[counted].mean(0)  # the queries that count, then a head

        return {f"blocks.{i}.attn.hook_pattern": share for i in range(shadow.n_layers)}

    def read(self, taken: Mapping, shadow: Shadow, batch: ProbeBatch) -> Iterable[Reading]:
        share = torch.stack(list(taken.values()))
        # After a resume the baseline is on the shadow's device; what was taken is on the CPU.
        change = share - self.baseline.setdefault("share", share).to(share.device)
        yield self._reading("share", share, limits=(0.0, 1.0))
        yield self._reading("mean", share.mean())
        yield self._reading("change", change)

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterable[Reading]:
        if "recent/share" in first and "recent/share" in last:
            change = last["recent/share"].values - first["recent/share"].values
            yield self._reading("change", torch.from_numpy(change))

    def _reading(self, measure: str, values: torch.Tensor, **more) -> Reading:
        axes = self.description.meaning(measure).axes
        key = f"{self.name}/{measure}"
        return Reading(key=key, values=values.numpy(), axes=axes, unit="probability", **more)


def main() -> None:
    """Trains a tiny model to add 1 to the token before the last, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output-dir", default="runs/own_instrument")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    starts = torch.randint(64, (2000, 1, 2))
    rows = ((starts + torch.arange(16)[:, None]) % 64).flatten(1)  # x[t] = x[t - 2] + 1
    sink = LocalSink(f"{arguments.output_dir}/tlens")
    tlens = TLensCallback(
        [Probe("count", rows[0].tolist()), Probe("other", rows[1].tolist())],
        instruments=[*fast(), RecentAttention()],
        sinks=[sink],
        every_n_steps=50,
    )
    args = TrainingArguments(
        arguments.output_dir,
        max_steps=arguments.steps,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, args, train_dataset=data, callbacks=[tlens]).train()

    store = read_store(sink.path)
    print(sink.path)
    for step, mean in zip(*store.curve("recent/mean"), strict=True):
        print(f"step {step:3d}: mean {mean:.3f}")
    print(store.reading("recent/share", store.steps[-1]).values.round(3))


if __name__ == "__main__":
    main()
