"""`Loader`: saved models into memory, one after another, each exactly as it was saved."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tlens_callback.checkpoints.adapters import (
    UnknownStart,
    alike,
    drawing_nothing,
    fill,
    fill_untrained,
    glance,
    kind,
    put_over,
)
from tlens_callback.checkpoints.files import repository, same_place, vocabulary

if TYPE_CHECKING:
    from tlens_callback.checkpoints.checkpoint import Checkpoint

logger = logging.getLogger("tlens_callback")


class Loader:
    """Loads checkpoints one after another; the base of adapters once.

    Nothing is drawn from the global random states, and no code that comes with a model is run.

    Args:
        device: where models go; None: the GPU, if there is one.
        dtype: precision of the full weights; None: that in which they were saved. Adapters are
            float32 at least, as PEFT trains them.

    Raises:
        ValueError: for a device that there is not.
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        try:
            wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.device = torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device={str(device)!r}: {str(error).splitlines()[0]}") from error
        self.dtype = dtype
        self._model: Any = None
        self._is: Checkpoint | None = None
        self._kind: Any = None
        self._resized = False

    def fits(self, checkpoint: "Checkpoint") -> bool:
        """Whether `load` fills the model it returned last, so that a shadow of it follows.

        So it is for adapters over one base whose configs make the same layers and whose files hold
        the same tensors: what one wrote, the next one overwrites.

        Raises:
            ValueError: for an adapter that is not whole.
        """
        now = self._is
        if now is None or now.adapter is None or checkpoint.adapter is None:
            return False
        if not checkpoint.trained:
            return now == checkpoint
        return same_place(now.model, checkpoint.model) and self._kind == kind(checkpoint.adapter)

    def load(self, checkpoint: "Checkpoint") -> nn.Module:
        """The model in eval mode; what was trained requires gradients, as it did.

        Raises:
            ValueError: for what cannot be loaded whole: weights that are missing, an adapter of
                another base, a model that is no causal language model; and as `untrained`.
        """
        fitting = self.fits(checkpoint)
        if fitting and not checkpoint.trained:
            return self._model
        self._is = None  # until all has gone well
        if not fitting:
            self._model = self._kind = None
            with drawing_nothing(self.device):
                self._model = self._built(checkpoint)
        if checkpoint.adapter is not None and checkpoint.trained:
            fill(self._model, checkpoint.adapter, resized=self._resized)
        self._is = checkpoint
        return self._model

    def untrained(self, checkpoint: "Checkpoint") -> "Checkpoint | None":
        """The checkpoint before its training, loaded, so that `load` of it comes for free.

        Returns:
            None where that cannot be known: an adapter that started from random values which
            changed the model, and that were not saved. The reason is logged.

        Raises:
            ValueError: as `load`.
        """
        if checkpoint.adapter is None:
            logger.warning("tlens: %s has all weights, and no base.", checkpoint.model)
            return None
        try:
            self.load(checkpoint.before_training)
        except UnknownStart as error:
            logger.warning("tlens: no step before training: %s", error)
            return None
        return checkpoint.before_training

    def tokenizer(self, checkpoint: "Checkpoint", name: str | None = None) -> Any:
        """The adapter's, or else the model's; None where neither has one.

        Args:
            name: place of another one.

        Raises:
            ValueError: for a tokenizer that is broken, or a `name` that has none.
        """
        places = [name] if name is not None else [checkpoint.adapter, checkpoint.model]
        for place in filter(None, places):
            if not vocabulary(place):
                continue
            source, revision = repository(place)
            try:
                return AutoTokenizer.from_pretrained(
                    source, revision=revision or "main", trust_remote_code=False
                )
            except Exception as error:
                raise ValueError(
                    f"The tokenizer in {place!r} cannot be loaded: {_line(error)}"
                ) from error
        if name is not None:
            raise ValueError(f"There is no tokenizer in {name!r}: it has no vocabulary.")
        return None

    def _built(self, checkpoint: "Checkpoint") -> Any:
        """The model without what was trained into the adapter."""
        if checkpoint.adapter is None:
            return self._full(checkpoint.model)
        self._kind = kind(checkpoint.adapter)
        if checkpoint.trained:
            return self._under(checkpoint.adapter, self._full(checkpoint.model))
        model = self._full(checkpoint.model)
        dtype, before = model.dtype, glance(model)
        for seed in (0, 1):
            with drawing_nothing(self.device, seed):
                model = self._under(checkpoint.adapter, model or self._full(checkpoint.model))
            fill_untrained(model, checkpoint.adapter, resized=self._resized)
            after = glance(model)
            # It is the base, or else what the base becomes whatever is drawn.
            if alike(before, after, dtype):
                return model
            model, before = None, after
        raise UnknownStart(
            f"an adapter like {checkpoint.adapter!r} changes the model before it is trained, by "
            f"random values that were not saved."
        )

    def _under(self, adapter: str, model: Any) -> Any:
        model, self._resized = put_over(model, adapter)
        return model

    def _full(self, place: str) -> Any:
        name, revision = repository(place)
        with _quiet_bars():
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    name,
                    revision=revision or "main",
                    dtype=self.dtype or "auto",
                    # Straight to the device: no second copy in the host's memory.
                    device_map=None if self.device.type == "cpu" else {"": self.device},
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise ValueError(f"{place!r} cannot be loaded: {_line(error)}") from error
        model, found = loaded
        if lacking := sorted(found["missing_keys"]):
            raise ValueError(
                f"{place!r} lacks {len(lacking)} of the weights of a {type(model).__name__}: "
                f"{', '.join(lacking[:3])}. They would be random. Was it saved whole?"
            )
        return model.eval()


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Bars of transformers only where a person sees them move."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _line(error: Exception) -> str:
    """The beginning of its text in one line: some list every class there is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."
