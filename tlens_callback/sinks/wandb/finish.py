"""`BeforeFinish`: calls a function just before a W&B run is finished, whoever finishes it."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any


class BeforeFinish:
    """Calls `act` when the run is about to be finished and can still log.

    wandb 0.31 has no public way to do this, so `act` goes into its private list of teardown hooks,
    which `wandb.finish()` and the end of `with wandb.init()` call too. If that list does not exist,
    the run's `finish` is wrapped, which those two do not call.
    """

    def __init__(self, run: Any, act: Callable[[], None]) -> None:
        self.run, self._hook, self._wrapped = run, None, None
        try:
            from wandb.sdk.wandb_run import TeardownHook, TeardownStage

            hook = TeardownHook(call=act, stage=TeardownStage.EARLY)
            run._teardown_hooks.append(hook)
            self._hook = hook
        except (ImportError, AttributeError):
            finish = getattr(run, "finish", None)
            if finish is None:
                return

            def finish_after(*args: Any, **kwargs: Any) -> Any:
                self.remove()
                act()
                return finish(*args, **kwargs)

            run.finish = self._wrapped = finish_after

    def remove(self) -> None:
        """Restores the run as it was. It may be called twice."""
        hook, self._hook = self._hook, None
        if hook is not None:
            # By identity: two sinks may have added equal hooks.
            self.run._teardown_hooks[:] = [h for h in self.run._teardown_hooks if h is not hook]
        wrapped, self._wrapped = self._wrapped, None
        if wrapped is not None and vars(self.run).get("finish") is wrapped:
            with suppress(AttributeError):
                del self.run.finish
