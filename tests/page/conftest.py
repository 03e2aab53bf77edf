"""One browser a module, and the run of `five_steps` in it."""

import pytest

from tests.browser import opened
from tests.page.five_steps import STEPS, readings, settled
from tests.page.pages import page_of


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    with opened("about:blank", allowed=folder.as_uri()) as (page, faults):
        yield page, faults, folder


@pytest.fixture(scope="module")
def run(tab):
    folder = tab[2] / "run"
    folder.mkdir()
    return page_of(folder, {step: readings(step) for step in STEPS})


@pytest.fixture
def opens(tab):
    """Opens an address anew in the module's browser; afterwards nothing has gone wrong in it."""
    page, faults, _ = tab

    def at(address):
        page.goto("about:blank")
        page.mouse.move(700, 990)
        page.goto(address)
        page.wait_for_selector("#title:not(:empty)")
        settled(page)
        return page

    yield at
    assert faults == []
