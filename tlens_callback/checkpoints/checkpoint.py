"""`Checkpoint`: a saved model, found in a directory or under a hub name."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlens_callback.checkpoints.files import (
    adapter_config,
    adapter_weights,
    check_model,
    checkpoints_of,
    is_adapter,
    read_json,
    same_place,
    shapes,
    step_of,
)

logger = logging.getLogger("tlens_callback")


@dataclass(frozen=True)
class Checkpoint:
    """A saved model: a full model, or an adapter with its base.

    A place is a directory, or the name of a repository on the Hub: NAME or NAME@REVISION.

    Attributes:
        model: place of the full model, or of the base if there is an adapter.
        adapter: place of the adapter.
        trained: False for the adapter as it was before training. The loaded model then equals the
            base and already has the adapter's layers, so its shadow can follow to the trained one.
    """

    model: str
    adapter: str | None = None
    trained: bool = True

    @classmethod
    def of(
        cls, model: str | Path, adapter: str | Path | None = None, *, base: str | Path | None = None
    ) -> "Checkpoint":
        """Makes a checkpoint of what a user named, and checks the files without reading weights.

        Args:
            model: place of a full model, or of an adapter whose config names its base.
            adapter: place of an adapter to put on `model`.
            base: place of an adapter's base, if its config does not name the right place.

        Raises:
            ValueError: if there is no model, or only a part of one; the text says what was found.
        """
        places = [None if p is None else str(Path(p).expanduser()) for p in (model, adapter, base)]
        given, over, under = places
        assert given is not None
        if over is None and is_adapter(given):
            over, given = given, under
        elif over is not None and under is not None:
            raise ValueError(
                f"The adapter {over!r} can have only one base, and both {given!r} and the base "
                f"{under!r} are given. Give one of them."
            )
        if over is None:
            assert given is not None
            check_model(given)
            return cls(given)
        config = adapter_config(over)
        shapes(adapter_weights(over))
        return cls(_base(over, config, given), over)

    @property
    def path(self) -> str:
        """Place of what was trained: the adapter, or else the full model."""
        return self.adapter or self.model

    @property
    def step(self) -> int | None:
        """The optimizer step, from the name `checkpoint-<step>` or from the trainer's state.

        None if neither has it.
        """
        step = step_of(Path(self.path))
        if step is None:
            saved = self._state.get("global_step")
            step = saved if type(saved) is int and saved >= 0 else None
        return step

    @property
    def logged(self) -> list[Mapping[str, Any]]:
        """What the trainer had logged by then; empty if it saved no state."""
        rows = self._state.get("log_history")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def _state(self) -> dict[str, Any]:
        file = Path(self.path) / "trainer_state.json"
        if not file.is_file():
            return {}
        try:
            return read_json(file)
        except ValueError as error:
            logger.warning("tlens: going on without what the trainer logged: %s", error)
            return {}

    @property
    def before_training(self) -> "Checkpoint":
        """The base with this adapter untrained; see `Loader.untrained`."""
        assert self.adapter is not None
        return replace(self, trained=False)


def _base(adapter: str, config: Mapping[str, Any], given: str | None) -> str:
    """Finds the place of an adapter's base, and checks the base."""
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    place = given or named
    if not place:
        raise ValueError(
            f"The adapter {adapter!r} does not say what its base is. Name it with --base (base=)."
        )
    if given is None and revision and not Path(place).is_dir():
        place = f"{place}@{revision}"
    try:
        stacked = is_adapter(place)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"{error} The adapter {adapter!r} names it as its base. If the base has moved, name "
            f"its new place with --base (base=)."
        ) from error
    if given and named and not same_place(named, given) and Path(named).name != Path(given).name:
        logger.warning(
            "tlens: the adapter %s was trained on %s; %s is used instead.", adapter, named, given
        )
    if stacked:
        raise ValueError(
            f"The base {place!r} is itself an adapter. Merge it into its own base "
            f"(merge_and_unload), save the result, and name it with --base (base=)."
        )
    check_model(place)
    return place


def survey(
    run: str | Path, *, base: str | Path | None = None
) -> tuple[list[Checkpoint], dict[Path, str]]:
    """Finds the `checkpoint-<step>` folders of a trainer's output directory, sorted by step.

    Returns:
        The checkpoints that can be loaded; and folder -> reason for those that cannot. A run that
        was killed while it saved leaves an incomplete checkpoint.

    Raises:
        ValueError: if there is no such directory, or no checkpoint in it that can be loaded.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"A run is the output directory of a trainer, but {str(run)!r} {what}.")
    folders = checkpoints_of(folder)
    whole: list[Checkpoint] = []
    left_out: dict[Path, str] = {}
    for one in folders.values():
        try:
            whole.append(Checkpoint.of(one, base=base))
        except ValueError as error:
            left_out[one] = str(error)
    if not folders:
        inside = sorted(one.name for one in folder.iterdir())
        raise ValueError(
            f"{str(run)!r} has no checkpoint-<step> in it. "
            + (f"It contains {', '.join(inside[:8])}." if inside else "It is empty.")
        )
    if not whole:
        raise ValueError(
            f"None of the checkpoints can be loaded. The first error: "
            f"{next(iter(left_out.values()))}"
        )
    return whole, left_out


def checkpoints_in(run: str | Path, *, base: str | Path | None = None) -> list[Checkpoint]:
    """The checkpoints of a trainer's output directory that can be loaded, sorted by step.

    Raises:
        ValueError: as `survey`.
    """
    return survey(run, base=base)[0]
