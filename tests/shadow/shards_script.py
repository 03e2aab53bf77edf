"""Run by test_shards in three processes, which write what they found to FOLDER/rank-N.json."""

import copy
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests import tiny
from tests.shadow.test_layers import Living
from tlens_callback import Shadow
from tlens_callback.shadow.gather import Gather
from tlens_callback.shadow.low_rank import low_rank_updates
from tlens_callback.shadow.ranks import Ranks
from tlens_callback.shadow.shards import shares
from tlens_callback.shadow.weights import unwrap

TOKENS = torch.arange(24).view(2, 12) + 10
CONFIG = {"num_hidden_layers": 6, "hidden_size": 192, "intermediate_size": 384, "head_dim": 48}


class Plain(Living):
    """Without what only stands for a tensor in shares."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(argument, DTensor) for argument in args):
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


class Odd(nn.Module):
    """Sizes that three processes cannot share evenly, two of them equal, and two precisions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"a": (5, 7), "b": (1, 3), "c": (8,), "d": (8,), "e": (3, 4, 2), "f": (2, 9)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))
        self.tied = self.a


def odd(seed: int = 3) -> Odd:
    torch.manual_seed(seed)
    return Odd()


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """What rank 0 reads of the module `model`, or of what FSDP1 has wrapped."""
    module = model._modules.get("_fsdp_wrapped_module", model)
    found = shares(model)
    gather = Gather(found)
    gather.run()
    if dist.get_rank():
        return {}
    values = {}
    for share in found:
        for (of, name), i in share.parameters:
            assert of == id(module)
            values[name] = gather.whole(share)[i].clone()
    return values


def same(values: dict[str, torch.Tensor], plain: nn.Module) -> bool:
    wanted = dict(plain.named_parameters(remove_duplicate=False))
    return values.keys() == wanted.keys() and all(
        torch.equal(values[name], own) and values[name].dtype == own.dtype
        for name, own in wanted.items()
    )


def by_rows(dtype: torch.dtype) -> Any:
    mesh = init_device_mesh("cpu", (3,))
    return fully_shard(odd().to(dtype), mesh=mesh)


def by_columns() -> Any:
    """FSDP2 shares evenly where it does not share rows."""
    mesh = init_device_mesh("cpu", (3,))
    by = {3: Shard(1), 9: Shard(1)}
    return fully_shard(odd(), mesh=mesh, shard_placement_fn=lambda p: by.get(p.shape[-1]))


def flat(original: bool) -> Any:
    return FullyShardedDataParallel(odd(), use_orig_params=original, device_id=torch.device("cpu"))


def adapted() -> Any:
    """LoRA on every linear layer, of an effect and half of it frozen, and a head of its own."""
    torch.manual_seed(0)
    settings: Any = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    model = get_peft_model(tiny.model("llama", **CONFIG), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.05)
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model.eval()


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (3,))
    for layer in unwrap(model).model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model: Any, *, units: bool) -> Any:
    policy = ModuleWrapPolicy({LlamaDecoderLayer}) if units else None
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


@torch.no_grad()
def followed(shard: Any) -> dict[str, Any]:
    """The shadow of a sharded model, beside the one of the same model before it was sharded."""
    plain = adapted()
    whole = Shadow.of(copy.deepcopy(plain))
    wanted = {w.name: w.value.clone() for w in whole.mirror.weights()}
    logits = whole.logits(TOKENS)
    updates = [(u.name, u.b, u.a) for u in low_rank_updates(whole)]
    with whole.without_adapters():
        base = whole.logits(TOKENS)
    model = shard(plain)
    ranks = Ranks.meet(model, "shards")
    assert ranks is not None
    ranks.begin(model, 0)
    found: dict[str, Any] = {}
    living = Plain()
    if not ranks.first:
        gather = ranks._gather

        def measured(*of: Any) -> Gather:
            with living:
                return gather(*of)

        ranks._gather = measured  # type: ignore[method-assign]
        ranks.serve()
    else:
        with ranks.leading(fatal=True):
            shadow = Shadow(model, ranks=ranks)
            before = ranks.gathers
            with living:
                mine = shadow.logits(TOKENS)
            found["gathers of a pass"] = ranks.gathers - before
            found["logits"] = float((mine - logits).abs().max())
            live = ranks.logits(TOKENS, eager=False, autocast=None)
            found["live"] = float((live - logits).abs().max())
            with shadow.without_adapters():
                found["base"] = float((shadow.logits(TOKENS) - base).abs().max())
            found["after"] = float((shadow.logits(TOKENS) - mine).abs().max())
            found["streamed"] = shadow.streamed
            names = []
            for weight in shadow.mirror.weights():
                with shadow.layer(weight.layer):
                    if torch.equal(weight.value, wanted[weight.name]):
                        names.append(weight.name)
            found["other weights"] = sorted(wanted.keys() - set(names))
            found["other updates"] = [
                update.name
                for update, (name, b, a) in zip(
                    sorted(low_rank_updates(shadow, numbers=False), key=lambda u: u.name),
                    sorted(updates, key=lambda u: u[0]),
                    strict=True,
                )
                if not (name == update.name and torch.equal(b, update.b) and a.equal(update.a))
            ]
            before = ranks.gathers
            shadow.sync()
            found["gathers of a sync"] = ranks.gathers - before
        found["adapter"] = float((logits - base).abs().max())
    layer = sum(p.nbytes for p in whole.bridge.original_model.model.layers[0].parameters())
    found["peak"] = living.most / layer
    ranks.close()
    return found


def main(to: str) -> None:
    dist.init_process_group("gloo")
    # What is compiled is wrapped so, and runs as it is.
    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    for name, make, plain in (
        ("FSDP2 by rows", partial(by_rows, torch.float32), odd()),
        ("FSDP2 in bfloat16", partial(by_rows, torch.bfloat16), odd().to(torch.bfloat16)),
        ("FSDP2 by columns", by_columns, odd()),
        ("FSDP1", partial(flat, True), odd()),
        ("FSDP1 without the parameters", partial(flat, False), odd()),
    ):
        values = gathered(make())
        found[name] = same(values, plain)
        found[f"{name}, control"] = same(values, odd(4).to(values["a"].dtype) if values else odd())
    for name, shard in (
        ("FSDP2", fsdp2),
        ("FSDP2, compiled", lambda model: torch.compile(fsdp2(model))),
        ("FSDP1 in units", partial(fsdp1, units=True)),
        ("FSDP1 in one unit", partial(fsdp1, units=False)),
    ):
        found[name] = followed(shard)
    (Path(to) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
