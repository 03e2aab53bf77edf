"""Two saved models, side by side: what B does that A does not."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from tlens_callback.offline.stages import Stage, look_at, with_what_is_there
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
    """The readings of A and of B, of which those of B are relative to A.

    Attributes:
        names: of A and of B.
        first, last: the readings of A and of B.
        left_out: sentences about what the two do not have in common.
    """

    names: tuple[str, str]
    first: Sequence[Reading]
    last: Sequence[Reading]
    left_out: tuple[str, ...] = ()

    def write(self, sink: Sink) -> None:
        """A's readings at step 0 and B's at step 1; the sink is closed."""
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
    """Looks at A, then at B, with one set of instruments, so that what they measure against the
    first observation (drift, changes, ratios) is of B against A.

    The probes are encoded once, with B's tokenizer, or A's where B has none, and both models get
    these ids; where both have one, it is checked that the ids mean the same tokens. Where A is the
    base of B's adapter, the base is loaded once. Nothing is written.

    Of the default instruments those are left out that need what there is not: a training run that
    goes on; two adapters over one base, or, for what compares weights, two models without adapters.

    Args:
        names: what they are called in `checkpoint/name`. None: where they are.
        tokenizer: for the probes, instead of theirs.

    Raises:
        ValueError: models of different shapes or tokens, or what `look_at` raises for.
        FidelityError: where a shadow is not its model.
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
            pass  # An adapter that began with random values: the base is seen by itself.
    adapters = [one for one in (base, b) if one.adapter is not None]
    there = Needs.BLOCKS | Needs.TARGET | Needs.EARLIER
    if len(adapters) == 2 and same_place(base.model, b.model):
        there |= Needs.ADAPTER | Needs.SAME_WEIGHTS
    elif not adapters:
        there |= Needs.SAME_WEIGHTS
    kept = with_what_is_there(arguments.instruments or (), there)
    arguments = replace(arguments, instruments=kept)
    memory = MemorySink()
    stages = [Stage(0, base, names[0]), Stage(1, b, names[1])]
    dtypes: list[str] = []

    def seen(observer: Observer, stage: Stage) -> None:
        assert observer.shadow is not None
        dtypes.append(str(observer.shadow.dtype).removeprefix("torch."))

    look_at(stages, loader, arguments, [memory], tokenizer=tokenizer, seen=seen)
    if len(set(dtypes)) > 1:
        logger.warning(
            "tlens: A was computed in %s and B in %s: some of what differs is the rounding of "
            "computing, which is alike with --dtype float32.",
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
    # The models' own limits are checked when they are there.
    batch = ProbeBatch.encode(probes, of_b, vocab_size=2**31)
    answers = [token for token in (*batch.targets, *batch.foils) if token is not None]
    ids = sorted({*batch.tokens[batch.mask].tolist(), *answers})
    for token, one, other in zip(
        ids, of_a.convert_ids_to_tokens(ids), of_b.convert_ids_to_tokens(ids), strict=True
    ):
        if one != other:
            raise ValueError(
                f"{a.path} and {b.path} have different tokenizers: token {token} is {one!r} for "
                f"the one and {other!r} for the other, so that no probe is the same text for both."
            )
    return of_b


def differences(store: Store) -> str:
    """What differs most between the A and the B of a store that a `Pair` was written to.

    Plain text of 72 columns:

    - where no number differs: that, and nothing else.
    - heads whose attention, and parts whose activations, are farthest apart.
    - every head that has a role in one and not in the other: `roles_taken`, by the thresholds of
      `Watch`, but eight at most of each kind.
    - per probe P(target) and its rank; its mean loss, with the tokens whose loss differs most; the
      heads and MLPs whose direct attribution differs most.
    """
    history = History(store)
    if not changed_keys(history, 1):
        return "Nothing differs: A and B have the same numbers throughout."
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
            said = f"Loss of {probe}, nats a token: {arrow(mean, same=same)}"
            lines.append(paragraph(f"{said}; differs most: {most}" if most else said))
    for probe in attributed(history):
        if changes := changed_writers(history, probe, 4):
            parts = [(one.what, one.last - one.first) for one in changes]
            said = f"Direct attribution of {probe}, B - A: {listed(parts, '+.3g')} (logits)"
            lines.append(paragraph(said))
    return "\n".join(lines or unknown(history))


def page_address(sink: LocalSink, store: Store) -> str:
    """Of the page, opened on B beside A at the head whose attention differs most."""
    show: dict[str, Any] = {"step": 1, "other": 0}
    if heads := moved_heads(History(store), 1):
        layer, head = heads[0][0][1:].split("H")
        show["head"] = f"{layer}.{head}"
    return f"{sink.page().resolve().as_uri()}#{urlencode(show)}"
