"""Text on a palette picture: the font Pillow brings, and what to do with what it cannot draw."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tlens_callback.palette import INK, PAPER

RAMP = np.linspace(INK, PAPER, 256).round().astype(np.uint8)
"""[grey level] -> palette slot: how antialiased text in an "L" picture enters a palette one."""


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font; no font has to be installed."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return loaded


@lru_cache(maxsize=10_000)
def _has(char: str) -> bool:
    # A glyph that is missing is drawn as the same box as a code point that no font has.
    return _glyph(char) != _glyph("\U0010ffff")


def _glyph(char: str) -> bytes:
    picture = Image.new("L", (24, 24))
    ImageDraw.Draw(picture).text((2, 2), char, 255, font(12))
    return picture.tobytes()


def drawable(text: str, space: str = "·") -> str:
    """The text with a visible space, and with an escape (`\\n`, `\\u4e2d`) for each character that
    the font cannot draw."""
    return "".join(
        space
        if char == " "
        else char
        if char.isprintable() and _has(char)
        else char.encode("unicode_escape").decode()
        for char in text
    )


def shorten(text: str, width: float, face: ImageFont.FreeTypeFont) -> str:
    """The text, its end cut off where it is wider than `width` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def lines(words: list[str], width: float, size: int = 12) -> list[str]:
    """The words in lines of at most `width` pixels."""
    face = font(size)
    gap = face.getlength("  ")
    out: list[list[str]] = []
    used = width
    for word in words:
        word = shorten(word, width, face)
        long = face.getlength(word)
        if used + gap + long > width:
            out.append([])
            used = -gap
        out[-1].append(word)
        used += gap + long
    return ["  ".join(line) for line in out]
