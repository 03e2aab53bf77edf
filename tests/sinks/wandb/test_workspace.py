"""The saved view: its panels are of keys that a run has."""

import inspect
import re
import sys

import pytest
import wandb

from tests.rollouts.trained import distinct, short, watched
from tests.sinks.wandb.test_training import FILES, NUMBERS, SOMETIMES
from tests.sinks.wandb.wandb_file import history, run_file
from tlens_callback import WandbSink
from tlens_callback.sinks.shown import Keys
from tlens_callback.sinks.wandb.workspace import (
    REPEATED,
    Logged,
    build,
    logged_by,
    split_project,
    unreachable,
)

# Of pydantic's, in wandb-workspaces 0.4.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def panels(view):
    model = view._to_model().model_dump(by_alias=True, mode="json")
    return {s["name"]: s["panels"] for s in model["spec"]["section"]["panelBankConfig"]["sections"]}


def test_sections_are_in_an_order_to_look_through():
    view = build("me", "it", probes=["capital", "b"])
    assert view.auto_generate_panels is False, "no other panels beside these"
    shown = panels(view)
    order = "Training Events Heads Answers Changes Weights Pictures Tables Page".split()
    assert list(shown) == order and all(shown.values())
    loss = shown["Training"][0]["config"]
    assert loss["xAxis"] == "train/global_step" and loss["metrics"] == ["train/loss", "eval/loss"]
    pictures = [panel["config"] for panel in shown["Pictures"]]
    assert [p["mediaKeys"] for p in pictures] == [
        ["tlens/attention_patterns/pattern/capital"],
        ["tlens/attention_patterns/pattern/b"],
    ]
    assert {p["gallerySettings"]["axis"] for p in pictures} == {"step"}
    assert shown["Page"][0]["config"]["mediaKeys"] == ["tlens/page"]


def keys_of(shown):
    for section in shown.values():
        for panel in section:
            yield from panel["config"].get("metrics") or ()
            yield from panel["config"].get("mediaKeys") or ()


def test_every_key_is_one_that_the_sink_logs():
    """In a real run, with nothing set: see `test_training`."""
    numbers = {f"tlens/{key}" for key in (*NUMBERS, *SOMETIMES)}
    # The heads that it pins are those of its model.
    numbers.add("tlens/watch/induction_L1H0")
    files = {f"tlens/{key}" for key in (*FILES, "page", "watch/event_table")}
    shown = panels(build("me", "it", probes=["capital", REPEATED]))
    own = [key for key in keys_of(shown) if key.startswith("tlens/")]
    assert set(own) <= numbers | files and len(set(own)) == len(own)
    assert files <= set(own), "every file has its panel"
    patterns = patterns_of(shown)
    for pattern in patterns:
        assert any(re.search(pattern, key) for key in numbers), pattern
    seen = {key for key in numbers for pattern in patterns if re.search(pattern, key)} | set(own)
    assert numbers - seen == {"tlens/fidelity/kl"}, "every curve has its panel"


def patterns_of(shown):
    configs = [panel["config"] for section in shown.values() for panel in section]
    return [config["metricRegex"] for config in configs if config.get("useMetricRegex")]


def test_an_instrument_of_somebody_else_has_its_panels():
    logged = Logged(numbers=["mine/a.b/p", "mine/a.b/q", "mine/c"], media=["mine/heads"])
    shown = panels(build("me", "it", logged=logged))["Others"]
    titles = [panel["config"].get("chartTitle") for panel in shown]
    assert titles == ["mine/a.b", "mine/c", "mine/heads"]
    first, second = patterns_of({"": shown})
    assert re.search(first, "tlens/mine/a.b/q") and not re.search(first, "tlens/mine/aXb/q")
    assert re.search(second, "tlens/mine/c") and not re.search(second, "tlens/mine/c2")
    assert list(keys_of({"": shown})) == ["tlens/mine/heads"]
    assert "Others" not in panels(build("me", "it", logged=Logged()))


def test_rollouts_have_a_section_with_the_curves_first(offline):
    view = panels(build("me", "it", logged=Logged(rollouts=True)))
    assert [*view].index("Rollouts") < [*view].index("Heads")
    assert "Rollouts" not in panels(build("me", "it", logged=Logged()))
    shown = view["Rollouts"]
    kinds = [panel["viewType"] for panel in shown]
    assert kinds == ["Run History Line Plot"] * 12 + ["Weave", "Media Browser"]
    assert shown[0]["config"]["chartTitle"] == "Mean reward of the rollouts looked at"
    keys = {*keys_of({"": shown}), queried(shown[12])}
    # `off_policy` is known with vLLM only, `update_gain` with Rollouts(after_update=True).
    sinks, some = [WandbSink()], {"after_update": True}
    watched(offline / "out", rewards=(distinct, short), sinks=sinks, rollouts=some)
    wandb.teardown()
    own = {key for row in history(run_file(offline)) for key in row if "/rollouts/" in key}
    assert keys == own | {"tlens/rollouts/off_policy"}


def queried(panel):
    return panel["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


def test_a_probe_has_the_key_that_the_sink_gives_it():
    odd = "what is 2+2?"
    (picture,) = panels(build("me", "it", probes=[odd]))["Pictures"]
    key = Keys("tlens")(f"attention_patterns/pattern/{odd}")
    assert "?" not in key and picture["config"]["mediaKeys"] == [key]


def test_the_name_of_the_callback_is_in_every_key():
    keys = list(keys_of(panels(build("me", "it", name="slow-2"))))
    ours = [key for key in keys if not key.startswith(("train/", "eval/"))]
    assert ours and all(key.startswith("slow-2/") for key in ours)
    with pytest.raises(ValueError, match="letters, digits"):
        build("me", "it", name="a b")


@pytest.mark.parametrize("text", ["project", "a/b/c", "/b", "a/", "a b/c", ""])
def test_a_project_has_two_names(text):
    with pytest.raises(ValueError, match=r"ENTITY/PROJECT"):
        split_project(text)
    assert split_project("my-team/my.project") == ("my-team", "my.project")


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ImportError, match=r"pip install 'tlens-callback\[workspace\]'"):
        build("me", "it")


def test_says_why_nothing_can_be_saved(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE is offline" in str(unreachable())
    monkeypatch.delenv("WANDB_MODE")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    assert "wandb login" in str(unreachable())
    monkeypatch.setattr("wandb.login", lambda prompt: True)
    assert unreachable() is None


def test_what_the_latest_run_has_logged(monkeypatch):
    class Run:
        def __init__(self):
            self.summary = {
                "train/loss": 1,
                "tlens/attention_patterns/pattern/b": {},
                "tlens/attention_patterns/pattern/a c": {},
                "tlens/head_scores/max_induction": 0.1,
                "tlens/cost/share": 0.1,
                "tlens/watch/count": 0,
                "tlens/page": {},
                "tlens/rollouts/reward_mean": 1.0,
                "tlens/rollouts/rollout_table": {},
                "tlens/mine/x/b": 1.0,
                "tlens/mine/heads": {"_type": "plotly-file"},
                "slow/attention_patterns/pattern/d": {},
            }

    asked = inspect.signature(wandb.Api.runs)

    class Api:
        def runs(self, *given, **more):
            settings = asked.bind(self, *given, **more).arguments
            assert settings["path"] == "me/it"
            runs = [Run(), type("Older", (), {"summary": {}})]
            # W&B's own default is the oldest first.
            return iter(runs if settings.get("order") == "-created_at" else runs[::-1])

    monkeypatch.setattr("wandb.Api", Api)
    own = Logged(["a c", "b"], numbers=["mine/x/b"], media=["mine/heads"], rollouts=True)
    assert logged_by("me", "it", name="tlens") == own
    assert logged_by("me", "it", name="slow") == Logged(probes=["d"], numbers=[], media=[])
    monkeypatch.setattr(Api, "runs", lambda *_, **__: iter([]))
    assert logged_by("me", "it", name="tlens") == Logged()
