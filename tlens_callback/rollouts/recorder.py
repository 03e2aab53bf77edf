"""`Recorder`: keeps what a trainer's reward functions are given, and what they return."""

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("tlens_callback")

Reward = Callable[..., Any]


@dataclass(eq=False)
class Generation:
    """The completions that one process has sampled at once, in the order of the reward functions.

    Attributes:
        prompts: texts, or lists of chat messages; the rollouts of a group have equal ones.
        completions: texts, or lists of chat messages.
        ids: the token ids of each completion, as they were sampled.
        step: the optimizer steps done when they were sampled; None if the trainer does not say.
        rewards: number of a reward function -> what it gave each completion, NaN for None.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    ids: Sequence[Sequence[int]]
    step: int | None = None
    rewards: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class Recorder:
    """Listens to the reward functions of a trainer, which see every completion that it samples.

    A function is called as before, with the same arguments, and what it returns or raises reaches
    the trainer unchanged. What is kept are references, of the latest generation only. Generations
    of an evaluation are left out.

    Attributes:
        latest: the latest generation; None before the first.
        trainer: the trainer whose functions are listened to; None if they were wrapped one by one.
        names: the names of the reward functions.
    """

    def __init__(self) -> None:
        self.latest: Generation | None = None
        self.trainer: Any = None
        self.names: list[str] = []
        self.model: nn.Module | None = None
        self._given: Any = None
        self._waiting: dict[int, Tensor] = {}
        self._undo: list[Callable[[], object]] = []

    def __bool__(self) -> bool:
        return bool(self.names)

    def attach(self, trainer: Any) -> None:
        """Takes a trainer, which has its reward functions in a list `reward_funcs`, to listen to.

        Raises:
            ValueError: if it has none, or is listened to already.
        """
        functions = getattr(trainer, "reward_funcs", None)
        if not isinstance(functions, list) or not functions:
            raise ValueError(
                f"attach() takes a trainer with reward functions, such as TRL's GRPOTrainer or "
                f"RLOOTrainer, and a {type(trainer).__name__} has no list reward_funcs. Wrap the "
                f"functions of a trainer of your own: reward_funcs=[look.reward(f)]."
            )
        if self:
            raise ValueError(
                "This callback listens to reward functions already. Attach it once, to one "
                "trainer; another trainer needs another callback."
            )
        self.trainer = trainer
        names = getattr(trainer, "reward_func_names", None)
        self.names = [*(names or map(_name_of, functions))]

    def listen(self, model: nn.Module) -> None:
        """Begins to listen to the trainer's functions, while it trains this model."""
        self.stop()
        self.model = model
        functions = [] if self.trainer is None else self.trainer.reward_funcs
        if functions and all(isinstance(one, nn.Module) for one in functions):
            self._listen_to_trainer(self.trainer)
        for i, function in enumerate(functions):
            if isinstance(function, nn.Module):
                # The trainer asks whether it is a module, so that it cannot be wrapped.
                hook = function.register_forward_hook(functools.partial(self._model_answers, i))
                self._undo.append(hook.remove)
            else:
                functions[i] = self._listening(function, i)
                self._undo.append(functools.partial(_put_back, functions, functions[i], function))

    def before_training_passes(self, act: Callable[[], object]) -> None:
        """Acts before each forward pass that is trained on, until `stop`.

        For a trainer that updates the weights while it goes backward: `on_pre_optimizer_step` is
        too late there.
        """

        def call(module: nn.Module, _: Any) -> None:
            if module.training and torch.is_grad_enabled():
                act()

        assert self.model is not None
        # A compiled model would be compiled anew, with all that is done here inside it.
        apart: Any = torch.compiler.disable(call)
        self._undo.append(self.model.register_forward_pre_hook(apart).remove)

    def reward(self, function: Reward) -> Reward:
        """Returns the function, listened to."""
        self.names.append(_name_of(function))
        return self._listening(function, len(self.names) - 1)

    def stop(self) -> None:
        """Gives the trainer its functions back, and forgets the latest generation."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.latest = self._given = self.model = None
        self._waiting.clear()

    def _listening(self, function: Reward, i: int) -> Reward:
        def listened(*args: Any, **kwargs: Any) -> Any:
            of = self._begin(kwargs)
            found = function(*args, **kwargs)
            self._answered(of, i, found)
            return found

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            of = self._begin(kwargs)
            found = await function(*args, **kwargs)
            self._answered(of, i, found)
            return found

        return functools.update_wrapper(awaited if _is_async(function) else listened, function)

    def _listen_to_trainer(self, trainer: Any) -> None:
        """Reward models are not told what they judge; TRL's own method that asks them all is."""
        usual = getattr(trainer, "_calculate_rewards", None)
        known = ["inputs", "prompts", "completions", "completion_ids_list"]
        if usual is None or [*inspect.signature(usual).parameters] != known:
            logger.warning(
                "tlens: no rollouts are looked at: all rewards come from models, and this version "
                "of TRL asks them in another way than TRL 1.16. A reward function beside them "
                "helps, with the weight 0."
            )
            return

        def asked(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            given = dict(zip(("prompts", "completions"), (prompts, completions), strict=True))
            self._begin(
                {**given, "completion_ids": completion_ids_list, "trainer_state": trainer.state}
            )
            return usual(inputs, prompts, completions, completion_ids_list)

        trainer._calculate_rewards = asked
        self._undo.append(lambda: vars(trainer).pop("_calculate_rewards", None))

    @property
    def _trains(self) -> bool:
        """Whether the trainer samples for training; it asks its model in the same way."""
        model = self.model if self.trainer is None else self.trainer.model
        return model is None or model.training

    def _begin(self, given: dict[str, Any]) -> Generation | None:
        """The generation that a function is asked about; all functions get the same list of ids."""
        ids = given.get("completion_ids")
        if not self._trains or not isinstance(ids, Sequence):
            return None
        if self.latest is None or self._given is not ids:
            step = getattr(given.get("trainer_state"), "global_step", None)
            self._given = ids
            self.latest = Generation(
                _listed(given.get("prompts"), len(ids)),
                _listed(given.get("completions"), len(ids)),
                [*ids],
                step,
                dict(self._waiting),
            )
            self._waiting.clear()
        return self.latest

    def _answered(self, of: Generation | None, i: int, found: Any) -> None:
        if of is not None and (rewards := _numbers(found)) is not None and len(rewards) == len(of):
            of.rewards[i] = rewards

    def _model_answers(self, i: int, module: nn.Module, given: Any, found: Any) -> None:
        """A reward model is not told what the completions are: its numbers wait for who is."""
        del module, given
        logits = getattr(found, "logits", None)
        if not self._trains or not isinstance(logits, Tensor) or logits.ndim != 2:
            return
        rewards = logits[:, 0].detach().float().cpu().clone()
        of = self.latest
        if of is not None and i not in of.rewards and len(of) == len(rewards) and not self._waiting:
            of.rewards[i] = rewards
        else:
            self._waiting[i] = rewards


def updates_in_backward(args: Any) -> bool:
    """Whether the weights change before `on_pre_optimizer_step`: DeepSpeed's engine updates them
    when it goes backward, and so do optimizers that free each gradient at once."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    at_once = "layerwise" in optimizer or "lomo" in optimizer
    return at_once or getattr(args, "deepspeed_plugin", None) is not None


def _listed(given: Any, n: int) -> list[Any]:
    """A list of n, whatever a trainer of somebody's own gives its reward functions."""
    known = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == n
    return list(given) if known else [None] * n


def _numbers(found: Any) -> Tensor | None:
    """What a reward function returned, as numbers; None if it is not a list of them.

    An iterator is left alone: who reads it takes it from the trainer.
    """
    try:
        if isinstance(found, Tensor):
            found = found.tolist()
        if not hasattr(found, "__len__") or isinstance(found, str | dict):
            return None
        return torch.tensor(
            [float("nan") if one is None else float(one) for one in found], dtype=torch.float32
        )
    except (TypeError, ValueError, OverflowError):
        return None


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _put_back(functions: list[Any], listened: Any, function: Any) -> None:
    """In the place where the wrapper still is: somebody may have exchanged or moved it."""
    for i, one in enumerate(functions):
        if one is listened:
            functions[i] = function
