"""The lines that a run prints when it begins and when it ends, and for a saved model."""

from collections.abc import Mapping

from tlens_callback.instruments import AttentionPatterns
from tlens_callback.meaning import Quantity
from tlens_callback.probes import ProbeBatch, encoded_lines
from tlens_callback.reading import Reading
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import sink_lines
from tlens_callback.run.rollout_lines import rollouts_opening, rollouts_summary
from tlens_callback.shadow import Shadow

_LARGE = 64 * 2**20
"""Bytes of an observation from which on a line tells its size."""


def opening(observer: Observer) -> list[str]:
    """Says what is watched, how closely the shadow agrees with the model, and how each probe was
    encoded."""
    shadow, fidelity = observer.shadow, observer.checks[min(observer.checks)]
    assert shadow is not None and observer.batch is not None
    held = f"the shadow takes {shadow.extra_bytes / 2**20:.1f} MiB more than the model"
    if shadow.streamed:
        held += ", for one layer at a time (weights='streamed')"
    if shadow.n_owned:
        held = f"{shadow.n_owned} weights have adapters, {held}"
    elif not shadow.extra_bytes:
        held = "the shadow shares all weights of the model and copies none"
    return [
        f"tlens: watching {shadow.n_layers} layers x {shadow.n_heads} heads with "
        f"{_probe_counts(observer)}; {held}",
        f"tlens: the shadow agrees with the model: {fidelity}",
        *_sharded_lines(shadow),
        *_attention_lines(shadow),
        *encoded_lines(observer.batch),
        *_pooled_lines(observer),
        *_size_lines(observer),
        *rollouts_opening(observer),
        *sink_lines(observer.sinks),
    ]


def _sharded_lines(shadow: Shadow) -> list[str]:
    """Says how the model is sharded, if it is."""
    ranks = shadow.ranks
    if ranks is None or ranks.sharded is None:
        return []
    return [
        f"tlens: the model is sharded over {_plural(ranks.world, 'process', 'processes')} "
        f"({ranks.sharded}); rank 0 observes, and the others help it to gather a layer's weights"
    ]


def _attention_lines(shadow: Shadow) -> list[str]:
    """Says which layers have attention patterns, if not all have."""
    layers = shadow.attention_layers
    if len(layers) == shadow.n_layers:
        return []
    which = f" ({', '.join(map(str, layers))})" if layers else ""
    return [
        f"tlens: {len(layers)} of {shadow.n_layers} layers have attention patterns{which}; the "
        f"others have no attention, or none that TransformerLens's bridge has hook points for"
    ]


def _pooled_lines(observer: Observer) -> list[str]:
    """Says which probes are so long that their attention patterns are pooled."""
    shadow, batch = observer.shadow, observer.batch
    assert shadow is not None and batch is not None
    return [
        f"tlens: {one.name}: probe {probe!r} is so long that its patterns are pooled, {block} by "
        f"{block} tokens; {type(one).__name__}(most=...) or fewer layers= show more of it"
        for one in observer.instruments
        if isinstance(one, AttentionPatterns)
        for probe, block in one.pooled(shadow, batch).items()
    ]


def _size_lines(observer: Observer) -> list[str]:
    """Says how large an observation is, if it is large."""
    sizes, batch = observer.first_bytes, observer.batch
    if batch is None or sizes.total() < _LARGE:
        return []
    (name, most), *_ = sizes.most_common(1)
    longest = max(range(len(batch.probes)), key=batch.lengths.__getitem__)
    return [
        f"tlens: the readings of one observation take {sizes.total() / 2**20:.0f} MiB, "
        f"{most / 2**20:.0f} of them those of {name}, and two or three observations may be in "
        f"memory at once. The longest probe, {batch.probes[longest].name}, has "
        f"{batch.lengths[longest]} tokens: shorten it, or choose what to keep, such as "
        f"AttentionPatterns(probes=[...], layers=[...])"
    ]


def summary(observer: Observer) -> list[str]:
    """Says how much was observed, what it cost and where the readings are."""
    if not observer.steps or observer.batch is None:
        return []
    lines = [
        f"tlens: {_plural(len(observer.steps), 'observation')} of {_probe_counts(observer)} in "
        f"{observer.cost.seconds:.1f} s, {observer.cost.beforehand:.1f} of them before the first "
        f"step, {observer.cost.share:.1%} of the run; the shadow took "
        f"{observer.extra_bytes / 2**20:.1f} MiB more than the model"
    ]
    if observer.checks:
        worst = max(observer.checks.values(), key=lambda check: check.relative)
        times = _plural(len(observer.checks), "time")
        lines.append(f"tlens: shadow and model were compared {times}; the worst result: {worst}")
    if dropped := observer.writer.dropped:
        lines.append(
            f"tlens: dropped {_plural(dropped, 'observation')}, because the sinks were slower than "
            f"training; use writing='wait' or a larger every_n_steps to keep all of them"
        )
    return [*lines, *rollouts_summary(observer), *sink_lines(observer.sinks)]


def saved_model_lines(
    observer: Observer, readings: Mapping[str, Reading], *, name: str
) -> list[str]:
    """Says for a saved model whether the shadow agrees with it, and what it answers to the probes.

    Args:
        readings: the readings of the observed step, by key.
        name: the name of the model.
    """
    batch, (step,) = observer.batch, observer.steps
    assert batch is not None
    return [
        f"tlens: {name}, at step {step}: {_probe_counts(observer)} in "
        f"{observer.cost.seconds:.1f} s",
        f"tlens: the shadow agrees with the model: {observer.checks[step]}",
        *(
            f"tlens: {probe.name}: {said}"
            for row, probe in enumerate(batch.probes)
            if (said := _answer(batch, row, readings))
        ),
        *sink_lines(observer.sinks),
    ]


def _answer(batch: ProbeBatch, row: int, readings: Mapping[str, Reading]) -> str | None:
    """Says what the model predicts after a probe: the target's probability and rank if the probe
    has a target, else the likeliest tokens."""
    target = batch.targets[row]
    measured: dict[Quantity | None, Reading] = {}
    for reading in readings.values():
        if reading.probe == batch.probes[row].name:
            measured.setdefault(reading.meaning.quantity, reading)
    if target is not None:
        probability = measured.get(Quantity.ANSWER_PROBABILITY)
        rank = measured.get(Quantity.ANSWER_RANK)
        if probability and rank:
            # By layer, the last is the output.
            p, likelier = (one.values.reshape(-1)[-1] for one in (probability, rank))
            return f"P({batch.token_text(target)!r}) {p:.3f}, rank {likelier:.0f}"
        return None
    tokens = measured.get(Quantity.NEXT_TOKEN)
    chances = measured.get(Quantity.NEXT_TOKEN_PROBABILITY)
    if tokens is not None and tokens.texts is not None and chances is not None:
        likely = zip(tokens.texts[-1].tolist(), chances.values[-1], strict=True)
        return "next " + ", ".join(f"{text!r} {p:.3f}" for text, p in [*likely][:3])
    return None


def _probe_counts(observer: Observer) -> str:
    assert observer.batch is not None
    probes = observer.batch.n_plain
    blocks = len(observer.batch.probes) - probes
    return f"{_plural(probes, 'probe')} and {_plural(blocks, 'repeated block')}"


def _plural(count: int, what: str, plural: str = "") -> str:
    return f"{count} {what if count == 1 else plural or what + 's'}"
