"""Texts whose characters are cut into bytes, as tokens are named, and how they read."""

from itertools import pairwise


def cut(text: str, *places: int) -> list[str]:
    """The names of the text's tokens, if a token ends at each of these bytes."""
    data, ends = text.encode(), [0, *places, len(text.encode())]
    return [_named(data[a:b]) for a, b in pairwise(ends)]


def _named(data: bytes) -> str:
    return "".join(
        f"<0x{ord(char) - 0xDC00:02X}>" if "\udc80" <= char <= "\udcff" else char
        for char in data.decode(errors="surrogateescape")
    )


CHINESE = "\u4e01\u4e02"
HE_IS = "\u0939\u0948\u0928"
"""Devanagari: a letter with a vowel sign drawn on it, and a letter."""
PARROT = "\U0001f99c"
SCIENTIST = "\U0001f469\u200d\U0001f52c"
"""One emoji of three characters."""
WAVE = "\U0001f44b\U0001f3fd"
"""A hand and its colour of skin."""

CASES: dict[str, tuple[list[str], list[str]]] = {
    # Tokens -> what is written at each.
    "each byte": (cut(CHINESE, 1, 2, 3, 4, 5), [CHINESE[0], "", "", CHINESE[1], "", ""]),
    "two and one": (cut(CHINESE, 2, 3, 5), [CHINESE[0], "", CHINESE[1], ""]),
    "one token of two characters": (cut(CHINESE, 2, 5), [CHINESE[0], CHINESE[1], ""]),
    "beside whole ones": (cut(f" a{CHINESE}b", 3, 7), [f" a{CHINESE[0]}", CHINESE[1], "b"]),
    "marks": (cut(HE_IS, 2, 3, 5, 6, 7), [HE_IS[:2], "", "", "", HE_IS[2], ""]),
    "emoji": (cut(PARROT, 1, 3), [PARROT, "", ""]),
    "joined emoji": (cut(SCIENTIST, 2, 4, 6, 7, 9), [SCIENTIST, "", "", "", "", ""]),
    "skin": (cut(WAVE, 2, 4, 6), [WAVE, "", "", ""]),
    "no characters": (["<0xE4>", "a", "<0xB8><0x81>"], ["<0xE4>", "a", "<0xB8><0x81>"]),
    "cut off": (["<0xE4><0xB8>"], ["<0xE4><0xB8>"]),
    "no bytes": (["The", " <b>", "", "\u0948"], ["The", " <b>", "", "\u0948"]),
}
