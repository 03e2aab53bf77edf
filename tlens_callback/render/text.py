"""Writes text on a picture with a palette, in the font that Pillow brings."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tlens_callback.palette import INK, PAPER

RAMP = np.linspace(INK, PAPER, 256).round().astype(np.uint8)
"""[grey level] -> palette slot: puts antialiased text of an "L" picture into one with a palette."""


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Loads Pillow's own font, so that no font has to be installed."""
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
    """Makes spaces visible, and writes an escape (`\\n`, `\\u4e2d`) for each character that the
    font cannot draw."""
    return "".join(
        space
        if char == " "
        else char
        if char.isprintable() and _has(char)
        else char.encode("unicode_escape").decode()
        for char in text
    )


def shorten(text: str, width: float, face: ImageFont.FreeTypeFont) -> str:
    """Cuts off the end of a text that is wider than `width` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def lines(words: list[str], width: float, size: int = 12) -> list[str]:
    """Breaks the words into lines of at most `width` pixels."""
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
