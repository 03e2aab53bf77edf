"""`visible`: writes what a terminal would obey as escapes, so that names are shown as they are."""

import unicodedata

_BIDI = {*"\u200e\u200f\u061c", *map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))}
"""Signs that change the order in which a terminal shows the letters of a line."""


def visible(text: str) -> str:
    """Writes colours, movements of the cursor, changes of the order of letters and what else a
    terminal obeys as escapes. Ends of lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(sign) if _is_obeyed(sign) else sign for sign in text)


def _is_obeyed(sign: str) -> bool:
    # A lone surrogate cannot be printed at all.
    special = unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t"
    return special or sign in _BIDI


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode()
