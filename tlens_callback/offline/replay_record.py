"""Records how far a replay has come, so that it can continue after an interruption."""

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
    """What a replay was asked for, and the steps that are completely written.

    A step is added after the store has it, and after the file with the instruments' baselines is
    written: a replay that is killed in between does that step again, with the earlier baselines.

    Attributes:
        path: directory of the store.
        asked: what the replay was asked for.
        seen: step -> `stamp` of the checkpoint, for the steps that are done.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], seen: Mapping[int, str]) -> None:
        self.path, self.asked, self.seen = path, asked, dict(seen)

    def baselines_file(self, step: int) -> Path:
        """Path of the file that holds the baselines as they were after a step."""
        return self.path / f"replay-{step:08d}.memory"

    def remaining(self, stages: Sequence[Stage]) -> tuple[Sequence[Stage], Path | None]:
        """The stages to observe, and the file of baselines to continue from; None: begin anew."""
        done = sorted(self.seen)
        if not done:
            return stages, None
        if stages[-1].step <= done[-1] and not self.changed(stages[-1]):
            return [], None
        at = done[-1]
        # The last step was shown to all instruments. If later steps follow, it has to be shown
        # only to those that are due, so it is observed again.
        if any(stage.step == at for stage in stages) and len(done) > 1:
            at = done[-2] if self.baselines_file(done[-2]).exists() else at
        return [stage for stage in stages if stage.step > at], self.baselines_file(at)

    def changed(self, stage: Stage) -> bool:
        """Whether the checkpoint of a step that is done has changed since."""
        return stage.step in self.seen and self.seen[stage.step] != stamp(stage)

    def can_redo(self, stage: Stage) -> bool:
        """Whether a stage is the last one that is done and can be observed again."""
        before = [step for step in self.seen if step < stage.step]
        return (
            bool(before)
            and stage.step == max(self.seen)
            and self.baselines_file(max(before)).exists()
        )

    def begin(self) -> None:
        """Makes the directory, and removes a first step that was not completed."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.seen:
            for step in steps_in(self.path / "scores"):
                scores_file(self.path, step).unlink()
        self._write()

    def add(self, stage: Stage, *, last: bool) -> None:
        """Adds a step that is done and whose baselines are written.

        Args:
            last: also keep the baselines of the step before, which `remaining` needs.
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
    """Chooses the store to write to, and returns its record.

    It is the last of the stores `<base>`, `<base>-2`, ... if that one can be continued. Otherwise
    it is a new one, and a printed line says why.
    """
    number, path = newest(base, lambda path: is_store(path) or (path / RECORD).exists())
    asked = json.loads(json.dumps(asked))
    if not (is_store(path) or (path / RECORD).exists()):
        return Record(path, asked, {})
    record = _read(path)
    if record is not None and not record.seen and len(steps_in(path / "scores")) < 2:
        return Record(path, asked, {})
    why = "no replay made it" if record is None else _obstacle(record, asked, stages)
    if record is not None and not why:
        return record
    other, path = path.name, unused(base, number)
    print_lines(
        [f"tlens: making a new store {path.name}, because {other} cannot be continued: {why}"]
    )
    return Record(path, asked, {})


def _read(path: Path) -> Record | None:
    try:
        about = json.loads((path / RECORD).read_text())
        return Record(path, about["asked"], {int(k): v for k, v in about["seen"].items()})
    except (OSError, ValueError, KeyError):
        return None


def _obstacle(record: Record, asked: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    """Says why a store cannot be continued; empty if it can."""
    names = [name for name in asked if record.asked.get(name) != asked[name]]
    # A run that was moved has another path and the same checkpoints.
    if any(stage.step and record.seen.get(stage.step) == stamp(stage) for stage in stages):
        names = [name for name in names if name != "run"]
    if names:
        return f"another call made it, which differs in: {', '.join(names)}"
    for stage in stages:
        # The last checkpoint may have been observed while it was still being saved.
        if record.changed(stage) and not record.can_redo(stage):
            return f"{stage.name} has changed since"
    if set(record.seen) - set(steps_in(record.path / "scores")):
        return "steps are missing from it"
    if not record.baselines_file(max(record.seen)).exists():
        return f"{record.baselines_file(max(record.seen)).name} is missing from it"
    return ""


def stamp(stage: Stage) -> str:
    """Tells apart checkpoints of the same name, by the sizes and times of their files."""
    place = Path(stage.checkpoint.path if stage.step else stage.checkpoint.model)
    kinds = "*.safetensors", "*.bin", "trainer_state.json"
    files = [file for kind in kinds for file in place.glob(kind)]
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps(sorted(about)) if about else str(place)


def watched_in(checkpoint: Path) -> str | None:
    """The precision in which a training run was watched; None if it was not watched.

    The callback or the tracer noted it beside the checkpoint.
    """
    for file in checkpoint.glob("*.memory"):
        try:
            with safe_open(file, "pt") as opened:
                return (opened.metadata() or {}).get("another precision")
        except (OSError, SafetensorError):
            continue
    return None
