"""How far a replay has come, beside its store, so that it goes on after whatever stopped it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tlens_callback.offline.stages import Stage
from tlens_callback.run.printing import print_lines
from tlens_callback.store.atomic import write_whole
from tlens_callback.store.format import is_store, scores_file, steps_in
from tlens_callback.store.numbered import newest, unused

RECORD = "replay.json"


class Record:
    """What was asked for, and the steps that are completely written.

    A step is added after the store has it, and after the file with the instruments' baselines: what
    is killed in between does that step again, with the baselines of before.

    Attributes:
        path: directory of the store.
        asked: what was asked for.
        seen: step -> `stamp` of the checkpoint, for the steps that are done.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], seen: Mapping[int, str]) -> None:
        self.path, self.asked, self.seen = path, asked, dict(seen)

    def baselines_file(self, step: int) -> Path:
        """Where the baselines are, as they were after a step."""
        return self.path / f"replay-{step:08d}.memory"

    def left(self, stages: Sequence[Stage]) -> tuple[Sequence[Stage], Path | None]:
        """The stages to be observed, and the baselines to go on from; None: from the beginning."""
        done = sorted(self.seen)
        if not done:
            return stages, None
        if stages[-1].step <= done[-1] and not self.changed(stages[-1]):
            return [], None
        at = done[-1]
        # As the last one it was shown to all instruments; among others it is not.
        if any(stage.step == at for stage in stages) and len(done) > 1:
            at = done[-2] if self.baselines_file(done[-2]).exists() else at
        return [stage for stage in stages if stage.step > at], self.baselines_file(at)

    def changed(self, stage: Stage) -> bool:
        """Whether a step is done whose checkpoint is another one now."""
        return stage.step in self.seen and self.seen[stage.step] != stamp(stage)

    def can_redo(self, stage: Stage) -> bool:
        """Whether it is the last that is done, and can be done anew."""
        before = [step for step in self.seen if step < stage.step]
        return (
            bool(before)
            and stage.step == max(self.seen)
            and self.baselines_file(max(before)).exists()
        )

    def begin(self) -> None:
        """Makes the directory; removes a first step that is there and was not completed."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.seen:
            for step in steps_in(self.path / "scores"):
                scores_file(self.path, step).unlink()
        self._write()

    def add(self, stage: Stage, *, last: bool) -> None:
        """A step is done; its baselines are written.

        Args:
            last: the baselines of before are kept too: see `left`.
        """
        earlier = [step for step in self.seen if step < stage.step]
        self.seen = {step: self.seen[step] for step in earlier} | {stage.step: stamp(stage)}
        self._write()
        kept = {stage.step, *([max(earlier)] if last and earlier else [])}
        for file in self.path.glob("replay-*.memory"):
            if file not in {self.baselines_file(step) for step in kept}:
                file.unlink()

    def _write(self) -> None:
        about = {"asked": self.asked, "seen": self.seen}
        write_whole(self.path / RECORD, json.dumps(about, indent=1).encode())


def choose(base: Path, asked: Mapping[str, Any], stages: Sequence[Stage]) -> Record:
    """The record of the last store `<base>`, `<base>-2`, ... if it can be gone on with; of the next
    one otherwise, and a line says why."""
    number, path = newest(base, lambda path: is_store(path) or (path / RECORD).exists())
    asked = json.loads(json.dumps(asked))
    if not (is_store(path) or (path / RECORD).exists()):
        return Record(path, asked, {})
    record = _read(path)
    if record is not None and not record.seen and len(steps_in(path / "scores")) < 2:
        return Record(path, asked, {})
    why = "it is of no replay" if record is None else _other(record, asked, stages)
    if record is not None and not why:
        return record
    path = unused(base, number)
    print_lines([f"tlens: a new store {path.name}, since there is another beside it: {why}"])
    return Record(path, asked, {})


def _read(path: Path) -> Record | None:
    try:
        about = json.loads((path / RECORD).read_text())
        return Record(path, about["asked"], {int(k): v for k, v in about["seen"].items()})
    except (OSError, ValueError, KeyError):
        return None


def _other(record: Record, asked: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    """Why a store is not to be gone on with; empty where it is."""
    names = [name for name in asked if record.asked.get(name) != asked[name]]
    # One that was moved has the same checkpoints elsewhere.
    if any(stage.step and record.seen.get(stage.step) == stamp(stage) for stage in stages):
        names = [name for name in names if name != "run"]
    if names:
        return f"of another {' and '.join(names)}"
    for stage in stages:
        # The last may have been seen while it was being saved.
        if record.changed(stage) and not record.can_redo(stage):
            return f"{stage.name} has changed since"
    if set(record.seen) - set(steps_in(record.path / "scores")):
        return "it lacks steps that were in it"
    if not record.baselines_file(max(record.seen)).exists():
        return f"it lacks {record.baselines_file(max(record.seen)).name}"
    return ""


def stamp(stage: Stage) -> str:
    """What tells a checkpoint from others that are saved under its name: sizes and times."""
    place = Path(stage.checkpoint.path if stage.step else stage.checkpoint.model)
    kinds = "*.safetensors", "*.bin", "trainer_state.json"
    files = [file for kind in kinds for file in place.glob(kind)]
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps(sorted(about)) if about else str(place)


def watched_in(checkpoint: Path) -> str | None:
    """The precision in which a training run was watched, as the callback or the tracer noted it
    beside its checkpoint; None where it was not watched."""
    for file in checkpoint.glob("*.memory"):
        try:
            with safe_open(file, "pt") as opened:
                return (opened.metadata() or {}).get("another precision")
        except (OSError, SafetensorError):
            continue
    return None
