"""`Probe`: a prompt that is shown to the model at every observation."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

_MOST_TOKENS = 2**24
"""More tokens than any model reads; so many and more are refused before they are made."""


@dataclass(frozen=True)
class Probe:
    """One prompt that is shown to the model at every observation.

    Args:
        name: last segment of the keys of its readings; unique among the probes of a run.
        content: text; or chat messages (`[{"role": "user", "content": "..."}]`, put through the
            tokenizer's own chat template); or token ids.
        target: what training should make more likely after the last token: a string (mind the
            leading space), or a token id. A string is encoded behind the content, as in a whole
            text. It may be several tokens: `TargetScores` adds up their log probabilities, and an
            instrument that needs one token uses the first.
        foil: what to compare the target with, in the same way.

    A repeated random block, the standard stimulus for induction heads, is made by
    `Probe.repeated`.
    """

    name: str
    content: str | Sequence[Mapping[str, str]] | Sequence[int] = ()
    target: str | int | None = None
    foil: str | int | None = None
    block: int | None = None
    times: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ValueError(f"A probe needs a name without '/', got {self.name!r}.")
        for role in ("target", "foil"):
            token = getattr(self, role)
            if isinstance(token, bool) or not isinstance(token, str | SupportsIndex | None):
                raise ValueError(
                    f"The {role} of probe {self.name!r} must be a string or a token id, "
                    f"got {token!r}."
                )
        if self.foil is not None and self.target is None:
            raise ValueError(
                f"Probe {self.name!r} has a foil but no target; the logit difference needs both."
            )
        if self.block is not None:
            if len(self.content) > 0:
                raise ValueError(f"Probe {self.name!r} has both content and a random block.")
            for what in ("block", "times", "seed"):
                number: Any = getattr(self, what)
                try:
                    object.__setattr__(self, what, operator.index(number))
                except TypeError:
                    number = True
                if isinstance(number, bool):
                    raise ValueError(
                        f"Probe {self.name!r}: {what} must be a whole number, got "
                        f"{getattr(self, what)!r}."
                    )
            if self.block * self.times >= _MOST_TOKENS or abs(self.seed) >= 2**50:
                raise ValueError(
                    f"Probe {self.name!r} is too large: block={self.block}, times={self.times}, "
                    f"seed={self.seed}. A model reads at most some thousands of tokens."
                )
            if self.block < 2 or self.times < 2:
                raise ValueError(
                    f"Probe {self.name!r}: a repeated block needs block >= 2 and times >= 2, "
                    f"but got block={self.block}, times={self.times}."
                )
            return
        content: Any = self.content
        if not isinstance(content, str):
            content = content.tolist() if hasattr(content, "tolist") else content
            object.__setattr__(self, "content", _checked(self.name, content))
        messages = () if isinstance(content, str) else self.content
        _check_text_only(self.name, messages)
        said = [part.get("content") for part in messages if isinstance(part, Mapping)]
        for text in (self.content, *said, self.target, self.foil):
            if isinstance(text, str) and any("\ud800" <= sign <= "\udfff" for sign in text):
                raise ValueError(
                    f"Probe {self.name!r} has half a character in {text!r:.60}, a surrogate "
                    f"without its other half, which no tokenizer can read. Remove it."
                )
        if not (content.strip() if isinstance(content, str) else self.content):
            raise ValueError(
                f"Probe {self.name!r} is empty. Give text, chat messages or token ids, or use "
                f"Probe.repeated({self.name!r}, block=16)."
            )

    @classmethod
    def repeated(cls, name: str, *, block: int, times: int = 2, seed: int = 0) -> "Probe":
        """Makes a probe of distinct random tokens that are repeated `times` times.

        It is `[BOS, r_1..r_block, r_1..r_block, ...]`, with the EOS token in front where the
        tokenizer has no BOS token. The tokens depend only on `seed`, `block` and the vocabulary; no
        global random state is read or changed.
        """
        return cls(name, block=block, times=times, seed=seed)


def _check_text_only(name: str, messages: Any) -> None:
    """Raises a ValueError for a chat in which a content has another part than text."""
    for message in messages:
        parts = message.get("content") if isinstance(message, Mapping) else None
        for part in parts if isinstance(parts, list | tuple) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind != "text":
                raise ValueError(
                    f"Probe {name!r} has a part of type {kind!r} in its messages. A probe is text "
                    f"alone, also for a model that reads images. Leave this part out."
                )


def _checked(name: str, content: Any) -> tuple[Any, ...]:
    """Checks chat messages or token ids, and gives them as a tuple."""
    try:
        parts = tuple(content)
        if all(isinstance(part, Mapping) and "role" in part for part in parts):
            return parts
        return tuple(operator.index(part) for part in parts)
    except TypeError:
        raise ValueError(
            f"Probe {name!r} must be text, chat messages ([{{'role': ..., 'content': ...}}, ...]) "
            f"or token ids ([1, 2, ...]), got {content!r}."
        ) from None
