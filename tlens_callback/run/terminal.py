"""What a run says on the terminal: when it begins, when something happens, when it ends."""

from collections.abc import Mapping

from tlens_callback.meaning import Quantity
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.run.observer import Observer
from tlens_callback.run.printing import sink_lines


def opening(observer: Observer) -> list[str]:
    """What is watched, and how near the shadow is to it."""
    shadow, fidelity = observer.shadow, observer.checks[min(observer.checks)]
    assert shadow is not None
    held = f"{shadow.extra_bytes / 2**20:.1f} MiB beside the model's"
    if shadow.n_owned:
        held = f"{shadow.n_owned} weights have adapters, {held}"
    elif not shadow.extra_bytes:
        held = "all weights are the model's own, none is copied"
    return [
        f"tlens: watching {shadow.n_layers} layers x {shadow.n_heads} heads with "
        f"{_asked(observer)}; {held}",
        f"tlens: the shadow agrees with the model: {fidelity}",
        *sink_lines(observer.sinks),
    ]


def summary(observer: Observer) -> list[str]:
    """What was seen, where to look, what it cost."""
    if not observer.steps or observer.batch is None:
        return []
    lines = [
        f"tlens: {_many(len(observer.steps), 'observation')} of {_asked(observer)} in "
        f"{observer.cost.seconds:.1f} s, {observer.cost.beforehand:.1f} of them before the first "
        f"step, {observer.cost.share:.1%} of the run; "
        f"{observer.extra_bytes / 2**20:.1f} MiB of weights beside the model's"
    ]
    if observer.checks:
        worst = max(observer.checks.values(), key=lambda check: check.relative)
        times = _many(len(observer.checks), "time")
        lines.append(f"tlens: shadow and model were compared {times}; at worst: {worst}")
    if dropped := observer.writer.dropped:
        lines.append(
            f"tlens: {dropped} observations were dropped, since the sinks were slower than "
            f"training; writing='wait' or a larger every_n_steps keeps all"
        )
    return lines + sink_lines(observer.sinks)


def looked(observer: Observer, readings: Mapping[str, Reading], *, name: str) -> list[str]:
    """What one look at a saved model says: is the shadow the model, and what does it answer?

    Args:
        readings: of the observed step, by key.
        name: of the model.
    """
    batch, (step,) = observer.batch, observer.steps
    assert batch is not None
    return [
        f"tlens: {name}, at step {step}: {_asked(observer)} in {observer.cost.seconds:.1f} s",
        f"tlens: the shadow agrees with the model: {observer.checks[step]}",
        *(
            f"tlens: {probe.name}: {said}"
            for row, probe in enumerate(batch.probes)
            if (said := _answer(batch, row, readings))
        ),
        *sink_lines(observer.sinks),
    ]


def _answer(batch: ProbeBatch, row: int, readings: Mapping[str, Reading]) -> str | None:
    """What was measured of the model's next token behind a probe: of the target, if it has one."""
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


def _asked(observer: Observer) -> str:
    assert observer.batch is not None
    blocks = sum(probe.block is not None for probe in observer.batch.probes)
    probes = len(observer.batch.probes) - blocks
    return f"{_many(probes, 'probe')} and {_many(blocks, 'repeated block')}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
