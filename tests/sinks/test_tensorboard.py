"""TensorBoard's event files are read back with its own reader, and its page is opened."""

import html
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.browser import needs_browser, opened
from tests.sinks.samples import ODD, everything, pattern, small
from tests.training import CAPITAL, trainer
from tlens_callback import LocalSink, TLensCallback
from tlens_callback.instruments import AttentionPatterns, HeadScores, LogitLens
from tlens_callback.reading import Reading
from tlens_callback.render import mosaic
from tlens_callback.render.score_panels import curves_as_rows
from tlens_callback.render.scores_png import score_picture
from tlens_callback.sinks import TensorBoardSink
from tlens_callback.sinks.event_file import EventFile

pytest.importorskip("tensorboard")


def read(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything_kept = {"images": 0, "scalars": 0, "tensors": 0}
    return EventAccumulator(str(path), size_guidance=everything_kept).Reload()


def text_of(event):
    return event.tensor_proto.string_val[0].decode()


class Table(HTMLParser):
    """The cells of the tables in a page, row by row."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data != "\n":
            self.rows[-1][-1] += data


def page_of(event):
    """A text event as TensorBoard shows it."""
    with warnings.catch_warnings():
        # Its copy of html5lib warns of itself when it is loaded (TensorBoard 2.21).
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugin_util import markdown_to_safe_html
    return markdown_to_safe_html(text_of(event))


def shown(event):
    return Table(page_of(event))


def scalar(step):
    return Reading(key="head_scores/max", values=np.array(float(step)), unit="probability")


def steps(path):
    """[(step, value)] of what `scalar` wrote."""
    return [(event.step, event.value) for event in read(path).Scalars("tlens/head_scores/max")]


def test_what_an_observation_becomes(tmp_path):
    class Store:
        def page(self):
            return tmp_path / "my_page.html"

    sink = TensorBoardSink(tmp_path / "tb", store=Store())
    for step in (5, 9):
        sink.write(everything(step), step=step)
    sink.close()
    sink.close()
    assert f"tensorboard --logdir {tmp_path / 'tb'}" in str(sink)
    found = read(tmp_path / "tb")
    tags = found.Tags()
    assert set(tags["scalars"]) == {
        "tlens/cost/seconds",
        "tlens/target_scores/loss/capital",
        "tlens/head_scores/max_induction",
    }
    assert [(e.step, e.value) for e in found.Scalars("tlens/cost/seconds")] == [
        (5, 5.25),
        (9, 9.25),
    ]
    assert np.isnan([e.value for e in found.Scalars("tlens/target_scores/loss/capital")]).all()
    pictures = {
        "attention_patterns/pattern/capital": lambda step: mosaic(pattern(step), step=step),
        "attention_patterns/pattern/other probe": lambda step: mosaic(
            pattern(step, "other probe"), step=step
        ),
        "head_scores/heads": lambda step: score_picture(
            [r for r in small(step) if r.axes == ("layer", "head") and r.values.size], step=step
        ),
        "logit_lens/by_layer": lambda step: score_picture(
            curves_as_rows([r for r in small(step) if r.key == "logit_lens/kl/capital"]), step=step
        ),
    }
    assert set(tags["images"]) == {f"tlens/{key}" for key in pictures}
    for key, drawn in pictures.items():
        events = found.Images(f"tlens/{key}")
        assert [(e.step, e.encoded_image_string) for e in events] == [
            (step, drawn(step)) for step in (5, 9)
        ]
    assert set(tags["tensors"]) == {
        "tlens/head_scores/induction",
        "tlens/head_scores/change",
        "tlens/top_neurons/table",
        "tlens/logit_lens/table",
        "tlens/virtual_heads/rank_table",
        "tlens/watch/event_table",
        "tlens/page",
    }
    for event in found.Tensors("tlens/head_scores/induction"):
        buckets = np.array(
            event.tensor_proto.double_val or np.frombuffer(event.tensor_proto.tensor_content)
        ).reshape(-1, 3)
        values = next(r for r in small(event.step) if r.key == "head_scores/induction").values
        assert buckets[:, 2].sum() == values.size
        assert np.allclose([buckets[0, 0], buckets[-1, 1]], [values.min(), values.max()])
    for event in found.Tensors("tlens/logit_lens/table"):
        texts = next(r for r in small(event.step) if r.key == "logit_lens/token/capital").texts
        head, *rows = shown(event).rows
        assert head == ["probe", "layer", "rank", "token", "token_id"]
        assert [row[2] for row in rows] == [str(i) for i in range(5)] * 2
        assert [row[3] for row in rows] == [visible(text) for text in texts.ravel()]
    events = [shown(event).rows[1:] for event in found.Tensors("tlens/watch/event_table")]
    assert [rows[0] for rows in events] == [
        ["0", f"L1H2 has become an induction head ({step})", "0.31"] for step in (5, 9)
    ]
    (page,) = found.Tensors("tlens/page")
    assert page.step == 9
    assert str(tmp_path / "my_page.html") in html.unescape(page_of(page))


def visible(text):
    """How a token is written: a space at an end as a dot, what has no shape as its escape."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub("^ +| +$", lambda found: "·" * len(found[0]), seen)


def test_a_token_is_text_whatever_it_holds(tmp_path):
    tokens = [
        *ODD,
        "|",
        "a | b",
        "`code`",
        "**bold**",
        "<b>",
        "</table>",
        "[x](http://y)",
        "&lt;",
        "\\|",
        "_a_",
        "|\n|",
    ]
    reading = Reading(
        key="logit_lens/token/a|b",
        values=[range(len(tokens))],
        axes=("layer", "rank"),
        unit="index",
        texts=np.array([tokens]),
    )
    sink = TensorBoardSink(tmp_path)
    sink.write([reading], step=0)
    sink.close()
    (event,) = read(tmp_path).Tensors("tlens/logit_lens/table")
    table = shown(event)
    assert table.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    at = table.rows[0].index("token")
    assert [row[at] for row in table.rows[1:]] == [visible(token) for token in tokens]
    assert {row[0] for row in table.rows[1:]} == {"a|b"}


def test_a_tag_is_of_one_kind(tmp_path):
    """What TensorBoard would otherwise take for one series of two kinds."""
    matrix = ("layer", "head")
    sink = TensorBoardSink(tmp_path)
    sink.write(
        [
            Reading(key="mine/heads", values=np.ones((2, 2)), axes=matrix, unit="x"),
            Reading(key="mine/table", values=1.0, unit="x"),
            Reading(key="mine/list", values=[[1, 2]], axes=("layer", "rank"), unit="x"),
        ],
        step=0,
    )
    sink.close()
    tags = read(tmp_path).Tags()
    assert [tags[kind] for kind in ("images", "scalars")] == [
        ["tlens/mine/heads_2"],
        ["tlens/mine/table"],
    ]
    assert set(tags["tensors"]) == {"tlens/mine/heads", "tlens/mine/table_2"}


def test_a_long_table_says_what_it_leaves_out(tmp_path):
    ranks = np.arange(500).reshape(10, 50)
    reading = Reading(key="n/activation", values=ranks, axes=("layer", "rank"), unit="activation")
    sink = TensorBoardSink(tmp_path)
    sink.write([reading], step=0)
    sink.close()
    (event,) = read(tmp_path).Tensors("tlens/n/table")
    assert len(text_of(event).splitlines()) == 2 + 100 + 2
    assert "The first 100 of 500 rows" in text_of(event)


def test_what_the_trainer_logs_is_left_to_its_own_curves(tmp_path):
    theirs = Reading(
        key="trainer/loss",
        values=[1, 2],
        axes=("update",),
        unit="as logged",
        labels={"update": ["1", "2"]},
    )
    sink = TensorBoardSink(tmp_path, name="mine")
    sink.write([theirs, scalar(2)], step=2)
    sink.close()
    tags = read(tmp_path).Tags()
    assert (tags["scalars"], tags["tensors"]) == (["mine/head_scores/max"], [])


def test_a_step_is_readable_once_it_is_written(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in (0, 3):
        sink.write([scalar(step)], step=step)
        assert steps(tmp_path)[-1] == (step, step)
    sink.close()


def test_a_disk_that_is_full_leaves_no_file_open(tmp_path, monkeypatch):
    def full(file, records):
        opened_.append(file)
        raise OSError("no space left")

    opened_ = []
    monkeypatch.setattr(EventFile, "add", full)
    sink = TensorBoardSink(tmp_path)
    with pytest.raises(OSError, match="no space"):
        sink.write([scalar(0)], step=0)
    sink.close()
    assert [file._file.closed for file in opened_] == [True]


def test_what_a_user_can_get_wrong(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        TensorBoardSink(file)
    with pytest.raises(ValueError, match="0 or more"):
        TensorBoardSink(tmp_path).write([], step=-1)


@pytest.mark.slow
def test_it_needs_neither_torchs_writer_nor_tensorflow():
    code = (
        "import sys, tlens_callback\n"
        "before = {m.split('.')[0] for m in sys.modules}\n"
        "assert not before & {'tensorboard', 'trackio'}, before\n"
        "tlens_callback.TensorBoardSink('x')\n"
        "assert 'torch.utils.tensorboard' not in sys.modules\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def train(tmp_path, monkeypatch):
    """A run of the trainer's own, watched every third step; where ours is."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    sink = TensorBoardSink(tmp_path / "runs" / "tlens")
    callback = TLensCallback(
        [CAPITAL],
        instruments=[AttentionPatterns(), HeadScores(), LogitLens()],
        sinks=[LocalSink(tmp_path / "store"), sink],
        every_n_steps=3,
        on_error="raise",
    )
    trainer(tmp_path, callback, report_to="tensorboard", logging_steps=2).train()
    return sink.path


def test_beside_the_trainers_own_curves(tmp_path, monkeypatch, one_thread):
    ours = read(train(tmp_path, monkeypatch))
    key = "tlens/attention_patterns/pattern/capital"
    assert [event.step for event in ours.Images(key)] == [0, 3, 6]
    assert not any(tag.startswith("train") for tag in ours.Tags()["scalars"])
    theirs = read(tmp_path / "runs")
    assert [event.step for event in theirs.Scalars("train/loss")] == [2, 4, 6]
    assert theirs.Tags()["images"] == []


@contextmanager
def served(path):
    """Address of a TensorBoard that shows this directory."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(path), "--port", "0"]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = ""
            while " at http" not in said:
                said = process.stderr.readline()
                assert said, "TensorBoard ended before it began"
            yield re.search(r"http://\S+", said)[0]
        finally:
            process.terminate()


@needs_browser()
def test_its_page_shows_a_picture(tmp_path, monkeypatch, one_thread):
    train(tmp_path, monkeypatch)
    with (
        served(tmp_path / "runs") as address,
        opened(address, allowed=address) as (page, faults),
    ):
        card = page.locator("image-card").filter(has_text="tlens/attention_patterns").first
        picture = card.locator("img")
        picture.wait_for(timeout=60_000)
        page.wait_for_function("i => i.naturalWidth > 0", arg=picture.element_handle())
        (event, *_) = read(tmp_path / "runs" / "tlens").Images(
            "tlens/attention_patterns/pattern/capital"
        )
        assert picture.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [
            event.width,
            event.height,
        ]
    # TensorBoard 2.21 loads Three.js twice and is warned; 2.18 draws with WebGL, which warns too.
    assert [fault for fault in faults if not re.search(r"Three\.js|WebGL", fault)] == []
