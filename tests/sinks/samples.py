"""Readings of every shape that the package's instruments emit, a function of the step alone."""

import numpy as np

from tests.described import as_read
from tlens_callback.reading import Reading

TOKENS = ["<s>", " The", " capital", "\n", "</script>", "中", "😀", '"', "7"]

ODD = [" Paris", "", "\n", "中文 é", "😀", "a\0b", '"{\\u}', "\u2028 \t ", "nan", "7"]
EVENT = "the shadow of Model\nis not the live model: " + "and so on " * 20


def pattern(step=0, probe="capital", layers=2, heads=3):
    """Causal attention over TOKENS, with float32 values that float16 cannot hold."""
    n = len(TOKENS)
    rng = np.random.default_rng([step, len(probe)])
    p = np.tril(np.exp(rng.normal(0, 3, (layers, heads, n, n))))
    reading = Reading(
        key=f"attention_patterns/pattern/{probe}",
        values=p / p.sum(-1, keepdims=True),
        axes=("layer", "head", "query", "key"),
        unit="probability",
        labels={"query": TOKENS, "key": TOKENS, "layer": ["1", "3"][:layers]},
        limits=(0, 1),
    )
    return as_read(reading)[0]


def small(step=0, probe="capital"):
    """Everything but patterns: scalars, matrices, blocks, neurons, an odd limit, an empty one."""
    rng = np.random.default_rng(step)
    matrix = ("layer", "head")
    tokens = {"pos": TOKENS}
    readings = [
        Reading(key="cost/seconds", values=np.array(step + 0.25), unit="seconds"),
        Reading(key=f"target_scores/loss/{probe}", values=np.array(np.nan), unit="nats"),
        Reading(key="head_scores/max_induction", values=np.array(0.1 * step), unit="probability"),
        Reading(
            key="head_scores/induction",
            values=rng.random((2, 3)),
            axes=matrix,
            unit="probability",
            limits=(0, 1),
        ),
        Reading(
            key="head_scores/change",
            values=rng.normal(0, 1, (2, 3)),
            axes=matrix,
            unit="nats",
            limits=(-float("inf"), 2.5),
        ),
        Reading(
            key="head_scores/induction_by_block",
            values=rng.random((3, 2, 3)),
            axes=("block", *matrix),
            unit="probability",
            labels={"block": ["8", "12", "24"]},
        ),
        Reading(
            key=f"top_neurons/neuron/{probe}",
            values=rng.integers(0, 10_000, (2, 4)),
            axes=("layer", "rank"),
            unit="index",
        ),
        Reading(
            key=f"top_neurons/activation/{probe}",
            values=rng.normal(0, 2, (2, 4, len(TOKENS))),
            axes=("layer", "rank", "pos"),
            unit="activation",
            labels=tokens,
        ),
        Reading(key="x/none", values=np.zeros((0, 2)), axes=matrix, unit="count"),
        *named(step, probe),
    ]
    return as_read(*readings)


def named(step=0, probe="capital"):
    """Lines and lists, some with texts: tokens that a lens reads, pairs of heads, events."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, len(ODD), (2, 5))
    return [
        Reading(
            key=f"logit_lens/token/{probe}",
            values=ids,
            axes=("layer", "rank"),
            unit="index",
            texts=np.array(ODD)[ids],
        ),
        Reading(
            key=f"logit_lens/kl/{probe}",
            values=rng.random(2),
            axes=("layer",),
            unit="nats",
            limits=(0, float("inf")),
        ),
        Reading(
            key="virtual_heads/lag_pair",
            values=[7, 3],
            axes=("rank",),
            unit="index",
            texts=np.array(["L1H2*L0H0", ""]),
        ),
        Reading(
            key="watch/events",
            values=[0.31, np.nan],
            axes=("event",),
            unit="event",
            labels={"event": [f"L1H2 has become an induction head ({step})", EVENT]},
        ),
        Reading(key="x/untold", values=np.zeros(0), axes=("rank",), unit="x", texts=np.array([])),
    ]


def everything(step=0):
    """All of the above."""
    return [*small(step), pattern(step), pattern(step, "other probe")]


def same(a, b, *, atol=0.0):
    """Whether two readings are equal; values bit for bit, unless `atol` says otherwise."""
    values = np.array_equal(a.values, b.values, equal_nan=True)
    if atol:
        values = np.allclose(a.values, b.values, rtol=0, atol=atol, equal_nan=True)
    about = [
        (r.key, r.axes, r.unit, dict(r.labels), r.limits, r.values.shape, texts_of(r))
        for r in (a, b)
    ]
    return bool(values) and about[0] == about[1]


def texts_of(reading):
    return None if reading.texts is None else (reading.texts.shape, reading.texts.ravel().tolist())
