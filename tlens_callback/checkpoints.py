"""Saved models: what a directory or a hub name holds, and loading one after another."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A saved model: all weights, or an adapter over a base.

    Attributes:
        model: directory or hub name of all weights; of the base, where there is an adapter.
        adapter: directory or hub name of the adapter.
        trained: False for the adapter as it was before training: the base, with what the adapter
            will change set apart, so that a shadow of it goes on to the trained one.
    """

    model: str
    adapter: str | None = None
    trained: bool = True

    @classmethod
    def of(
        cls, model: str | Path, adapter: str | Path | None = None, *, base: str | Path | None = None
    ) -> "Checkpoint":
        """What a user named.

        Args:
            model: directory or hub name; of an adapter, too, whose base its config names.
            base: where that base is, if the config no longer tells.

        Raises:
            ValueError: where there is nothing to load; the text says what there is.
        """
        if adapter is None and (Path(model) / ADAPTER).exists():
            config = json.loads((Path(model) / ADAPTER).read_text())
            return cls(str(base or config["base_model_name_or_path"]), str(model))
        return cls(str(model), None if adapter is None else str(adapter))

    @property
    def path(self) -> str:
        """Of what was trained."""
        return self.adapter or self.model

    @property
    def step(self) -> int | None:
        """The optimizer step in a trainer's `checkpoint-<step>`."""
        found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", Path(self.path).name)
        return int(found[1]) if found else None

    @property
    def logged(self) -> list[Mapping[str, Any]]:
        """What the trainer had logged by then; empty where it left no state."""
        state = Path(self.path) / "trainer_state.json"
        return json.loads(state.read_text())["log_history"] if state.exists() else []

    @property
    def before_training(self) -> "Checkpoint":
        """The base with this adapter untrained."""
        assert self.adapter is not None
        return replace(self, trained=False)


def checkpoints_in(run: str | Path, *, base: str | Path | None = None) -> list[Checkpoint]:
    """The `checkpoint-<step>` of a trainer's output directory, in the order of their steps.

    Raises:
        ValueError: where there is no such directory, or no checkpoint in it.
    """
    folders = Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = [Checkpoint.of(folder, base=base) for folder in folders if folder.is_dir()]
    steps = {one.step: one for one in found if one.step is not None}
    return [steps[step] for step in sorted(steps)]


class Loader:
    """Loads checkpoints one after another; the base of adapters once.

    Args:
        device: where models go; None: the GPU, if there is one.
        dtype: precision of the full weights; None: that in which they were saved. Adapters are
            float32, as PEFT trains them.
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self._model: Any = None
        self._is: Checkpoint | None = None

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether `load` fills the model it returned last, so that a shadow of it follows."""
        now = self._is
        return (
            now is not None
            and now.adapter is not None
            and checkpoint.adapter is not None
            and now.model == checkpoint.model
            and _config(now.adapter) == _config(checkpoint.adapter)
            and checkpoint.trained
        )

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model in eval mode; what was trained requires gradients, as it did.

        Raises:
            ValueError: for what cannot be loaded: no weights, an adapter of another base.
        """
        if self.fits(checkpoint):
            assert checkpoint.adapter is not None
            weights = load_peft_weights(checkpoint.adapter, device=str(self.device))
            set_peft_model_state_dict(self._model, weights)
        else:
            self._model = None
            dtype = self.dtype or "auto"
            model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.model, dtype=dtype)
            model = model.to(self.device)
            if checkpoint.adapter is not None and checkpoint.trained:
                model = PeftModel.from_pretrained(model, checkpoint.adapter, is_trainable=True)
            elif checkpoint.adapter is not None:
                config = PeftConfig.from_pretrained(checkpoint.adapter)
                config.inference_mode = False
                model = get_peft_model(model, config)
            self._model = model.eval()
        self._is = checkpoint
        return self._model

    def tokenizer(self, checkpoint: Checkpoint) -> Any:
        """The adapter's, or else the model's; None where neither has one."""
        for place in filter(None, (checkpoint.adapter, checkpoint.model)):
            try:
                return AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError):
                continue
        return None


def _config(adapter: str) -> Any:
    return json.loads((Path(adapter) / ADAPTER).read_text())
