"""The page's scripts as text: what a browser would let pass in silence."""

import re
from importlib.resources import files

import pytest

from tlens_callback.page import template

ASSETS = files("tlens_callback.page") / "assets"
SCRIPTS = {
    file.name: file.read_text("utf-8") for file in ASSETS.iterdir() if file.name.endswith(".js")
}


def twice(scripts):
    """Names that are declared at the top of two places: all scripts share one scope."""
    found = [
        name
        for text in scripts.values()
        for name in re.findall(r"^(?:async )?(?:function\*?|const|let|class) (\w+)", text, re.M)
    ]
    return {name for name in found if found.count(name) > 1}


def markup(scripts):
    """Ways to put a text in as markup, to run it, or to ask a network."""
    # A trainer's names begin with "eval_"; the function's does not go on.
    words = (
        r"innerHTML outerHTML insertAdjacentHTML document\.write \beval\b Function\( fetch\( "
        r"XMLHttpRequest"
    )
    return {
        (name, word)
        for name, text in scripts.items()
        for word in words.split()
        if re.search(word, text)
    }


def test_every_script_is_on_the_page():
    assert sorted(SCRIPTS) == sorted(template._SCRIPTS)


def test_no_name_is_declared_twice():
    assert twice(SCRIPTS) == set()


def test_nothing_becomes_markup_runs_or_asks_a_network():
    assert markup(SCRIPTS) == set()


@pytest.mark.parametrize("check, script", [
    (twice, "function fmt(value) {}"),
    (markup, "node.innerHTML = token;"),
    (markup, "(0, eval)(token);"),
])  # fmt: skip
def test_the_checks_find_what_they_are_for(check, script):
    assert check({**SCRIPTS, "another.js": script})
