"""A probe whose characters are cut into bytes is legible on the page, and its tokens tell them."""

import numpy as np
import pytest

from tests.browser import needs_browser
from tests.byte_names import CASES, HE_IS, SCIENTIST
from tests.page.pages import page_of
from tlens_callback.reading import Reading

pytestmark = needs_browser()

TOKENS = [token for tokens, _ in CASES.values() for token in [*tokens, " |"]]
UNSEEN = ["a\u200db", "\u202eab", "\u200d"]
WORDS = [word for _, words in CASES.values() for word in [*words, " |"]]


@pytest.fixture
def page(tab, opens):
    loss = Reading(
        key="token_loss/loss/p",
        values=np.arange(len(TOKENS + UNSEEN)),
        axes=("pos",),
        unit="nats",
        labels={"pos": TOKENS + UNSEEN},
    )
    return opens(page_of(tab[2], {0: [loss]}))


def test_neighbouring_bytes_are_joined_for_reading(page):
    shown = page.locator("#strip .token").all_text_contents()
    assert [text.replace("\u00b7", " ").replace("\u2205", "") for text in shown][
        : -len(UNSEEN)
    ] == WORDS
    assert HE_IS in "".join(shown) and SCIENTIST in "".join(shown)


def test_a_token_tells_its_bytes_and_its_character(page):
    title = page.locator("#whichtoken")
    for case in ("each byte", "marks"):
        tokens, words = CASES[case]
        first = TOKENS.index(tokens[0]) if case == "each byte" else TOKENS.index("<0xE0><0xA4>")
        for i in range(len(tokens)):
            page.locator("#strip .token").nth(first + i).hover()
            of = next(word for word in reversed(words[: i + 1]) if word)
            assert title.inner_text() == f"{first + i} {tokens[i]} of {of}"
    page.locator("#strip .token").nth(TOKENS.index("The")).hover()
    assert title.inner_text() == f"{TOKENS.index('The')} The"


def test_what_cannot_be_seen_is_still_an_escape(page):
    """But the joiner between two emoji, which makes one of them."""
    shown = page.locator("#strip .token").all_text_contents()
    assert [text for text in shown if text.startswith("\\u") or "a\\" in text] == [
        *("a\\u200db", "\\u202eab", "\\u200d"),
    ]
