"""Encodes target and foil as the tokens that follow the prompt in a whole text."""

import logging
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from tlens_callback.probes.encoding import (
    chat_ids,
    chat_text,
    ends_open,
    has_template,
    inner_ids,
    is_chat,
    text_ids,
)
from tlens_callback.probes.names import token_name
from tlens_callback.probes.probe import Probe

logger = logging.getLogger("tlens_callback")

_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)
"""Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def answer_tokens(
    probe: Probe,
    role: str,
    tokenizer: Any,
    prompt: Sequence[int],
    vocab_size: int,
    *,
    bos: bool | None = None,
) -> tuple[int, ...]:
    """Returns the tokens of a probe's target or foil, in order; none if it has none.

    A string is encoded behind the prompt, since a tokenizer may encode it differently alone: that
    of SentencePiece puts a space before a text. If the tokenizer joins the end of the prompt with
    its beginning, or if the chat template or a space would make it other tokens, a warning says
    which string is meant. Another one says so if there are several tokens.

    Args:
        role: "target" or "foil".
        tokenizer: a copy made by `own_tokenizer`.
        prompt: the token ids of the probe.
        bos: what they were encoded with, see `token_ids`.

    Raises:
        ValueError: a string without a tokenizer, an id outside the vocabulary, or an empty string.
    """
    given: Any = getattr(probe, role)
    if given is None:
        return ()
    if not isinstance(given, str):
        token = operator.index(given)
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"The {role} of probe {probe.name!r} is token id {token}, outside the model's "
                f"vocabulary of {vocab_size}."
            )
        return (token,)
    if tokenizer is None:
        raise ValueError(
            f"The {role} {given!r} of probe {probe.name!r} needs a tokenizer, but there "
            f"is none. Give the token id."
        )
    text, encode = _continued(probe, tokenizer, prompt, bos)
    ids, joined = _behind(given, tokenizer, prompt, encode)
    spaced = _with_its_space(probe, given, text, tokenizer, prompt, encode)
    if not ids:
        raise ValueError(
            f"The {role} {given!r} of probe {probe.name!r} is 0 tokens. Give at least one."
        )
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(
            f"The {role} {given!r} of probe {probe.name!r} has token id {bad[0]}, outside the "
            f"model's vocabulary of {vocab_size}. Is this the model's own tokenizer?"
        )
    if spaced is not None and len(spaced) <= len(ids) and spaced != ids:
        logger.warning(
            "tlens: the %s %r of probe %r has no leading space, and after text the model is "
            "likelier to write %r.",
            *(role, given, probe.name, " " + given),
        )
    elif joined:
        _warn_of_joint(probe, role, given, text or "", tokenizer, prompt, joined)
    elif is_chat(probe) and text is not None:
        _warn_of_template(probe, role, given, text, tokenizer)
    if len(ids) > 1:
        logger.warning(
            "tlens: the %s %r of probe %r is %d tokens, %r. TargetScores adds up their log "
            "probabilities; what needs one token uses the first.",
            *(role, given, probe.name, len(ids), [token_name(tokenizer, i) for i in ids]),
        )
    return tuple(ids)


def _continued(
    probe: Probe, tokenizer: Any, prompt: Sequence[int], bos: bool | None
) -> tuple[str | None, Callable[[str], list[int]] | None]:
    """Returns the prompt as text, and a function that encodes the prompt with more text behind it.

    Both are None if the prompt's tokens are not those of a text, and the text if a chat is not
    written as one.
    """
    if isinstance(probe.content, str):
        text = probe.content
        return text, lambda more: text_ids(text + more, tokenizer, bos)
    if is_chat(probe) and not has_template(tokenizer):
        return None, lambda more: chat_ids(probe, tokenizer, more)
    written = chat_text(probe, tokenizer) if is_chat(probe) else tokenizer.decode(list(prompt))
    if inner_ids(written, tokenizer) != list(prompt):
        return None, None
    return written, lambda more: inner_ids(written + more, tokenizer)


def _behind(
    more: str,
    tokenizer: Any,
    prompt: Sequence[int],
    encode: Callable[[str], list[int]] | None,
) -> tuple[list[int], list[int]]:
    """Returns the tokens of a text behind the prompt. Where there is no such encoding, since the
    tokenizer joins the two, returns those of the text inside another one, and the joined ones."""
    whole, n = encode(more) if encode else [], len(prompt)
    if whole[:n] == list(prompt) and len(whole) > n:
        return whole[n:], []
    # Behind a line's end, no tokenizer adds a space, and hardly one joins it with a word.
    line = inner_ids("\n", tokenizer)
    inside = inner_ids("\n" + more, tokenizer)
    if inside[: len(line)] == line and len(inside) > len(line):
        return inside[len(line) :], whole
    return inner_ids(more, tokenizer), whole


def _with_its_space(
    probe: Probe,
    given: str,
    text: str | None,
    tokenizer: Any,
    prompt: Sequence[int],
    encode: Callable[[str], list[int]] | None,
) -> list[int] | None:
    """Returns the tokens of an answer with a space before it, where words begin with their space:
    behind text, also that of an answer that has begun. None elsewhere."""
    content: Any = probe.content
    if isinstance(content, str):
        open_text = not content[-1:].isspace()
    else:
        open_text = is_chat(probe) and ends_open(content) and not (text or " ")[-1:].isspace()
    if not open_text or not given[:1].isalnum() or _WITHOUT_SPACES.match(given):
        return None
    return _behind(" " + given, tokenizer, prompt, encode)[0]


def _warn_of_joint(
    probe: Probe,
    role: str,
    given: str,
    text: str,
    tokenizer: Any,
    prompt: Sequence[int],
    joined: Sequence[int],
) -> None:
    """Says that no text has these tokens behind those of the prompt."""
    pairs = zip(prompt, joined, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(joined)))
    pieces = [token_name(tokenizer, i) for i in joined[same:]]
    space = text[len(text.rstrip()) :]
    if space and isinstance(probe.content, str):
        instead = f"end the text before {space!r} and give {role}={space + given!r}"
    else:
        instead = "end the prompt elsewhere, or give a token id"
    logger.warning(
        "tlens: the tokenizer joins the end of probe %r with its %s %r: it writes %r there, so "
        "that training never shows this %s behind this prompt. To ask for what is trained, %s.",
        *(probe.name, role, given, pieces, role, instead),
    )


def _warn_of_template(probe: Probe, role: str, given: str, text: str, tokenizer: Any) -> None:
    """Says where the chat template writes an answer differently: with a space, or something else,
    before it."""
    content: Any = probe.content
    word = given.strip()
    if ends_open(content) or not word:
        return
    try:
        whole = chat_text(probe, tokenizer, word)
    except Exception:  # A template may refuse what nobody asked it to write.
        return
    if not whole.startswith(text) or word not in whole[len(text) :]:
        return
    before = whole[len(text) :].partition(word)[0]
    if before + word == given.rstrip():
        return
    if before.strip():
        instead = "give the prompt as text, with that at its end, to ask for what follows"
    else:
        instead = f"{role}={before + word!r} is what is trained"
    logger.warning(
        "tlens: the chat template begins the answer of probe %r with %r, not with the %s %r; %s.",
        *(probe.name, before + word, role, given, instead),
    )
