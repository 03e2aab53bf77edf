"""What a run says on the terminal of the rollouts that it looks at."""

from collections.abc import Sequence

from tlens_callback.events.contrasts import Discoveries, discoveries
from tlens_callback.reading import Reading
from tlens_callback.rollouts import Look
from tlens_callback.rollouts.bounds import most_tokens, peaks
from tlens_callback.run.observer import Observer


def rollouts_opening(observer: Observer) -> list[str]:
    """Says which rollouts are looked at and what that takes at most; nothing without rollouts."""
    look, shadow = observer.looking.look, observer.shadow
    if look is None or shadow is None or not (look.recorder or look.pairs):
        return []
    settings = look.settings
    has_base = look.base is not None or look.can_leave_out(shadow)
    longest = most_tokens(settings, shadow) // settings.per_observation
    how = "run with and without the adapters"
    if look.base is not None:
        how = "run with the weights of now and with the copy"
    if not has_base:
        how = "run with the weights of now; without adapters there is no base to compare with"
    tokens = most_tokens(settings, shadow) * (1 + has_base + settings.after_update)
    features = look.features(shadow, observer.instruments)
    most = peaks(settings, shadow, has_base=has_base, features=features)
    on_cpu = most.pop("contrast")
    memory = f"{max(most.values()) / 2**20:.0f} MiB of memory on {shadow.device}"
    if shadow.device.type == "cpu":
        memory = f"{max(on_cpu, *most.values()) / 2**20:.0f} MiB of memory"
    elif on_cpu > max(most.values()) / 10:
        memory += f" and {on_cpu / 2**20:.0f} MiB on the CPU"
    groups = "group" if settings.groups == 1 else "groups"
    which = f"at most {settings.per_observation} of {settings.groups} {groups}"
    if look.pairs:
        which = f"the first {len(look.pairs)} completions of the training data"
    lines = [
        f"tlens: rollouts: {which} at each observation, {longest} tokens each, {how}",
        f"tlens: rollouts: at most {tokens} tokens go through the shadow at an observation, and "
        f"take up to about {memory}",
    ]
    if features.names:
        lines.append(f"tlens: rollouts: {len(features.names)} features of instruments are read")
    if not settings.texts:
        lines.append("tlens: rollouts: only numbers are written, no prompts and completions")
    return lines


def rollouts_summary(observer: Observer) -> list[str]:
    """Says what tells winners from losers at the last observation that has rollouts."""
    look = observer.looking.look
    if look is None:
        return []
    if look.latest is None:
        return ["tlens: rollouts: none was looked at"]
    step, readings = look.latest
    return [*_over_the_run(look, readings), *_at_step(look, step, readings)]


def _over_the_run(look: Look, readings: Sequence[Reading]) -> list[str]:
    told, times = discoveries(readings, run=True), _observations(look)
    if told is None or times < 2:
        return []
    return [_found(look, told, f"over {times} observations")]


def _observations(look: Look) -> int:
    n = look.baseline.get("n")
    return 0 if n is None else int(n.max())


def _at_step(look: Look, step: int, readings: Sequence[Reading]) -> list[str]:
    told = discoveries(readings)
    if told is None:
        return [
            f"tlens: rollouts: at step {step}, winners and losers could not be compared, because "
            f"their advantages are not known"
        ]
    if not told.spread:
        return [
            f"tlens: rollouts: at step {step}, no group has spread, so there are no winners and "
            f"losers to compare"
        ]
    return [_found(look, told, f"at step {step}")]


def _found(look: Look, told: Discoveries, when: str) -> str:
    rate = f"(false discovery rate {look.settings.fdr:.2g})"
    if not told.found:
        return (
            f"tlens: rollouts: {when}, none of {told.compared} numbers compared tells winners "
            f"from losers {rate}"
        )
    named = [f"{one}{', may be length' * one.may_be_length}" for one in told.surest]
    if more := told.found - len(named):
        named.append(f"and {more} more")
    return (
        f"tlens: rollouts: {when}, {told.found} of {told.compared} numbers compared "
        f"{'tells' if told.found == 1 else 'tell'} winners from losers {rate}: {'; '.join(named)}"
    )
