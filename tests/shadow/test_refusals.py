"""Every model that cannot be shown is refused by name, and no model that can be."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from peft import ArrowConfig, LoraConfig, TaskType, create_arrow_model, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.utils.quantization_config import QuantizationMethod

from tests import tiny
from tests.adapters import needs_transformers_peft
from tlens_callback.shadow.refusals import refuse
from tlens_callback.shadow.weights import fill, resolve, unwrap

# PEFT warns while it builds some of these; none of the warnings is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


CAUSAL: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}


def llama(**settings: Any) -> Any:
    return tiny.model("llama", hidden_size=64, **settings)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))


@pytest.fixture
def process_group():
    """One gloo process, for the wrappers that want one."""
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SHOWN = {
    "plain": llama,
    "bfloat16": lambda: llama().bfloat16(),
    "lora": lambda: get_peft_model(llama(), lora()),
    "dora": lambda: get_peft_model(llama(), lora(use_dora=True)),
    "lora_bias": lambda: get_peft_model(llama(attention_bias=True), lora(lora_bias=True)),
    "mixed": lambda: get_peft_model(llama(), lora(), mixed=True),
    "wrapped": lambda: nn.DataParallel(get_peft_model(llama(), lora())),
    "compiled": lambda: torch.compile(get_peft_model(llama(), lora())),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_what_can_be_shown_is_not_refused(name):
    model = SHOWN[name]()
    refuse(model)
    refuse(model, device="cpu")


@needs_transformers_peft
def test_transformers_own_add_adapter_is_not_refused():
    model = llama()
    model.add_adapter(lora())
    refuse(model)


def test_something_else_than_a_transformers_model():
    with pytest.raises(ValueError, match="Sequential is not a transformers model"):
        refuse(nn.Sequential(nn.Linear(2, 2)))


# Where the weights are.


def test_fsdp2(process_group):
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"sharded \(FSDP2\)\. .*TLensCallback and Tracer"):
        refuse(model)
    refuse(model, together=True)


def test_sharded_parameters_without_a_wrapper(process_group):
    model = llama()
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(model.lm_head.weight.data, mesh)
    model.lm_head.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"tensor parallelism: .*Train with FSDP"):
        refuse(model, together=True)


def test_fsdp1(process_group):
    model = get_peft_model(llama(), lora())
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sharded \(FSDP1\)"):
        refuse(wrapped)
    refuse(wrapped, together=True)


def test_deepspeed_zero_3():
    model = llama()
    model.lm_head.weight.ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"sharded \(DeepSpeed ZeRO-3\)"):
        refuse(model)


def test_tensor_parallelism():
    model = llama()
    model._tp_size = 2
    with pytest.raises(ValueError, match="under tensor parallelism"):
        refuse(model, together=True)


def test_parameters_that_are_not_there():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is on the meta device"):
        refuse(model)


def test_parameters_offloaded_to_disk(tmp_path):
    places: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
    }
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    here: Any = "cpu"  # a torch.device would make accelerate offload what is on the CPU
    model = accelerate.dispatch_model(
        llama(),
        places,
        main_device=here,
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    with pytest.raises(ValueError, match=r"'model.layers.0.* is on the meta device: offloaded"):
        refuse(model)
    with pytest.raises(ValueError, match="meta device"):
        refuse(model, device="cpu")


class Elsewhere(nn.Parameter):
    """A parameter that says it is on another device; a machine without one has no other way."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


def test_parameters_on_several_devices_need_a_place_for_the_copy():
    model = llama()
    model.lm_head._parameters["weight"] = Elsewhere(model.lm_head.weight.data)
    with pytest.raises(ValueError, match=r"several devices \(cpu, cuda:1\).*Pass device="):
        refuse(model)
    refuse(model, device="cpu")


# Quantised.


READ = (QuantizationMethod.BITS_AND_BYTES, QuantizationMethod.TORCHAO, QuantizationMethod.HQQ)
UNTRIED = {"gptq", "awq", "fp8"}


@pytest.mark.parametrize("method", [one for one in QuantizationMethod if one not in READ])
def test_a_quantised_base_is_named_by_its_method(method):
    base = llama()
    model = get_peft_model(base, lora())
    base.quantization_method = method
    why = "nobody has shown on a GPU" if method.value in UNTRIED else "cannot be read"
    wanted = rf"quantised \({method.value}\).*{why}.*Load the base model in bfloat16"
    with pytest.raises(ValueError, match=wanted):
        refuse(model)


@pytest.mark.parametrize("config", [Mxfp4Config, FineGrainedFP8Config])
def test_what_transformers_loads_in_floating_point_too_is_told_how(config):
    model = llama()
    model.config.quantization_config = config()
    model.quantization_method = config().quant_method
    with pytest.raises(ValueError, match=rf"{config.__name__}\(dequantize=True\) to look inside"):
        refuse(model)


def test_a_quantizer_without_a_method():
    class TorchAoHfQuantizer: ...

    model = llama()
    model.hf_quantizer = TorchAoHfQuantizer()
    with pytest.raises(ValueError, match=r"quantised \(TorchAoHfQuantizer\)"):
        refuse(model)


def test_packed_parameters_that_nothing_announces():
    model = llama()
    packed = torch.zeros(2048, 1, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight' is a Tensor of torch.uint8"):
        refuse(model)


def test_a_library_s_own_kind_of_tensor():
    class Int8Tensor(torch.Tensor): ...

    model = llama()
    weight = model.lm_head.weight.data.as_subclass(Int8Tensor)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is a Int8Tensor of torch.float32"):
        refuse(model)


# Adapters without a merged weight.


PROMPTS: dict[str, dict[str, Any]] = {
    "PromptTuning": {"num_virtual_tokens": 3},
    "PromptEncoder": {"num_virtual_tokens": 3},
    "PrefixTuning": {"num_virtual_tokens": 3},
    "MultitaskPromptTuning": {"num_virtual_tokens": 3, "num_tasks": 2},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "Cartridge": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_methods(name):
    config = getattr(peft, f"{name}Config")(**PROMPTS[name], **CAUSAL)
    model = get_peft_model(llama(), config)
    with pytest.raises(ValueError, match=f"{name} puts learned vectors in front of the input"):
        refuse(model)


def test_prompt_methods_that_peft_may_add_later():
    config = peft.PromptTuningConfig(**PROMPTS["PromptTuning"], **CAUSAL)
    model = get_peft_model(llama(), config)
    model.active_peft_config.peft_type = "A_NEW_KIND"
    with pytest.raises(ValueError, match="PromptTuning puts learned vectors"):
        refuse(model)


TUNERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "AdaptionPrompt adds attention": partial(
        peft.AdaptionPromptConfig, adapter_layers=1, adapter_len=3, **CAUSAL
    ),
    "Poly mixes its modules by a task id": partial(
        peft.PolyConfig, r=2, target_modules=["q_proj"], n_tasks=2, n_skills=2
    ),
    "Lily mixes its matrices by the input": partial(
        peft.LilyConfig, r=2, target_modules=["q_proj"]
    ),
    "Shadow runs a second, small network": partial(peft.ShadowConfig, **CAUSAL),
    "aLoRA acts only on the tokens behind": partial(lora, alora_invocation_tokens=[1, 2], **CAUSAL),
    "lora_bias=True on a layer without a bias": partial(lora, lora_bias=True),
    "PVeRA with sample_at_inference=True": partial(
        peft.PveraConfig, r=4, target_modules=["q_proj"], sample_at_inference=True
    ),
}


@pytest.mark.parametrize("text", TUNERS)
def test_tuners_without_one_weight(text):
    model = get_peft_model(llama(), TUNERS[text]())
    with pytest.raises(ValueError, match=f"{text}.*no set of plain weights.*Use a tuner that"):
        refuse(model)


def stored_adapters(folder: Path) -> list[str]:
    for name in ("a", "b"):
        get_peft_model(llama(), lora(**CAUSAL)).save_pretrained(str(folder / name))
    return [str(folder / "a"), str(folder / "b")]


def test_x_lora(tmp_path):
    paths = stored_adapters(tmp_path)
    config = peft.XLoraConfig(**CAUSAL, hidden_size=64, adapters={"a": paths[0], "b": paths[1]})
    model = get_peft_model(llama(use_cache=False), config)
    with pytest.raises(ValueError, match="XLora mixes its LoRA adapters anew for every input"):
        refuse(model)


def test_arrow_is_refused_while_its_router_is_active(tmp_path):
    paths = stored_adapters(tmp_path)
    model = create_arrow_model(llama(), paths, ArrowConfig(top_k=1))
    with pytest.raises(ValueError, match=r"Arrow routes every token .*module '.*q_proj'"):
        refuse(model)
    model.set_adapter("task_0")
    refuse(model)


def test_an_inactive_alora_adapter_is_no_obstacle():
    model = get_peft_model(llama(), lora(**CAUSAL))
    model.add_adapter("tail", lora(alora_invocation_tokens=[1, 2], **CAUSAL))
    refuse(model)
    model.set_adapter("tail")
    layer = resolve(unwrap(model), "model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match="aLoRA does not support merging"):
        fill(layer, {"weight": torch.empty(64, 64)})


def test_lora_on_pytorch_s_multihead_attention():
    model = llama()
    model.model.layers[0].extra = nn.MultiheadAttention(64, 4)
    live = get_peft_model(model, lora(target_modules=["extra"]))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        refuse(live)
