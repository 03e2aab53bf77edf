"""The page's script reads rounded matrices, and differences of every width, as the bytes say."""

import numpy as np
import pytest

from tests.browser import needs_browser
from tests.page.decode import Page, near
from tests.page.pages import page_of
from tlens_callback.reading import Reading

pytestmark = needs_browser()

STEPS = range(0, 50, 10)


def readings(step):
    """A matrix that is rounded, with both signs and what is no number; and what is not."""
    rng = np.random.default_rng(step)
    start = np.random.default_rng(0).normal(0, 1, (65, 64))
    moved = start * (1 + 0.01 * rng.normal(0, 1, start.shape))
    moved[0, :3] = np.nan, np.inf, -step
    return [
        *(
            Reading(key=f"s/score{i}", values=moved * i, axes=("layer", "head"), unit="logit")
            for i in range(1, 5)
        ),
        Reading(key="s/line", values=moved[:2].ravel(), axes=("neuron",), unit="x"),
    ]


@pytest.fixture(scope="module", params=[None, 310_000], ids=["whole", "rounded"])
def made(request, tab):
    """The address of a page, the page, and how its matrices are encoded."""
    folder = tab[2] / str(request.param)
    folder.mkdir()
    address = page_of(folder, {s: readings(s) for s in STEPS}, most_bytes=request.param)
    kind = "bf16" if request.param else "f16"
    return address, Page((folder / "page.html").read_text()), kind


def test_numbers_are_those_of_the_bytes(made, opens):
    address, decoded, kind = made
    page = opens(address)
    for step in STEPS:
        for reading in readings(step):
            entry = decoded.readings[step][reading.key]
            assert entry["type"] == ("f32" if reading.key == "s/line" else kind)
            assert entry["delta"] == (step > 0) and near(entry, reading)
            at = [reading.key, step]
            got = page.evaluate(
                "([key, step]) => [...tlens.data.values(key, step)].map(String)", at
            )
            wanted = entry["values"].ravel()
            assert np.array_equal(np.array(got, np.float64), wanted, equal_nan=True)
            one = page.evaluate("([key, step]) => String(tlens.data.number(key, step, 5))", at)
            assert float(one) == wanted[5]


def test_the_page_says_whether_it_rounds(made, opens):
    address, _, kind = made
    said = opens(address).locator("#notes").inner_text()
    assert ("rounded to 8 binary digits" in said) == (kind == "bf16")
