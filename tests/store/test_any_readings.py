"""Whatever is written to a store comes back from it, through rewritten steps and torn files."""

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.sinks.samples import everything, pattern, same, small
from tests.strategies import runs
from tlens_callback import LocalSink, read_store
from tlens_callback.reading import Reading
from tlens_callback.store.store import arrays_file, scores_file


@given(runs(), st.booleans())
@pytest.mark.slow
def test_readings_come_back_as_they_were_and_in_order(steps, exact):
    with tempfile.TemporaryDirectory() as folder:
        sink = LocalSink(Path(folder) / "run", exact=exact, page=False)
        for step, readings in enumerate(steps):
            sink.write(readings, step=step)
        store = read_store(sink.path)
        assert store.steps == tuple(range(len(steps)))
        assert list(store.keys) == list(dict.fromkeys(r.key for of in steps for r in of))
        for step, put in enumerate(steps):
            got = store.readings(step)
            assert [r.key for r in got] == [r.key for r in put]
            for one, other in zip(put, got, strict=True):
                causal = one.axes[-2:] == ("query", "key")
                # What half precision may take: 2**-12 of what is at most 1.
                assert same(one, other, atol=0 if exact or not causal else 2**-12)
                assert same(store.reading(one.key, step), other)
        rows = sum(r.values.size for readings in steps for r in readings)
        frame = store.frame()
        assert len(frame) == rows
        put = [r.values.ravel() for readings in steps for r in readings]
        np.testing.assert_array_equal(frame.value.to_numpy(np.float32), np.concatenate([*put, []]))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8),
)
@pytest.mark.slow
def test_a_step_that_is_written_again_takes_the_place_of_all_behind_it(writes):
    """Against a dictionary. A sink that is closed goes on where the last one was."""
    with tempfile.TemporaryDirectory() as folder:
        known: dict[int, float] = {}
        sink = LocalSink(Path(folder) / "run", page=False)
        for value, (step, again) in enumerate(writes):
            if again:
                sink.close()
                sink = LocalSink(Path(folder) / "run", page=False)
            sink.write([Reading(key="a/b", values=float(value), unit="1")], step=step)
            known = {at: of for at, of in known.items() if at < step} | {step: float(value)}
            store = read_store(sink.path)
            steps, values = store.curve("a/b")
            assert store.steps == tuple(sorted(known))
            assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == known
        assert [path.name for path in Path(folder).iterdir()] == ["run"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of three steps: of everything, of attention alone and of nothing."""
    sink = LocalSink(tmp_path_factory.mktemp("whole") / "run", page=False)
    for step, readings in enumerate([everything(), [pattern(1)], []]):
        sink.write(readings, step=step)
    return sink.path


@given(st.integers(0, 2), st.booleans(), st.floats(0, 1, exclude_max=True))
@example(0, False, 4)  # a table begins with the letters that it ends with
@example(2, True, 0)
def test_a_file_cut_anywhere_takes_its_step_away_and_no_other(whole, step, arrays, share):
    file = (arrays_file if arrays else scores_file)(whole, step)
    content = file.read_bytes()
    try:
        file.write_bytes(content[: share if share > 1 else int(share * len(content))])
        store = read_store(whole)
        others = tuple(at for at in range(3) if at != step)
        assert store.steps == others and store.torn == (step,)
        assert [len(store.readings(at)) for at in others] == [
            [len(everything()), 1, 0][at] for at in others
        ]
        assert len(store.frame()) == sum(
            r.values.size for at in others for r in ([small(), [], []][at])
        )
        with pytest.raises(ValueError, match=f"no complete step {step}"):
            store.readings(step)
    finally:
        file.write_bytes(content)
    assert read_store(whole).torn == ()


def test_a_table_with_too_little_room_for_its_footer_is_torn(whole):
    """Such as one cut just behind the bytes PAR1, which a text in it may contain."""
    file = scores_file(whole, 0)
    content = file.read_bytes()
    try:
        file.write_bytes(b"PAR1" + bytes(8) + struct.pack("<I4s", 9, b"PAR1"))
        assert read_store(whole).torn == (0,)
    finally:
        file.write_bytes(content)
