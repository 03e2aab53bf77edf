"""Gives tokens the names by which a person reads them."""

from typing import Any


def token_name(tokenizer: Any, token: int) -> str:
    """Writes a token so that a person can read it; a part of a character keeps its name in the
    vocabulary."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text
