"""Compares two saved models, A and B, and describes how B differs from A."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any
from urllib.parse import urlencode

from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.checkpoints.adapters import UnknownStart
from tlens_callback.checkpoints.files import same_place
from tlens_callback.events import Watch
from tlens_callback.interfaces import Sink
from tlens_callback.meaning import Needs, Quantity
from tlens_callback.offline.changes import (
    History,
    changed_keys,
    changed_tokens,
    changed_writers,
    moved_heads,
    probe_of,
    role_scores,
    roles_taken,
)
from tlens_callback.offline.stages import Stage, observe_stages, without_unmet_needs
from tlens_callback.offline.summary import (
    arrow,
    attributed,
    change_list,
    listed,
    moved,
    paragraph,
    repeats,
    targets,
    unknown,
    whole,
)
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run.observer import Observer
from tlens_callback.run.settings import Settings
from tlens_callback.sinks import LocalSink, MemorySink
from tlens_callback.store import Store

logger = logging.getLogger("tlens_callback")


@dataclass(frozen=True)
class Pair:
    """The readings of A and of B; drift and changes in the readings of B are measured from A.

    Attributes:
        names: the names of A and of B.
        first, last: the readings of A and of B.
        left_out: sentences about what the two do not have in common.
    """

    names: tuple[str, str]
    first: Sequence[Reading]
    last: Sequence[Reading]
    left_out: tuple[str, ...] = ()

    def write(self, sink: Sink) -> None:
        """Writes A's readings at step 0 and B's at step 1, and closes the sink."""
        sink.write(self.first, step=0)
        sink.write(self.last, step=1)
        sink.close()


def compare_models(
    a: Checkpoint,
    b: Checkpoint,
    loader: Loader,
    arguments: Settings,
    *,
    names: tuple[str, str] | None = None,
    tokenizer: Any = None,
) -> Pair:
    """Observes A, then B, with the same instruments, so that drift, changes and ratios compare B
    with A.

    The probes are encoded once, with B's tokenizer, or with A's if B has none, and both models get
    these token ids. If both have a tokenizer, the ids must mean the same tokens in both. If A is
    the base of B's adapter, the base is loaded once. Nothing is written.

    A default instrument is left out if it needs something that is missing: a training run in
    progress; two adapters over one base; or, if it compares weights, either these or two models
    without adapters.

    Args:
        names: their names in `checkpoint/name`. None: their paths.
        tokenizer: the tokenizer for the probes, instead of the models' own.

    Raises:
        ValueError: if the models have different shapes or tokens, and as `observe_stages`.
        FidelityError: if a shadow does not compute what its model computes.
    """
    names = names or (a.path, b.path)
    probes = arguments.prompts or []
    if tokenizer is None:
        tokenizer = _common_tokenizer(a, b, loader, probes)
    base = a
    if a.adapter is None and b.adapter is not None and same_place(a.model, b.model):
        try:
            loader.load(b.before_training)
            base = b.before_training
        except UnknownStart:
            pass  # The adapter began with random values, so the base is observed without it.
    adapters = [one for one in (base, b) if one.adapter is not None]
    available = Needs.BLOCKS | Needs.TARGET | Needs.EARLIER
    if len(adapters) == 2 and same_place(base.model, b.model):
        available |= Needs.ADAPTER | Needs.SAME_WEIGHTS
    elif not adapters:
        available |= Needs.SAME_WEIGHTS
    kept = without_unmet_needs(arguments.instruments or (), available)
    arguments = replace(arguments, instruments=kept)
    memory = MemorySink()
    stages = [Stage(0, base, names[0]), Stage(1, b, names[1])]
    dtypes: list[str] = []

    def note_dtype(observer: Observer, stage: Stage) -> None:
        assert observer.shadow is not None
        dtypes.append(str(observer.shadow.dtype).removeprefix("torch."))

    observe_stages(stages, loader, arguments, [memory], tokenizer=tokenizer, written=note_dtype)
    if len(set(dtypes)) > 1:
        logger.warning(
            "tlens: A was computed in %s and B in %s, so a part of the differences is rounding. "
            "With --dtype float32 both are rounded alike.",
            *dtypes,
        )
    first, last = (
        [at[step] for at in memory.readings.values() if step in at] for step in memory.steps
    )
    return Pair(names, first, last)


def _common_tokenizer(a: Checkpoint, b: Checkpoint, loader: Loader, probes: Sequence[Probe]) -> Any:
    of_a, of_b = loader.tokenizer(a), loader.tokenizer(b)
    if of_a is None or of_b is None or not probes:
        return of_b if of_b is not None else of_a
    # The limits of the models themselves are checked when the models are loaded.
    batch = ProbeBatch.encode(probes, of_b, vocab_size=2**31)
    answers = (*batch.target_tokens, *batch.foil_tokens)
    ids = sorted({*batch.tokens[batch.mask].tolist(), *chain(*answers)})
    for token, one, other in zip(
        ids, of_a.convert_ids_to_tokens(ids), of_b.convert_ids_to_tokens(ids), strict=True
    ):
        if one != other:
            raise ValueError(
                f"{a.path} and {b.path} have different tokenizers: token {token} is {one!r} in "
                f"the first and {other!r} in the second, so a probe is not the same text for both."
            )
    return of_b


def differences(store: Store) -> str:
    """Describes what differs most between A and B, from a store that a `Pair` was written to.

    The text is plain, of 72 columns:

    - if no number differs, it says so and nothing else.
    - heads whose attention, and parts whose activations, are farthest apart.
    - heads that have a role in one and not in the other: `roles_taken`, by the thresholds of
      `Watch`, at most eight of each kind.
    - per probe P(target) and its rank; its mean loss, with the tokens whose loss differs most; the
      heads and MLPs whose direct attribution differs most.
    """
    history = History(store)
    if not changed_keys(history, 1):
        return "Nothing differs: all numbers of A and B are the same."
    lines = [*moved(history)]
    if any(role_scores(history)):
        for what, found in zip(("gained", "lost"), roles_taken(history, Watch()), strict=True):
            lines.append(paragraph(f"Roles {what}: {change_list(found, 8) or 'none'}"))
    same = " in both"
    lines += [*repeats(history), *targets(history, same=same)]
    for key in history.keys(Quantity.PROBE_LOSS):
        probe = probe_of(key) or ""
        if mean := history.number(key):
            tokens = changed_tokens(history, probe, 4)
            most = ", ".join(whole(f"{one.what} {one.last - one.first:+.2f}") for one in tokens)
            text = f"Loss of {probe}, nats a token: {arrow(mean, same=same)}"
            lines.append(paragraph(f"{text}; differs most: {most}" if most else text))
    for probe in attributed(history):
        if changes := changed_writers(history, probe, 4):
            parts = [(one.what, one.last - one.first) for one in changes]
            text = f"Direct attribution of {probe}, B - A: {listed(parts, '+.3g')} (logits)"
            lines.append(paragraph(text))
    return "\n".join(lines or unknown(history))


def page_address(sink: LocalSink, store: Store) -> str:
    """The address of the page, opened on B beside A at the head whose attention differs most."""
    show: dict[str, Any] = {"step": 1, "other": 0}
    if heads := moved_heads(History(store), 1):
        layer, head = heads[0][0][1:].split("H")
        show["head"] = f"{layer}.{head}"
    return f"{sink.page().resolve().as_uri()}#{urlencode(show)}"
