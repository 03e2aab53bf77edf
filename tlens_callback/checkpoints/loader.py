"""`Loader` loads saved models into memory, one after another, each exactly as it was saved."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as _IMAGES,
)
from transformers.utils import logging as transformers_logging

from tlens_callback.checkpoints.adapters import (
    UnknownStart,
    adapter_kind,
    add_adapter,
    equal_to_rounding,
    fill,
    fill_untrained,
    random_states_kept,
    sample_logits,
)
from tlens_callback.checkpoints.files import has_vocabulary, repository, same_place

if TYPE_CHECKING:
    from tlens_callback.checkpoints.checkpoint import Checkpoint

logger = logging.getLogger("tlens_callback")


class Loader:
    """Loads checkpoints one after another; a base that adapters share is loaded once.

    Nothing is drawn from the global random states, and no code that comes with a model is run.

    Args:
        device: device of the models; None: the GPU, if there is one.
        dtype: precision of the full weights; None: the precision in which they were saved.
            Adapters are at least float32, as PEFT trains them.

    Raises:
        ValueError: if there is no such device.
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        try:
            wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.device = torch.empty(0, dtype=torch.uint8, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device={str(device)!r}: {str(error).splitlines()[0]}") from error
        self.dtype = dtype
        self._model: Any = None
        self._loaded: Checkpoint | None = None
        self._kind: Any = None
        self._resized = False

    def fits(self, checkpoint: "Checkpoint") -> bool:
        """Whether `load` would fill the model that it returned last, so that its shadow can follow.

        This is so for adapters on one base whose configs make the same layers and whose files hold
        the same tensors: the next adapter overwrites all that the last one wrote.

        Raises:
            ValueError: if the adapter is incomplete.
        """
        now = self._loaded
        if now is None or now.adapter is None or checkpoint.adapter is None:
            return False
        if not checkpoint.trained:
            return now == checkpoint
        return same_place(now.model, checkpoint.model) and self._kind == adapter_kind(
            checkpoint.adapter
        )

    def load(self, checkpoint: "Checkpoint") -> nn.Module:
        """Loads a model in eval mode; the parameters that were trained require gradients.

        Raises:
            ValueError: if the model cannot be loaded completely: weights are missing, an adapter
                belongs to another base, or it is no language model; and as `untrained`.
        """
        fitting = self.fits(checkpoint)
        if fitting and not checkpoint.trained:
            return self._model
        self._loaded = None  # until all steps below have succeeded
        if not fitting:
            self._model = self._kind = None
            with random_states_kept(self.device):
                self._model = self._build(checkpoint)
        if checkpoint.adapter is not None and checkpoint.trained:
            fill(self._model, checkpoint.adapter, resized=self._resized)
        self._loaded = checkpoint
        return self._model

    def untrained(self, checkpoint: "Checkpoint") -> "Checkpoint | None":
        """Loads an adapter's model as it was before training, and returns its checkpoint.

        Returns:
            The checkpoint before training. None if it cannot be known, because the adapter started
            from random values that changed the model and were not saved. The reason is logged.

        Raises:
            ValueError: as `load`.
        """
        if checkpoint.adapter is None:
            logger.warning("tlens: %s is a full model and has no base.", checkpoint.model)
            return None
        try:
            self.load(checkpoint.before_training)
        except UnknownStart as error:
            logger.warning("tlens: the model before training is not known: %s", error)
            return None
        return checkpoint.before_training

    def tokenizer(self, checkpoint: "Checkpoint", name: str | None = None) -> Any:
        """Loads the tokenizer of the adapter, or else of the model; None if neither has one.

        Args:
            name: place of another tokenizer, to load instead.

        Raises:
            ValueError: if the tokenizer is broken, or there is none at `name`.
        """
        places = [name] if name is not None else [checkpoint.adapter, checkpoint.model]
        for place in filter(None, places):
            if not has_vocabulary(place):
                continue
            source, revision = repository(place)
            try:
                return AutoTokenizer.from_pretrained(
                    source, revision=revision or "main", trust_remote_code=False
                )
            except Exception as error:
                raise ValueError(
                    f"The tokenizer in {place!r} cannot be loaded: {_short_text(error)}"
                ) from error
        if name is not None:
            raise ValueError(f"There is no tokenizer in {name!r}: it has no vocabulary.")
        return None

    def _build(self, checkpoint: "Checkpoint") -> Any:
        """Loads the full model, and adds the adapter's layers without their trained values."""
        if checkpoint.adapter is None:
            return self._load_full(checkpoint.model)
        self._kind = adapter_kind(checkpoint.adapter)
        if checkpoint.trained:
            return self._add_adapter(checkpoint.adapter, self._load_full(checkpoint.model))
        model = self._load_full(checkpoint.model)
        dtype, before = model.dtype, sample_logits(model)
        for seed in (0, 1):
            with random_states_kept(self.device, seed):
                model = model or self._load_full(checkpoint.model)
                model = self._add_adapter(checkpoint.adapter, model)
            fill_untrained(model, checkpoint.adapter, resized=self._resized)
            after = sample_logits(model)
            # The start is known if the untrained adapter leaves the base as it is, or changes it
            # in the same way whatever the seed.
            if equal_to_rounding(before, after, dtype):
                return model
            model, before = None, after
        raise UnknownStart(
            f"an adapter like {checkpoint.adapter!r} changes the model before it is trained, by "
            f"random values that were not saved."
        )

    def _add_adapter(self, adapter: str, model: Any) -> Any:
        model, self._resized = add_adapter(model, adapter)
        return model

    def _load_full(self, place: str) -> Any:
        name, revision = repository(place)
        with _quiet_bars():
            try:
                loaded: Any = _class_for(name, revision).from_pretrained(
                    name,
                    revision=revision or "main",
                    dtype=self.dtype or "auto",
                    # Load straight to the device, without a second copy in the host's memory.
                    device_map=None if self.device.type == "cpu" else {"": self.device},
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise ValueError(f"{place!r} cannot be loaded: {_short_text(error)}") from error
        model, found = loaded
        if lacking := sorted(found["missing_keys"]):
            raise ValueError(
                f"{place!r} lacks {len(lacking)} of the weights of a {type(model).__name__}: "
                f"{', '.join(lacking[:3])}. They would be random. Was the model saved completely?"
            )
        return model.eval()


def _class_for(name: str, revision: str | None) -> Any:
    """The class that loads this model: the language model alone is only a part of some."""
    config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    kind = config.model_type
    reads_images = kind in _IMAGES and kind not in _CAUSAL
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Switches off the progress bars of transformers if the output is no terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _short_text(error: Exception) -> str:
    """The beginning of an error's text in one line; some texts list every class there is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."
