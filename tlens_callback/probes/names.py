"""Gives tokens the names by which a person reads them."""

import re
from functools import lru_cache
from typing import Any

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def token_name(tokenizer: Any, token: int) -> str:
    """Writes a token so that a person can read it, and so that different tokens look different.

    It is the token's text as it stands behind another token, with its leading space. Bytes that are
    only a part of a character are written as `<0xE4>`, and an id that the tokenizer does not have
    as `<unused 49160>`.

    Args:
        tokenizer: a copy made by `own_tokenizer`; without one, the name is the token's number.
    """
    if tokenizer is None:
        return str(token)
    text, name = _decoded(tokenizer, token), _in_vocabulary(tokenizer, token)
    if not text and name is None:
        return f"<unused {token}>"
    if name is None:
        return text
    if (data := _bytes(tokenizer, token, name, text)) is not None:
        return data
    if text == name:
        # MistralCommonBackend writes the spaces of a text as SentencePiece does.
        return text.replace("\u2581", " ")
    if _UNREADABLE in text:
        return name
    return _with_its_space(tokenizer, token, text) or name


def _decoded(tokenizer: Any, *tokens: int) -> str:
    try:
        return tokenizer.decode(list(tokens))
    except Exception:  # Tokenizers raise various errors for an id that they do not have.
        return ""


def _in_vocabulary(tokenizer: Any, token: int) -> str | None:
    """Returns the name of a token in the tokenizer's own notation; None for an id that it does not
    have."""
    try:
        return tokenizer.convert_ids_to_tokens(token)
    except Exception:
        return None


def _with_its_space(tokenizer: Any, token: int, text: str) -> str:
    """Returns the text of a token behind another one, since some decoders take away the space with
    which a text begins."""
    try:
        letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    except Exception:
        return text
    before, both = _decoded(tokenizer, letter), _decoded(tokenizer, letter, token)
    behind = both.removeprefix(before)
    same = both.startswith(before) and behind.lstrip(" ") == text.lstrip(" ")
    return behind if same else text


def _bytes(tokenizer: Any, token: int, name: str, text: str) -> str | None:
    """Writes a token that is bytes, and not whole characters, byte by byte.

    None for every other token, and where the bytes are not known.
    """
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name):
        # Beside the byte of a letter there is often a token that is the letter.
        return None if text.isspace() else f"<0x{byte[1].upper()}>"
    if _UNREADABLE not in text:
        return None
    if set(name) <= _byte_of().keys():
        data = bytes(_byte_of()[char] for char in name)
    else:
        data = _mistral_bytes(tokenizer, token)
    if data.decode(errors="replace").replace(_UNREADABLE, "") != text.replace(_UNREADABLE, ""):
        return None
    return "".join(
        f"<0x{ord(char) - 0xDC00:02X}>" if "\udc80" <= char <= "\udcff" else char
        for char in data.decode(errors="surrogateescape")
    )


def _mistral_bytes(tokenizer: Any, token: int) -> bytes:
    """Returns the bytes of a token of MistralCommonBackend; none for another tokenizer."""
    try:
        return tokenizer.tokenizer.instruct_tokenizer.tokenizer.id_to_byte_piece(token)
    except AttributeError:
        return b""


@lru_cache
def _byte_of() -> dict[str, int]:
    """The signs that byte-level vocabularies, like GPT-2's, write for bytes: printable bytes stand
    for themselves, the others for the signs from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}
