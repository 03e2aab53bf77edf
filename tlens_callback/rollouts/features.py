"""Reads what instruments find in activations, features and projections, at sampled tokens."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.interfaces import Instrument, TokenFeatures
from tlens_callback.rollouts.inside import Part
from tlens_callback.shadow import Reduce, Shadow
from tlens_callback.shadow.unembed import CHUNK


class Features:
    """Features of instruments at the sampled tokens of rollouts.

    It keeps, on the shadow's device, either the features of every sampled token, or, where there
    are more of them than the activation is wide, the activation, from which `at_tokens` reads a few
    of them again.

    Attributes:
        names: of all features, "<instrument> <name>".
        shown: indices of those that are of interest whatever they do.
    """

    def __init__(self, of: Sequence[tuple[str, TokenFeatures]]) -> None:
        self._of = of
        self._kept: list[list[Tensor]] = [[] for _ in of]
        self.names = [f"{instrument} {name}" for instrument, one in of for name in one.names]
        self.shown = [start + i for start, (_, one) in self._starts() for i in one.shown]

    @classmethod
    def of(cls, instruments: Iterable[Instrument], shadow: Shadow) -> "Features":
        """The features of those instruments that have some.

        Raises:
            ValueError: for a hook point that the model does not have.
        """
        found = []
        for instrument in instruments:
            asked = getattr(instrument, "token_features", None)
            try:
                for one in asked(shadow) if asked is not None else ():
                    shadow.hook(one.hook)
                    found.append((instrument.name, one))
            except Exception as error:
                error.add_note(f"(raised for the features of the instrument {instrument.name!r})")
                raise
        features = cls(found)
        if len(set(features.names)) < len(features.names):
            twice = next(name for name in features.names if features.names.count(name) > 1)
            raise ValueError(
                f"The features of an instrument need different names, and {twice!r} is there "
                f"twice. Put the layer into the name, such as 'L5 12'."
            )
        return features

    @property
    def fixed(self) -> list[bool]:
        """Whether each feature stays the same one over the run."""
        return [one.fixed for _, one in self._of for _ in one.names]

    @property
    def identity(self) -> int:
        """Tells these features from others of the same number."""
        return zlib.crc32(repr([(self.names, self.hooks)]).encode())

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """The hook point and the number of features of each that is read."""
        return [(one.hook, len(one.names)) for _, one in self._of]

    @property
    def hooks(self) -> list[str]:
        """The hook points that they are read from."""
        return list(dict.fromkeys(one.hook for _, one in self._of))

    def taps(self, part: Part) -> dict[str, Reduce]:
        """Reductions that keep what is needed, and return [rollout, feature], the mean of each
        feature over the sampled tokens, for each instrument that reads there."""
        return {hook: partial(self._read, part, hook) for hook in self.hooks}

    def means(self, taken: Mapping[str, Any]) -> Float[Tensor, "rollout feature"]:
        """Puts together what the reductions returned, in the order of `names`."""
        each = {hook: iter(means) for hook, means in taken.items()}
        return torch.cat([next(each[one.hook]) for _, one in self._of], 1)

    def at_tokens(self, which: Sequence[int]) -> Float[Tensor, "feature token"]:
        """Some features of every sampled token, in the order of the passes."""
        rows: dict[int, Tensor] = {}
        for (start, (_, one)), kept in zip(self._starts(), self._kept, strict=True):
            own = [i for i in which if start <= i < start + len(one.names)]
            if own:
                columns = [i - start for i in own]
                found = torch.cat([_columns(one, part, columns) for part in kept])
                rows |= dict(zip(own, found.T, strict=True))
        return torch.stack([rows[i] for i in which])

    def _starts(self) -> Iterator[tuple[int, tuple[str, TokenFeatures]]]:
        start = 0
        for one in self._of:
            yield start, one
            start += len(one[1].names)

    def _read(
        self, part: Part, hook: str, values: Float[Tensor, "rollout pos ..."]
    ) -> tuple[Float[Tensor, "rollout feature"], ...]:
        if values.shape[:2] != part.batch.tokens.shape or values.dim() < 3:
            raise ValueError(
                f"{hook!r} has shape {tuple(values.shape)}; features are read from [probe, pos, "
                f"...], such as 'blocks.0.hook_resid_post'."
            )
        # At the sampled tokens themselves, not where they were predicted.
        own = values.flatten(2)[part.row, part.pos + 1].float()
        means = []
        for (_, one), kept in zip(self._of, self._kept, strict=True):
            if one.hook != hook:
                continue
            if len(one.names) > own.shape[1]:
                kept.append(own)
                each = [
                    torch.stack([few.sum(0) for few in _encoded(one, of)]).sum(0) / len(of)
                    for of in own.split(part.sizes)
                ]
            else:
                kept.append(torch.cat([*_encoded(one, own)]))
                each = [of.mean(0) for of in kept[-1].split(part.sizes)]
            means.append(torch.stack(each))
        return tuple(means)


def _columns(
    one: TokenFeatures, kept: Float[Tensor, "token number"], columns: Sequence[int]
) -> Float[Tensor, "token column"]:
    if len(one.names) <= kept.shape[1]:
        return kept[:, columns]
    return torch.cat([few[:, columns] for few in _encoded(one, kept)])


def _encoded(
    one: TokenFeatures, activation: Float[Tensor, "token width"]
) -> Iterator[Float[Tensor, "token feature"]]:
    for few in activation.split(max(1, CHUNK // len(one.names))):
        with torch.no_grad(), torch.autocast(few.device.type, enabled=False):
            found = one.encode(few)
        if found.shape != (len(few), len(one.names)):
            raise ValueError(
                f"TokenFeatures at {one.hook!r}: encode gave {tuple(found.shape)} for "
                f"{len(few)} tokens, and there are {len(one.names)} names; it has to be "
                f"[token, feature]."
            )
        yield found.float()
