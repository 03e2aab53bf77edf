"""An instrument in a user's own file gets what the package's own get, by what it says of itself."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import wandb

from tests.browser import drawn, needs_browser, opened
from tests.sinks.wandb.wandb_file import history, records, run_file
from tests.training import CAPITAL, trainer
from tlens_callback import (
    Description,
    LocalSink,
    Meaning,
    MemorySink,
    Needs,
    Quantity,
    Reading,
    TLensCallback,
    WandbSink,
    Watch,
    read_store,
)
from tlens_callback.offline.compare_stores import compare_stores
from tlens_callback.offline.summary import summary


@dataclass(frozen=True)
class Own:
    """What somebody else measures. And a second sentence."""

    description: ClassVar[Description] = Description(
        title="Own heads",
        group="Own",
        needs=Needs.BLOCKS,
        measures={
            "size": Meaning(title="Size", axes=(), headline=True),
            "beside": Meaning(title="Beside", axes=()),
            "copying": Meaning(axes=("layer", "head"), quantity=Quantity.HEAD_ROLE, role="copying"),
            "moved": Meaning(
                axes=("layer", "head"), quantity=Quantity.ATTENTION_CHANGE, of_run=True
            ),
            "broken": Meaning(axes=(), alarm="things are broken", of_run=True),
            "answer": Meaning(axes=(), quantity=Quantity.ANSWER_PROBABILITY),
        },
    )

    baseline: dict[str, torch.Tensor] = field(default_factory=dict, init=False, compare=False)
    name: str = "own"

    def taps(self, shadow, batch):
        return {}

    def read(self, taken, shadow, batch) -> Iterable[Reading]:
        looks = self.baseline["looks"] = self.baseline.get("looks", torch.tensor(-1)) + 1
        n, heads = int(looks), np.zeros((shadow.n_layers, shadow.n_heads))
        assert any(probe.block for probe in batch.probes)
        heads[1, 0] = 0.4 * n
        for measure, values in {"copying": heads, "moved": heads}.items():
            key = f"{self.name}/{measure}"
            yield Reading(key=key, values=values, axes=("layer", "head"), unit="probability")
        numbers = {"size": n, "beside": n, "broken": n == 1, "answer/capital": 0.1 + 0.2 * n}
        for measure, value in numbers.items():
            yield Reading(key=f"{self.name}/{measure}", values=float(value), unit="1")

    def between(
        self, first: Mapping[str, Reading], last: Mapping[str, Reading]
    ) -> Iterable[Reading]:
        now, then = last[f"{self.name}/copying"], first[f"{self.name}/copying"]
        yield replace(now, key=f"{self.name}/moved", values=now.values - then.values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The store of a short training, and what was said on the terminal."""
    path = tmp_path_factory.mktemp("own")
    sinks = [LocalSink(path / "tlens"), MemorySink()]
    trainer(
        path, TLensCallback([CAPITAL], instruments=[Own()], sinks=sinks, every_n_steps=1)
    ).train()
    return read_store(path / "tlens")


def test_it_gets_repeated_blocks():
    """Its own `read` demands them; without the word there are none."""
    bare = type("Bare", (Own,), {"description": Description()})
    assert TLensCallback([CAPITAL], instruments=[Own()], sinks=[]).settings.with_blocks
    assert not TLensCallback([CAPITAL], instruments=[bare()], sinks=[]).settings.with_blocks


def test_events_are_raised_about_it(run):
    texts = {step: r.texts.tolist() for step in run.steps if (r := events(run, step)) is not None}
    assert texts[1] == ["new copying head: L1H0 (0.00 -> 0.40)", "1 things are broken"]


def test_its_roles_are_followed_beside_those_of_others():
    """Each role of the first instrument that has it, and no role twice."""
    own, *others = observed_roles("copying"), observed_roles("induction", "head_scores")
    again = observed_roles("induction", "second")
    for steps, said in (
        ([*others, own, again], ["new induction head: L1H0", "new copying head: L1H0"]),
        ([again, own], ["new induction head: L1H0", "new copying head: L1H0"]),
    ):
        watch, texts = Watch(), []
        for i in range(2):
            found = watch.look([reading for at in steps for reading in at[i]])
            texts += [t for r in found if r.texts is not None for t in r.texts.tolist()]
        assert [text.partition(" (")[0] for text in texts] == said
    alone = Watch(scores="own")
    assert not alone.look(own[0])[-1].values and alone.look(own[1])[-1].texts is not None


def observed_roles(role, instrument="own"):
    """Two observations of a role that one head takes."""
    meaning = Meaning(quantity=Quantity.HEAD_ROLE, role=role)
    said = Description(measures={"score": meaning})
    for_step = [np.zeros((2, 3)), np.zeros((2, 3))]
    for_step[1][1, 0] = 0.6
    axes, key = ("layer", "head"), f"{instrument}/score"
    return [
        [Reading(key=key, values=v, axes=axes, unit="probability", description=said)]
        for v in for_step
    ]


def events(store, step):
    found = [r for r in store.readings(step) if r.key == "watch/events"]
    return found[0] if found else None


def test_it_stands_in_the_summary(run):
    text = summary(run)
    assert "P(target) capital 0.100 -> " in text
    assert "Attention moved most: L1H0" in text and "Roles gained: L1H0 copying" in text


def test_two_runs_are_compared_rightly(run):
    """What is of one run is left out, or made anew where the instrument is at hand."""
    pair = compare_stores(run, run, step=1)
    keys = {reading.key for reading in pair.last}
    assert {"own/size", "own/copying"} <= keys and not keys & {"own/moved", "own/broken"}
    (said,) = pair.left_out
    assert "own/moved, own/broken are about one run" in said and "[Own(...)]" in said
    again = compare_stores(run, run, step=1, instruments=[Own()])
    made = {reading.key: reading for reading in again.last}
    assert again.left_out == ()
    assert not made["own/moved"].values.any() and "own/broken" not in made
    assert made["own/moved"].meaning.of_run


def test_wandb_shows_its_headlines(run, offline):
    sink = WandbSink()
    for step in run.steps:
        sink.write(run.readings(step), step=step)
    sink.close()
    wandb.teardown()
    rows = history(run_file(offline))
    keys = {key for row in rows for key in row if key.startswith("tlens/own/")}
    assert keys == {"tlens/own/size"}
    titles = [one.alert.title for one in records(run_file(offline)) if one.HasField("alert")]
    assert "tlens: new copying head: L1H0 (0.00 -> 0.40)" in titles


@needs_browser()
@pytest.mark.slow
def test_the_page_explains_it_and_opens_on_it(run):
    with opened((run.path / "page.html").as_uri()) as (page, faults):
        drawn(page)
        said = page.evaluate("tlens.data.about.instruments.own")
        assert page.evaluate("tlens.state.score") == "own/moved"
        assert "What somebody else measures." in page.content()
        assert faults == []
    assert said["sentence"] == "What somebody else measures." and said["kind"] == "Own"
    assert said == json.loads(json.dumps(run.descriptions(run.steps[-1])["own"].as_json()))
