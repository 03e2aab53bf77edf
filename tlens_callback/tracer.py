"""`Tracer`: does what the callback does, in a training loop of your own."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, Unpack

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tlens_callback.probes import Probe
from tlens_callback.probes.builtin import training_rows
from tlens_callback.run.guard import guarded
from tlens_callback.run.printing import print_lines, warn
from tlens_callback.run.settings import Options, Settings
from tlens_callback.run.terminal import summary
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.ranks import is_first_process
from tlens_callback.shadow.shards import sharded
from tlens_callback.shadow.weights import unwrap
from tlens_callback.sinks import LocalSink
from tlens_callback.store.atomic import write_whole
from tlens_callback.watcher import Watcher


class Tracer(Watcher):
    """Looks inside a model while a plain PyTorch or accelerate loop trains it, without changing
    the training.

        with Tracer(model, tokenizer, probes, every_n_steps=50) as tracer:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracer.step(loss=loss.item())

    Entering the block observes the model as it is. `step`, called after each step of the optimizer,
    observes every `every_n_steps` steps. Leaving the block observes the last step if it was not
    observed yet, writes everything, closes the sinks and frees the shadow. If the block raises,
    there is no last observation: what was observed is written, and the exception goes on. A tracer
    that is entered again begins a new run.

    With several processes (`torch.distributed`, which `accelerate` uses) all of them enter the
    block and call `step`, and only rank 0 observes. The others help it where the model is sharded,
    and wait for it where it is not.

    Args:
        model: the model that is trained: a `PreTrainedModel`, plain or wrapped by PEFT, DDP, FSDP,
            DeepSpeed, `Accelerator.prepare` or `torch.compile`. With several processes give what
            was wrapped for them.
        tokenizer: encodes the probes; a copy of it is used. It can be None if all probes, targets
            and foils are token ids.
        probes: the texts to run, or the path of a file that `read_probes` reads. None: the first
            rows of `train_dataset`; if there is no dataset, only the repeated blocks.
        output_dir: the default store is `<output_dir>/<name>`.
        step: how many optimizer steps the model has had: where a resumed loop begins.
        last_step: the step that the loop ends with. None: it is known only when the block is left.
            If it was observed by then, it is not observed again: the shadow is not checked there,
            and an instrument with an `every` was asked only if it was its turn.
        resume_from: the folder that `save` wrote to at this step. None: changes are measured from
            the first observation of this loop.
        train_dataset: rows that the model is trained on, by index, each a dict with `input_ids`,
            `text` or `prompt`. Instruments that learn from training rows read it, and so does
            `probes=None`. This does not change the order of the loop's own loader.
        settings: instruments, sinks, watch, every_n_steps, budget, repeats, device, dtype,
            weights, on_error, writing and name, as `tlens_callback.run.settings.Settings` explains
            them. The default sinks are the local store and the active W&B run. If the loop logs to
            that run too, it should log `{..., "train/global_step": step}` and give no `step=`:
            W&B's own step counts rows, the tracer's included, and W&B drops a row for an earlier
            step.

    Raises:
        ValueError: here or on entering, if something cannot work; the text says what to do.
        FidelityError: on entering, if the shadow does not compute what the model does.

    Keys:
        cost/<what>, fidelity/<what>: see `Observer`.
        trainer/<name>: [update], as logged; what `step` was given after the previous observation.

    Attributes:
        sinks: where the readings go, including sinks that failed and were set aside. The default
            sinks are chosen when the block is entered.
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
        super().__init__(Settings(probes, **settings))
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model must be the torch module that is trained, got {type(model).__name__}."
            )
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step must be a whole number, 0 or more, got {step!r}.")
        if last_step is not None and not (isinstance(last_step, int) and last_step > step):
            raise ValueError(
                f"last_step must be a whole number greater than {step}, got {last_step!r}."
            )
        if resume_from is not None and step == 0:
            raise ValueError(
                "resume_from is only for a resumed loop: give the step where it resumes, "
                "Tracer(step=...)."
            )
        if isinstance(train_dataset, DataLoader):
            raise ValueError(
                "train_dataset must be a dataset that can be read by index; give loader.dataset, "
                "not the loader."
            )
        self._model = model
        self._tokenizer = tokenizer
        self._folder = Path(output_dir)
        self._first, self._last = step, last_step
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._data = SimpleNamespace(dataset=train_dataset)
        self._entered = False
        self._step = step
        self._log: list[dict[str, float]] = []

    def __enter__(self) -> Self:
        """Builds the shadow, compares it with the model and makes the first observation."""
        if self._entered:
            raise ValueError(
                "This tracer is inside its block already; a second block needs a second tracer."
            )
        self._step, self._log = self._first, []
        if _is_parallel(self._model):
            self._meet(self._model, self._first)
        self._begin(self._start, first=is_first_process())
        self._entered = True
        if self.observer is not None:
            self._greet()
        return self

    def _start(self) -> None:
        """Begins to watch; only rank 0 does."""
        baselines_file = self._read_saved()
        store = self._folder / self.settings.name
        observer = self._new_observer(lambda: [LocalSink(store)])
        print_lines([f"tlens: building a shadow of the {type(unwrap(self._model)).__name__}"])
        try:
            self._join_wandb()
            with _full_precision(self._model):
                observer.start(
                    self._model,
                    self._tokenizer,
                    self._probes,
                    step=self._first,
                    baselines_file=baselines_file,
                    run=self._run_identity,
                    about={},
                    training=training_rows(self._data, self._tokenizer),
                    logged=self._log,
                )
        except BaseException:
            self.observer = None
            raise

    def step(self, **logged: float) -> None:
        """Counts a step of the optimizer and observes when it is time; call it on every process.

        With gradient accumulation, call it after each step of the optimizer and not after each
        batch (under accelerate: `if accelerator.sync_gradients:`).

        It checks the shadow after the first update and observes every `every_n_steps` steps. At
        other steps it takes microseconds.

        Args:
            logged: numbers of this step, such as its loss. They become readings `trainer/<name>` of
                the observation at this step, or of the next one.

        Raises:
            ValueError: outside of the block, or for a value that is not a number.
        """
        self._check_entered("step")
        row = {name: _number(name, value) for name, value in logged.items()}
        self._step += 1
        self._observe(row)

    @guarded
    def _observe(self, row: dict[str, float]) -> None:
        if self.observer is not None and row:
            self._log.append({**row, "step": self._step})
        self._join_later_wandb()
        with _full_precision(self._model):
            last = self._step == self._last
            self._after_update(self._step, observe=self._is_time(self._step), last=last)

    def save(self, folder: str | Path) -> None:
        """Saves in a folder what `resume_from` needs; call it where the loop saves a checkpoint.

        It writes `<name>.memory` and `<name>.constants`, what later observations are compared with,
        and `<name>.log.json`, what `step` was given. On processes that do not observe it does
        nothing.

        Raises:
            ValueError: outside of the block.
            OSError: with `on_error="raise"`, if a file cannot be written (the disk is full).
        """
        self._check_entered("save")
        self._save(Path(folder))

    @guarded
    def _save(self, folder: Path) -> None:
        if self.observer is None or not self.observer.watching:
            return
        path = folder / self._file("memory")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path.with_name(self._file("log.json")), json.dumps(self._log).encode())
        except OSError as error:
            if self.settings.on_error == "raise":
                raise
            warn("tlens: %s could not be written: %s", path, error)
            return
        self.observer.remember(path, step=self._step, run=self._run_identity, shares=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Makes the last observation unless the block raised, then writes and closes everything."""
        self._entered = False
        try:
            self._leave(observe=kind is None)
        except Exception as failed:
            if kind is None:
                raise
            # The loop's own exception must reach the user, not this one.
            warn("tlens: %s: %s", type(failed).__name__, failed, error=failed)

    @guarded
    def _leave(self, *, observe: bool) -> None:
        try:
            if observe and self._lacks(self._step):
                with _full_precision(self._model):
                    self._after_update(self._step, observe=True, last=True)
        finally:
            self._part()
            observer, self.observer = self.observer, None
            if observer is not None:
                try:
                    observer.close()
                finally:
                    print_lines(summary(observer))

    def _probes(self, shadow: Shadow) -> list[Probe]:
        none = (
            "tlens: no probe texts were given, so only repeated blocks are run; pass probes=[...] "
            "or train_dataset=."
        )
        return self._probes_for(shadow, self._data, self._tokenizer, none=none)

    def _read_saved(self) -> Path | None:
        """Reads the log that `save` wrote, and returns the path of the other file it wrote."""
        if self._resume_from is None:
            return None
        path, log = (self._resume_from / self._file(kind) for kind in ("memory", "log.json"))
        if missing := [file for file in (path, log) if not file.exists()]:
            raise ValueError(
                f"{self._resume_from} has no {missing[0].name}, which tracer.save(folder) writes. "
                f"Without resume_from, changes are measured from this step on."
            )
        try:
            self._log += json.loads(log.read_text())
        except ValueError as error:
            raise ValueError(
                f"{log} is incomplete or damaged: {error}. Without resume_from the loop can go on; "
                f"changes are then measured from this step on."
            ) from error
        return path

    def _file(self, kind: str) -> str:
        return f"{self.settings.name}.{kind}"

    @property
    def _run_identity(self) -> str:
        """Identifies this run by its step and what was logged last."""
        return json.dumps([self._step, self._log[-100:]], sort_keys=True)

    def _check_entered(self, what: str) -> None:
        if not self._entered:
            raise ValueError(
                f"tracer.{what}() belongs inside the block: with Tracer(...) as tracer: ..."
            )


def _is_parallel(model: nn.Module) -> bool:
    """Whether several processes train this model together."""
    # DDP and DeepSpeed's engine keep the model under this name.
    wrapped = not isinstance(model, PreTrainedModel) and "module" in model._modules
    return wrapped or sharded(model) is not None


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Turns off the autocast that a loop may have turned on around its whole step."""
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
        yield


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError(
            "The tracer counts the steps itself; Tracer(step=...) sets where it begins to count."
        )
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tracer.step() takes numbers, got {name}={value!r}.") from error
