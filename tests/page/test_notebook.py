"""The page of a run inside a notebook: whole, and with no way out of its frame."""

from html.parser import HTMLParser

import pytest

from tests.browser import needs_browser, opened
from tests.sinks.samples import everything
from tlens_callback import LocalSink, read_store
from tlens_callback.page import page
from tlens_callback.page.notebook import PageView

HOSTILE = """<!doctype html><title>x"'&amp;</title><p id=p>&lt;b&gt; "quoted" 'too' </iframe>
<script>document.getElementById("p").dataset.ran = "yes";
try { parent.document.title = "taken" } catch (error) { document.body.dataset.kept = error.name }
try { localStorage.x = 1 } catch (error) { document.body.dataset.stored = error.name }
</script>"""


@pytest.fixture
def store(tmp_path):
    sink = LocalSink(tmp_path / "run", page=False)
    for step in (0, 10):
        sink.write(everything(step), step=step)
    sink.close()
    return read_store(tmp_path / "run")


def frame(html):
    found = []

    class Frames(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Frames().feed(html)
    ((tag, attributes),) = found
    assert tag == "iframe"
    return attributes


def test_the_frame_holds_the_text_and_nothing_escapes():
    attributes = frame(PageView(HOSTILE, height=333)._repr_html_())
    assert attributes["srcdoc"] == HOSTILE and attributes["height"] == "333"
    assert attributes["sandbox"] == "allow-scripts" and "src" not in attributes


def test_says_its_size_and_saves(tmp_path):
    view = PageView("é" * 1_000_000)
    assert repr(view) == str(view) and "2.0 MB" in repr(view) and len(repr(view)) < 200
    path = view.save(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == view.text
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert PageView("other").save(str(path)).read_text() == "other"


def test_of_a_store(store):
    view = store.page()
    assert isinstance(view, PageView) and len(view.text) == len(page(store))
    assert frame(view._repr_html_())["srcdoc"] == view.text
    assert len(store.page(most_bytes=10**6).text.encode()) <= 10**6


@needs_browser()
def test_in_a_browser(tmp_path):
    file = tmp_path / "book.html"
    file.write_text(f"<!doctype html><title>book</title>{PageView(HOSTILE)._repr_html_()}")
    with opened(file.as_uri(), allowed="about:srcdoc") as (book, faults):
        inside = book.frame_locator("iframe")
        assert inside.locator("#p").get_attribute("data-ran") == "yes"
        assert inside.locator("body").get_attribute("data-kept") == "SecurityError"
        assert inside.locator("body").get_attribute("data-stored") == "SecurityError"
        assert "</iframe>" not in book.title() and book.title() == "book"
        assert book.locator("iframe").count() == 1 and faults == []


@needs_browser()
def test_the_page_of_a_store_works_in_its_frame(store, tmp_path):
    file = tmp_path / "book.html"
    file.write_text(f"<!doctype html><title>book</title>{store.page()._repr_html_()}")
    with opened(file.as_uri(), allowed="about:srcdoc") as (book, faults):
        inside = book.frame_locator("iframe")
        inside.get_by_text("step 10").first.wait_for()
        inside.locator("option", has_text="capital").first.wait_for(state="attached")
        assert "head_scores/induction" in inside.locator("body").inner_text()
        assert faults == []
