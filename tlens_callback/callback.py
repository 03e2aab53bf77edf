"""`TLensCallback`: decides when to observe, and gives the trainer's objects to the observer."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Unpack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tlens_callback.probes import Probe
from tlens_callback.probes.builtin import training_rows
from tlens_callback.rollouts import Look, Recorder, Rollouts
from tlens_callback.rollouts.recorder import updates_in_backward
from tlens_callback.run.guard import guarded
from tlens_callback.run.printing import print_lines
from tlens_callback.run.settings import Options, Settings
from tlens_callback.run.terminal import summary
from tlens_callback.run.trainer_logs import is_summary
from tlens_callback.shadow import Shadow
from tlens_callback.sinks.default import default_sinks
from tlens_callback.watcher import Watcher


class TLensCallback(TrainerCallback, Watcher):
    """Looks inside a model while a Hugging Face trainer trains it, without changing the training.

    It observes at step 0, every `every_n_steps` steps and at the last step. An observation copies
    the current weights (adapters merged) into a hooked shadow of the model and runs the probes
    through the shadow once; the instruments measure, and the sinks write what they measured.

    Args:
        probes: the texts to run, or the path of a file that `read_probes` reads. None: the first
            rows of the training data.
        settings: instruments, sinks, watch, every_n_steps, budget, repeats, device, dtype,
            weights, on_error, writing, name and rollouts, as
            `tlens_callback.run.settings.Settings` explains them.

    Raises:
        ValueError: here or when training begins, if something cannot work; the text says what to
            do.
        FidelityError: when training begins, if the shadow does not compute what the model does.

    In a run of several processes every one has the callback, and only rank 0 observes. The others
    help it where the model is sharded, and wait for it where it is not.

    Keys:
        cost/<what>, fidelity/<what>: see `Observer`.
        trainer/<name>: [update], as logged; what the trainer itself logged after the previous
            observation, up to and including the observed step.

    Attributes:
        sinks: where the readings go, including sinks that failed and were set aside. The default
            sinks are chosen when training begins.
        recorder: the rollouts, as the reward functions see them.
    """

    __signature__ = signature(Settings)  # help() shows it

    def __init__(
        self,
        probes: Sequence[Probe] | str | os.PathLike[str] | None = None,
        **settings: Unpack[Options],
    ) -> None:
        Watcher.__init__(self, Settings(probes, **settings))
        self.name = self.settings.name
        self.recorder = Recorder()
        self._batch_size = 0
        self._looked = -1

    def attach(self, trainer: Any) -> "TLensCallback":
        """Lets the callback see what a trainer with reward functions samples: its rollouts.

        `TLensCallback(...).attach(trainer)` is enough: the callback is added to those of the
        trainer if it is not among them. At each observation it looks at the rollouts that were
        sampled with the weights of this step, before they are trained on; `rollouts=Rollouts(...)`
        says at how many. The reward functions are called as before; while the trainer trains,
        each is in its list with a function around it that listens, and afterwards as it was.

        In a run of several processes every one calls it, and those of rank 0 are looked at.

        Args:
            trainer: TRL's GRPOTrainer or RLOOTrainer, or another with a list `reward_funcs`.

        Returns:
            The callback itself.

        Raises:
            ValueError: if the trainer has no reward functions, or the callback has a trainer.
        """
        self.recorder.attach(trainer)
        if not any(one is self for one in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        return self

    def reward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a reward function so that the callback sees the rollouts: another way than
        `attach`, for a trainer of your own. `reward_funcs=[look.reward(f), look.reward(g)]`.

        What is not an argument of a reward function stays unknown: the exact ids of a prompt are
        those that the tokenizer writes, and advantages come from the trainer's settings.
        """
        return self.recorder.reward(function)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.recorder.stop()  # of a training that was interrupted
        self._looked = -1
        after = self._look_settings.after_update
        self._meet(model, state.global_step, attached=bool(self.recorder), after_update=after)
        self._begin(
            lambda: self._start(args, state, model, processing_class, train_dataloader),
            first=state.is_world_process_zero,
        )
        self.recorder.listen(model)
        if self.recorder and updates_in_backward(args):
            self.recorder.before_training_passes(partial(self._look_before_update, args, state))

    def _start(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: Any,
        processing_class: Any,
        train_dataloader: Any,
    ) -> None:
        """Begins to watch; only rank 0 does."""
        # All callbacks of one trainer share this state. The attribute is not saved with it.
        if vars(state).setdefault(f"_{self.name}_callback", id(self)) != id(self):
            raise ValueError(
                f"Two callbacks of one trainer are named {self.name!r} and would write the same "
                f"files. Give one of them another name=."
            )
        # A trainer that searches for a batch size starts again on the same model with a smaller
        # one. Any other observer that is still here belongs to a run that was interrupted.
        size, before = state.train_batch_size or 0, self._batch_size
        self._batch_size = size
        retry = args.auto_find_batch_size and size < before
        if self.observer and not (retry and self.observer.model is model):
            self.observer.close()
            self.observer = None
        observer = self.observer or self._new_observer(lambda: default_sinks(args, self.name))
        if self.recorder or self.settings.rollouts:
            observer.looking.look = Look(self._look_settings, self.recorder)
        self._join_wandb()

        def probes(shadow: Shadow) -> list[Probe]:
            none = (
                "tlens: no probe texts were found in the training data, so only repeated blocks "
                "are run; pass probes=[...]."
            )
            return self._probes_for(shadow, train_dataloader, processing_class, none=none)

        if not observer.watching:
            print_lines([f"tlens: building a shadow of the {type(model).__name__}"])
        try:
            observer.start(
                model,
                processing_class,
                probes,
                step=state.global_step,
                baselines_file=self._resumed_baselines_file(args, state),
                run=_run_identity(state),
                about=_trial(state),
                training=training_rows(train_dataloader, processing_class),
                logged=state.log_history,
                dataset=getattr(train_dataloader, "dataset", None),
            )
        except BaseException:
            self.observer = None
            raise
        self._greet(args)

    @guarded
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        watching = self.observer is not None and self.observer.watching
        if watching:
            self._join_later_wandb()
        step = state.global_step
        if self._looks_at(step - 1) and self._look_settings.after_update:
            self._together(lambda of: of.look_after_update())
        last = control.should_training_stop or step >= state.max_steps
        by_epoch = last and "epoch" in (args.logging_strategy, args.eval_strategy)
        # The trainer logs this step later; the observation waits for what it logs.
        hold = control.should_log or control.should_evaluate or by_epoch
        self._after_update(step, observe=self._is_time(step), last=last, hold=hold)
        if self.observer is not None and watching and last and not hold:
            self.observer.finish()

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.observer is not None and not self._looks_at(state.global_step):
            self.observer.hand_over()

    @guarded
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look_before_update(args, state)

    @guarded
    def _look_before_update(self, args: TrainingArguments, state: TrainerState) -> None:
        step = state.global_step
        if self._looks_at(step) and self._looked != step:
            self._looked = step
            self._together(lambda of: of.look_before_update(args, step))

    @property
    def _look_settings(self) -> Rollouts:
        return self.settings.rollouts or Rollouts()

    def _looks_at(self, step: int) -> bool:
        """Whether the rollouts sampled with the weights of this step are looked at; the answer of
        all processes is the same."""
        if not self.recorder:
            return False
        if self.ranks is not None:
            return self.ranks.watching and step in self.ranks.steps
        return self.observer is not None and step in self.observer.steps

    @guarded
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._observe_last(state, control)
        if self.observer and control.should_training_stop:
            if not (control.should_log or control.should_evaluate):
                self.observer.finish()

    @guarded
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The trainer logs its summary before it calls `on_train_end` and before it loads the best
        # checkpoint's weights.
        over = control.should_training_stop or state.global_step >= state.max_steps
        if over and is_summary(logs or {}):
            self._observe_last(state, control)
            if self.observer is not None:
                self.observer.finish()

    @guarded
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._observe_last(state, control)
        if self.observer is not None:
            self.observer.remember(
                self._baselines_file(args, state),
                step=state.global_step,
                run=_run_identity(state),
                shares=True,
            )

    def _observe_last(self, state: TrainerState, control: TrainerControl) -> None:
        """Makes the last observation of a run that was stopped after this step's `on_step_end`.

        Early stopping stops a run during an evaluation. `on_train_end` is too late: by then the
        model may hold the best checkpoint's weights.
        """
        if control.should_training_stop and self._lacks(state.global_step):
            self._after_update(state.global_step, observe=True, last=True, hold=True)

    @guarded
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.load_best_model_at_end:
            self._observe_last(state, control)
        self._part()
        self.recorder.stop()
        observer, self.observer = self.observer, None
        if observer is None:
            return
        try:
            observer.close()
        finally:
            print_lines(summary(observer))

    def _baselines_file(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The file in the checkpoint of this step that holds what instruments keep."""
        return _checkpoint(args, state) / f"{self.name}.memory"

    def _resumed_baselines_file(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The file that `_baselines_file` names, in the checkpoint that the run resumes from; None
        for a run that begins.

        `train` does not tell callbacks which checkpoint that is.
        """
        if not state.global_step:
            return None
        usual = self._baselines_file(args, state)
        given = Path(str(args.resume_from_checkpoint or usual.parent)) / usual.name
        return given if given.exists() else usual


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of this step: where the trainer has just saved it, if it has.

    A hyperparameter search saves into a folder for each trial, which it does not tell callbacks.
    """
    output, name = Path(args.output_dir or "."), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not state.is_hyper_param_search:
        return output / name
    folders = [output / name, *output.glob(f"*/{name}")]
    saved = [at for at in folders if (at / TRAINER_STATE_NAME).exists()]
    times = {at: (at / TRAINER_STATE_NAME).stat().st_mtime_ns for at in saved}
    return max(saved, key=times.__getitem__, default=output / name)


def _trial(state: TrainerState) -> dict[str, Any]:
    """What sinks are told of the trial of a hyperparameter search; nothing outside of one."""
    if not state.is_hyper_param_search:
        return {}
    return {"trial": {"name": state.trial_name, "parameters": state.trial_params}}


def _run_identity(state: TrainerState) -> str:
    """Identifies the run of a checkpoint by what was logged last.

    Another callback may have put rows there that are not the trainer's; only dicts count, and their
    keys as the texts that the checkpoint holds.
    """
    rows = [row for row in state.log_history[-100:] if isinstance(row, dict)]
    texts = [{str(name): value for name, value in row.items()} for row in rows]
    return json.dumps(texts, sort_keys=True, default=str)
