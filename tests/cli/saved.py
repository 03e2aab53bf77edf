"""Tiny models on disk, as a trainer leaves them, and the command line in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.adapters import randomise
from tests.processes import run_command
from tlens_callback.cli import main


def save_base(path: Path, *, tokenizer: bool = True, **config) -> Path:
    tiny.model("llama", **config).save_pretrained(path)
    if tokenizer:
        tiny.tokenizer().save_pretrained(path)
    return path


def save_adapter(base: Path, path: Path, *, step: int = 60) -> Path:
    """A random LoRA adapter, with the trainer's state beside it."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        randomise(model, only_trainable=True)
    model.save_pretrained(path)
    logged = [{"step": at, "loss": 3.0 - at / step} for at in (step // 2, step)]
    state = {"global_step": step, "log_history": logged}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def probabilities(base: Path, adapter: Path | None, prompt: str | list[int]) -> torch.Tensor:
    """[vocab], of the next token, as Hugging Face and PEFT have it, unmerged."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tiny.tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1].double().softmax(0)


def run(*arguments, **options) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], **options)


def bare(folder: Path) -> dict[str, str]:
    """The environment of a bare shell, with W&B's files in this folder."""
    env = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], "OMP_NUM_THREADS": "1"}
    # Where a test limits the size of files, Python would leave its own cut short, for all to load.
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    return env | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}


def started(*arguments, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, cwd=cwd, env=bare(cwd), **options)


SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
"""As a full disk: no file of the process that does this grows beyond 4 KiB."""


def installed(*arguments, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, from its first import on."""
    return subprocess.run(
        [Path(sys.executable).with_name("tlens-callback"), *map(str, arguments)],
        cwd=cwd,
        env=bare(cwd),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
