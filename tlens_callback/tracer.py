"""`Tracer`: the callback's eyes in a training loop of one's own."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, Unpack

import torch
from torch import nn
from torch.utils.data import DataLoader

from tlens_callback.interfaces import Sink
from tlens_callback.probes import Probe
from tlens_callback.probes.builtin import first_rows, training_rows
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import print_lines
from tlens_callback.run.settings import Options, Settings
from tlens_callback.run.terminal import opening, summary
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.weights import unwrap
from tlens_callback.sinks import LocalSink
from tlens_callback.sinks.default import active_wandb
from tlens_callback.store.atomic import write_whole

logger = logging.getLogger("tlens_callback")


class Tracer:
    """Looks inside a model while a plain PyTorch or accelerate loop trains it, and leaves the run
    as it was.

        with Tracer(model, tokenizer, probes, every_n_steps=50) as tracer:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracer.step(loss=loss.item())

    Entering observes the model as it is; `step` after an optimizer's step observes every
    `every_n_steps` steps; leaving observes the last step, unless that was observed, writes
    everything, closes the sinks and frees the shadow. Where the block raises, there is no last
    look: what was observed is written, and the exception goes on. A tracer that is entered again
    begins a new run.

    Of several processes (`torch.distributed`, which `accelerate` uses) rank 0 observes and the
    others do nothing; all call `step` alike.

    Args:
        model: what is trained: a `PreTrainedModel`, plain or wrapped by PEFT, DDP,
            `Accelerator.prepare` or `torch.compile`.
        tokenizer: encodes the probes, with a copy of it; None will do for probes of token ids.
        probes: what to ask, or the path of a file that `read_probes` reads. None: the first rows
            of `train_dataset`, and without one only the repeated blocks.
        output_dir: where the default store goes, as `<output_dir>/<name>`.
        step: how many optimizer steps the model has had: where a resumed loop begins.
        last_step: the step that the loop ends with. None: leaving the block tells, and if the last
            step was observed by then, the shadow is not checked once more, and an instrument with
            an `every` is not asked unless it was its turn.
        resume_from: the folder that `save` wrote to at this step. None: changes are measured from
            the first observation of this loop on.
        train_dataset: rows that the model is trained on, by index, each a dict with `input_ids`,
            `text` or `prompt`; for instruments that learn from them, and for `probes=None`. It is
            read beside the loop's loader, whose order stays what it is.
        settings: instruments, sinks, watch, every_n_steps, repeats, device, dtype, on_error,
            writing and name, as `tlens_callback.run.settings.Settings` explains them. The default
            sinks are the local store and the active W&B run. To that a loop logs
            `{..., "train/global_step": step}` and no `step=`: W&B's own steps are rows, the
            tracer's among them, and it drops what comes for an earlier one.

    Raises:
        ValueError: here or on entering, for what cannot work; the text says what to do.
        FidelityError: on entering, if the shadow does not compute what the model does.

    Keys:
        cost/<what>, fidelity/<what>: see `Observer`.
        trainer/<name>: [update], as logged; what `step` was told since the observation before.

    Attributes:
        sinks: where the readings go, or went, also those that were set aside; the default ones are
            known once the block was entered.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        probes: Sequence[Probe] | str | os.PathLike[str] | None = None,
        *,
        output_dir: str | Path = ".",
        step: int = 0,
        last_step: int | None = None,
        resume_from: str | Path | None = None,
        train_dataset: Any = None,
        **settings: Unpack[Options],
    ) -> None:
        self.settings = Settings(probes, **settings)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is the module that is trained, got {type(model).__name__}.")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step is a whole number from 0 on, got {step!r}.")
        if last_step is not None and not (isinstance(last_step, int) and last_step > step):
            raise ValueError(f"last_step is a whole number above {step}, got {last_step!r}.")
        if resume_from is not None and step == 0:
            raise ValueError(
                "resume_from is for a loop that goes on: say at which step, Tracer(step=...)."
            )
        if isinstance(train_dataset, DataLoader):
            raise ValueError(
                "train_dataset is read by index beside the loop; give loader.dataset, not the "
                "loader."
            )
        self.sinks: list[Sink] = list(self.settings.sinks or ())
        self._given_sinks = self.settings.sinks is not None
        self.observer: Observer | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._folder = Path(output_dir)
        self._begin, self._end = step, last_step
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._data = SimpleNamespace(dataset=train_dataset)
        self._entered = False
        self._step = step
        self._log: list[dict[str, float]] = []

    def __enter__(self) -> Self:
        """Builds the shadow, holds it against the model, observes for the first time."""
        if self._entered:
            raise ValueError("This tracer is inside its block already; a second one takes another.")
        self._step, self._log = self._begin, []
        if not _first_process():
            self._entered = True
            return self
        memory = self._recall()
        if not self._given_sinks:
            self.sinks = [LocalSink(self._folder / self.settings.name)]
        self.observer = observer = Observer(self.settings, self.sinks)
        print_lines([f"tlens: building a shadow of the {type(unwrap(self._model)).__name__}"])
        try:
            self._join_wandb()
            with _full_precision(self._model):
                observer.start(
                    self._model,
                    self._tokenizer,
                    self._probes,
                    step=self._begin,
                    memory=memory,
                    run=self._run,
                    training=self._training_rows(),
                    logged=self._log,
                )
        except BaseException:
            self.observer = None
            raise
        print_lines(opening(observer))
        self._entered = True
        return self

    def step(self, **logged: float) -> None:
        """To be called after each step of the optimizer, on every process: with gradient
        accumulation not after each batch (under accelerate, `if accelerator.sync_gradients:`).

        Checks the shadow after the first update and observes every `every_n_steps` steps; at other
        steps it costs microseconds.

        Args:
            logged: numbers of this step, such as its loss; readings `trainer/<name>`, of the
                observation at this step or of the next.

        Raises:
            ValueError: outside of the block, or for what is no number.
        """
        self._check_entered("step")
        row = {name: _number(name, value) for name, value in logged.items()}
        self._step += 1
        if self.observer is None:
            return
        if row:
            self._log.append({**row, "step": self._step})
        self._join_wandb()
        with _full_precision(self._model):
            self.observer.after_update(
                self._step,
                observe=self._step % self.settings.every_n_steps == 0,
                last=self._step == self._end,
            )

    def save(self, folder: str | Path) -> None:
        """Keeps, beside the loop's own checkpoint of this step, what later observations are
        compared with and what `step` was told: `<name>.memory` and `<name>.log.json`, for
        `resume_from`. On processes that do not observe it does nothing.

        Raises:
            ValueError: outside of the block.
            OSError: a full disk, say, with `on_error="raise"`.
        """
        self._check_entered("save")
        if self.observer is None or not self.observer.watching:
            return
        path = Path(folder) / self._file("memory")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path.with_name(self._file("log.json")), json.dumps(self._log).encode())
        except OSError as error:
            if self.settings.on_error == "raise":
                raise
            logger.warning("tlens: %s could not be written: %s", path, error)
            return
        self.observer.remember(path, step=self._step, run=self._run, always=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The last look, unless the block raised; then everything is written and closed."""
        self._entered = False
        observer, self.observer = self.observer, None
        if observer is None:
            return
        try:
            if kind is None and self._step not in observer.steps:
                with _full_precision(self._model):
                    observer.after_update(self._step, observe=True, last=True)
        finally:
            try:
                observer.close()
            except Exception as failed:
                if kind is None:
                    raise
                # The loop's own exception is the one to know.
                logger.warning("tlens: %s: %s", type(failed).__name__, failed, exc_info=failed)
            print_lines(summary(observer))

    def _probes(self, shadow: Shadow) -> list[Probe]:
        given = self.settings.prompts
        if given is None:
            given = first_rows(self._data, self._tokenizer, context=shadow.context)
            if not given:
                logger.warning(
                    "tlens: there is no text to look at, only repeated blocks; probes=[...] or "
                    "train_dataset= would give some."
                )
        return self.settings.completed(given, shadow)

    def _training_rows(self) -> Callable[[int], list[list[int]]] | None:
        return training_rows(self._data, self._tokenizer)

    def _join_wandb(self) -> None:
        """Adds the active W&B run to the default sinks; it may begin after the block does."""
        if self._given_sinks or self.observer is None:
            return
        if (sink := active_wandb(self.sinks, self.settings.name)) is not None:
            self.sinks.append(sink)
            self.observer.writer.add(sink)

    def _recall(self) -> Path | None:
        """The file of baselines to go on with; what was logged before is taken up."""
        if self._resume_from is None:
            return None
        path, log = (self._resume_from / self._file(kind) for kind in ("memory", "log.json"))
        if missing := [file for file in (path, log) if not file.exists()]:
            raise ValueError(
                f"{self._resume_from} has no {missing[0].name}, which tracer.save(folder) writes "
                f"beside a checkpoint. Without resume_from, changes are measured from here on."
            )
        try:
            self._log += json.loads(log.read_text())
        except ValueError as error:
            raise ValueError(
                f"{log} is torn: {error}. Without resume_from it can go on."
            ) from error
        return path

    def _file(self, kind: str) -> str:
        return f"{self.settings.name}.{kind}"

    @property
    def _run(self) -> str:
        """What tells this run from others: how far it has come, and what was logged last."""
        return json.dumps([self._step, self._log[-100:]], sort_keys=True)

    def _check_entered(self, what: str) -> None:
        if not self._entered:
            raise ValueError(
                f"tracer.{what}() belongs inside the block: with Tracer(...) as tracer: ..."
            )


def _first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Lifts the autocast that a loop may have on around its whole step."""
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
        yield


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError("The tracer counts the steps itself; Tracer(step=...) says the first.")
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"What a step logs are numbers, got {name}={value!r}.") from error
