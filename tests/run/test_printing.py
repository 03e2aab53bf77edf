"""What is printed is never worth a run, and names are shown and not obeyed."""

import io
import logging
import sys

import pytest
import tqdm

from tests import tiny
from tests.own_loop import Loop, tracer
from tests.training import CAPITAL, Constant, trainer
from tlens_callback import (
    AttentionPatterns,
    MemorySink,
    Probe,
    Reading,
    Rule,
    TargetScores,
    TLensCallback,
    Watch,
)
from tlens_callback.run.printing import print_lines, warn
from tlens_callback.shadow.bar import with_bar
from tlens_callback.visible import visible


class Closed(io.StringIO):
    """A stream that its owner has closed."""

    def __init__(self):
        super().__init__()
        self.close()


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")


STREAMS = [Closed, Full, lambda: None]


@pytest.mark.parametrize("stream", STREAMS, ids=["closed", "full", "none"])
def test_a_stdout_that_takes_nothing_ends_neither_training_nor_watching(
    tmp_path, monkeypatch, stream
):
    memory = MemorySink()
    instruments = [TargetScores(), Constant("late", fail_at=2)]
    callback = TLensCallback([CAPITAL], instruments=instruments, sinks=[memory], every_n_steps=2)
    run = trainer(tmp_path, callback, disable_tqdm=False)  # the trainer itself prints nothing
    run.callback_handler.callbacks = [
        one for one in run.callback_handler.callbacks if type(one).__name__ != "ProgressCallback"
    ]
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    run.train()
    assert run.state.global_step == 6 and list(memory.steps) == [0, 1, 2, 4, 6]
    assert sorted(memory.readings["late/mean"]) == [0]


@pytest.mark.parametrize("stream", STREAMS, ids=["closed", "full", "none"])
def test_a_tracer_s_block_passes_where_nothing_can_be_printed(monkeypatch, stream):
    memory, loop = MemorySink(), Loop(tiny.model("llama"))
    monkeypatch.setattr(sys, "stdout", stream())
    with tracer(loop.model, sinks=[memory], on_error="warn") as watched:
        loop.run(2, watched)
    assert list(memory.steps) == [0, 1, 2]


def test_a_warning_that_cannot_be_logged_does_not_raise(monkeypatch):
    class Raises(logging.Handler):
        def emit(self, record):
            raise OSError("no handler")

    logger, handler = logging.getLogger("tlens_callback"), Raises()
    logger.addHandler(handler)
    try:
        with pytest.raises(OSError, match="no handler"):
            logger.warning("so it is")
        warn("tlens: %s", "lost")
    finally:
        logger.removeHandler(handler)


def test_what_a_terminal_would_obey_is_shown_and_letters_of_every_script_stay(capsys):
    obeyed = "a\x1b[2J\x1b]0;title\x07b\x9b1mc\rd\x08e\u202ef\u2066g\x7f\ud800"
    letters = "a tab\tand é 漢字 👩\u200d🔬 हिन्दी \u0645\u06cc\u200c\u062e\u0648"
    print_lines([f"tlens: {obeyed}", letters])
    shown, plain = capsys.readouterr().out.splitlines()
    assert shown == (
        r"tlens: a\x1b[2J\x1b]0;title\x07b\x9b1mc\rd\x08e\u202ef\u2066g\x7f" + r"\ud800"
    )
    assert plain == letters
    assert visible("two\nlines") == "two\nlines"


class Counts(Constant):
    def read(self, taken, shadow, batch):
        name = batch.probes[0].name
        yield Reading(key=f"{self.name}/calls/{name}", values=float(self.calls), unit="count")


def test_names_of_probes_in_events_and_warnings_are_shown(capsys, caplog):
    loop = Loop(tiny.model("llama"))
    evil = Probe("evil\x1b[2J", "the capital of France is")
    watch = Watch(rules=[Rule("counts/calls/evil\x1b[2J", above=2.5)])
    bad = Constant("bad", fail_at=2, error=RuntimeError("no\x1b[2Jt"))
    settings = dict(probes=[evil], watch=watch, on_error="warn")
    with tracer(loop.model, instruments=[Counts("counts"), bad], **settings) as watched:
        loop.run(2, watched)
    said = capsys.readouterr().out + "".join(r.getMessage() for r in caplog.records)
    assert r"evil\x1b[2J" in said and r"no\x1b[2Jt" in said and "\x1b" not in said


def test_no_thread_and_no_exit_function_of_a_bar_stays_after_training(tmp_path, monkeypatch):
    made = []

    class Monitor:  # the thread, which registers an exit function of its own
        def __init__(self, *args):
            made.append(self)

        def report(self):
            return True

    monkeypatch.setattr(tqdm.std, "TMonitor", Monitor)
    monkeypatch.setattr(tqdm.tqdm, "monitor", None)
    trainer(tmp_path, TLensCallback([CAPITAL], sinks=[]), max_steps=1).train()
    assert not made
    list(tqdm.tqdm([1], disable=False))
    assert made, "the control: another bar leaves one"


@pytest.mark.parametrize("stream", STREAMS, ids=["closed", "full", "none"])
def test_a_bar_that_cannot_be_drawn_still_counts(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(with_bar(range(3), desc="tlens: weights")) == [0, 1, 2]


@pytest.mark.parametrize("tokens", [16, 1500])
def test_an_observation_that_takes_much_memory_says_so_once_at_the_start(capsys, tokens):
    model = tiny.model("llama", num_hidden_layers=2, max_position_embeddings=2048)
    probe = Probe("long", [3 + i % 90 for i in range(tokens)])
    patterns = AttentionPatterns(most=2**25)
    with tracer(model, probes=[probe], instruments=[patterns], sinks=[]):
        pass
    lines = [line for line in capsys.readouterr().out.splitlines() if "MiB, " in line]
    expected = 2 * 4 * 1500**2 * 4 / 2**20  # layers, heads, patterns, float32
    assert len(lines) == (tokens == 1500)
    if lines:
        assert f"{expected:.0f} of them those of attention_patterns" in lines[0]
        assert "long, has 1500 tokens" in lines[0]


@pytest.mark.parametrize("tokens", [16, 1500])
def test_patterns_that_are_pooled_are_named_once_at_the_start(capsys, tokens):
    model = tiny.model("llama", num_hidden_layers=2, max_position_embeddings=2048)
    probe = Probe("long", [3 + i % 90 for i in range(tokens)])
    with tracer(model, probes=[probe], instruments=[AttentionPatterns()], sinks=[]) as traced:
        del traced
    lines = [line for line in capsys.readouterr().out.splitlines() if "pooled" in line]
    assert len(lines) == (tokens == 1500)
    assert all("'long'" in line and "2 by 2 tokens" in line for line in lines)
