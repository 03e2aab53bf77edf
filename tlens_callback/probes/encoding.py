"""Turns the content of a probe into token ids, as the trainer's tokenizer does it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tlens_callback.probes.probe import Probe


def own_tokenizer(tokenizer: Any) -> Any:
    """Copies the tokenizer, since calls change its settings of padding and truncation.

    Of a processor of images and texts it copies the tokenizer inside, with the processor's chat
    template, which is the one that trainers apply.
    """
    # transformers' MistralCommonBackend is a tokenizer, and its member of this name another thing.
    is_tokenizer = hasattr(tokenizer, "convert_ids_to_tokens")
    own = copy.deepcopy(tokenizer if is_tokenizer else getattr(tokenizer, "tokenizer", tokenizer))
    if not is_tokenizer and getattr(tokenizer, "chat_template", None):
        own.chat_template = tokenizer.chat_template
    if getattr(own, "clean_up_tokenization_spaces", False):
        # It would take spaces out of the text of tokens: " ." would be named like ".".
        own.clean_up_tokenization_spaces = False
    return own


def token_ids(
    probe: Probe,
    tokenizer: Any,
    vocab_size: int,
    *,
    bos: bool | None = None,
    without: frozenset[int] = frozenset(),
) -> list[int]:
    """Encodes a probe as token ids; the tokenizer is a copy made by `own_tokenizer`.

    Args:
        bos: whether a text begins with the BOS token; None: as the tokenizer does it.
        without: ids that are not for a random block.

    Raises:
        ValueError: a text without a tokenizer, chat without a chat template, or a vocabulary too
            small for a random block.
    """
    content: Any = probe.content
    if probe.block is not None:
        return _repeated_ids(probe, tokenizer, vocab_size, without)
    if not isinstance(content, str) and isinstance(content[0], int):
        return [int(i) for i in content]
    if tokenizer is None:
        raise ValueError(
            f"Probe {probe.name!r} needs a tokenizer, but there is none. Pass one "
            f"(to a trainer as processing_class=), or give the probe as token ids."
        )
    if isinstance(content, str):
        return text_ids(content, tokenizer, bos)
    return chat_ids(probe, tokenizer)


def text_ids(text: str, tokenizer: Any, bos: bool | None = None) -> list[int]:
    """Encodes a text up to its end, without the token that some tokenizers put behind it.

    Args:
        bos: see `token_ids`.
    """
    whole, inside = list(tokenizer(text)["input_ids"]), inner_ids(text, tokenizer)
    n = len(inside)
    starts = (i for i in range(len(whole) - n + 1) if whole[i : i + n] == inside)
    if not n or (start := next(starts, None)) is None:
        return whole  # The tokenizer does more than to put tokens around a text.
    before, token = whole[:start], getattr(tokenizer, "bos_token_id", None)
    if bos is not None and token is not None:
        before = [one for one in before if one != token]
        before = [token, *before] if bos and inside[0] != token else before
    return [*before, *inside]


def inner_ids(text: str, tokenizer: Any) -> list[int]:
    """Encodes a text as it is, without the tokens that a tokenizer puts around one."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def is_chat(probe: Probe) -> bool:
    """Whether the content is chat messages."""
    return isinstance(next(iter(probe.content), None), Mapping)


def ends_open(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat ends with the beginning of an answer, which the model continues."""
    return messages[-1].get("role") == "assistant"


def chat_ids(probe: Probe, tokenizer: Any, more: str = "") -> list[int]:
    """Encodes a chat, up to where the model answers.

    Args:
        more: what the answer begins with.

    Raises:
        ValueError: if the tokenizer has no chat template, or if it refuses these messages, or
            writes their content as the list that it is.
    """
    messages: Any = list(probe.content)
    in_parts = any(isinstance(one.get("content"), list | tuple) for one in messages)
    if in_parts and has_template(tokenizer):
        written = chat_text(probe, tokenizer)
        if any(str(one["content"]) in written for one in messages if one.get("content")):
            raise ValueError(f"Probe {probe.name!r}: {_IN_PARTS}")
    if more:
        begun = messages.pop() if ends_open(messages) else {"role": "assistant", "content": ""}
        messages.append({**begun, "content": begun["content"] + more})
    return list(_chat(probe, tokenizer, messages, tokenize=True)["input_ids"])


def chat_text(probe: Probe, tokenizer: Any, answer: str | None = None) -> str:
    """Writes a chat as text, up to where the model answers; with an answer, to its end.

    Raises:
        ValueError: if the tokenizer has no chat template, or if it refuses these messages.
    """
    messages: Any = probe.content
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": answer}]
    return _chat(probe, tokenizer, messages, tokenize=False, whole=answer is not None)


def has_template(tokenizer: Any) -> bool:
    """Whether chats are written by a template. transformers' MistralCommonBackend has none, and
    encodes chats in its own way."""
    return bool(getattr(tokenizer, "chat_template", None))


_IN_PARTS = (
    "the content of its messages is a list of parts, and this chat template takes text. Give each "
    "content as one string."
)


def _chat(
    probe: Probe, tokenizer: Any, messages: Any, *, tokenize: bool, whole: bool = False
) -> Any:
    """Applies the chat template; `whole` closes the last message and opens no other."""
    goes_on = ends_open(messages)
    ends = {
        "add_generation_prompt": not (goes_on or whole),
        "continue_final_message": goes_on and not whole,
    }
    try:
        return tokenizer.apply_chat_template(
            _as_it_takes_them(messages, tokenizer, ends),
            tokenize=tokenize,
            return_dict=tokenize,
            **ends,
        )
    except Exception as error:
        if not has_template(tokenizer) and "chat_template" in str(error):
            raise ValueError(
                f"Probe {probe.name!r} is a chat, but the tokenizer has no chat template. "
                f"Give the prompt as text."
            ) from error
        if any(isinstance(message.get("content"), list | tuple) for message in messages):
            raise ValueError(f"Probe {probe.name!r}: {_IN_PARTS} ({error})") from error
        raise ValueError(
            f"Probe {probe.name!r}: the tokenizer's chat template refuses its messages "
            f"({type(error).__name__}: {error}). Change them, or give the prompt as text."
        ) from error


def _as_it_takes_them(messages: Any, tokenizer: Any, ends: Mapping[str, bool]) -> list[Any]:
    """The messages, with texts as lists of one part where the chat template takes nothing else.

    Some templates of models for images and text take each content as a list of parts. Of a string
    they write nothing, or they fail. Trainers give them parts.
    """
    given = [dict(message) for message in messages]
    texts = [message["content"] for message in given if isinstance(message.get("content"), str)]
    if not has_template(tokenizer):
        return given

    def writes_all(messages: list[Any]) -> bool:
        try:
            written = tokenizer.apply_chat_template(messages, tokenize=False, **ends)
        except Exception:
            return False
        return all(text.strip() in written for text in texts)

    if writes_all(given):
        return given
    in_parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in given
    ]
    return in_parts if writes_all(in_parts) else given


def special_ids(tokenizer: Any) -> set[int]:
    """Returns the ids of a tokenizer that stand for no text: special and added tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", ())
    # MistralCommonBackend of transformers 5.23 has a method of this name, which raises.
    added = () if callable(added) else added
    return {*(getattr(tokenizer, "all_special_ids", None) or ()), *added}


def _repeated_ids(
    probe: Probe, tokenizer: Any, vocab_size: int, without: frozenset[int]
) -> list[int]:
    assert probe.block is not None
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        start = getattr(tokenizer, "eos_token_id", None)
    start = 0 if start is None else int(start)
    special = {start, *special_ids(tokenizer), *without}
    # Rows of the embedding beyond the tokenizer's vocabulary are never trained.
    known = min(vocab_size, len(tokenizer)) if tokenizer is not None else vocab_size
    ordinary = torch.ones(known, dtype=torch.bool)
    ordinary[[i for i in special if 0 <= i < known]] = False
    usable = ordinary.nonzero()[:, 0]
    if len(usable) < probe.block:
        raise ValueError(
            f"Probe {probe.name!r}: a block of {probe.block} distinct tokens needs a vocabulary "
            f"of at least as many ordinary tokens; there are {len(usable)}."
        )
    generator = torch.Generator().manual_seed(1000 * probe.seed + probe.block)
    chosen = usable[torch.randperm(len(usable), generator=generator)[: probe.block]]
    return [start] + chosen.tolist() * probe.times
