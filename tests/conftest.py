"""Settings that every test shares.

What takes long to import is imported by who uses it: the process that only hands out the tests to
others does without.
"""

import gc
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.browser import NONE
from tests.sinks import trackio_run  # noqa: F401  sets where trackio writes, before TRL imports it

# Whatever the shell says: nothing is asked of the network, and no run is joined or sent.
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

# The same few examples at each run, on machines of any speed, and nothing kept in the tree. To look
# for more: TLENS_EXAMPLES=2000 scripts/test ..., which draws others each time.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"tlens-hypothesis-{os.getuid()}")
_more = os.environ.get("TLENS_EXAMPLES")
settings.register_profile(
    "tests",
    max_examples=int(_more or 40),
    derandomize=_more is None,
    deadline=None,
    database=None,
    # Not those that look for why, which takes a minute where something fails.
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    # The machine may be slow; what is set up once a test is meant to serve all its examples.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


SEED = int(os.environ.get("TLENS_TEST_SEED", "0"))
"""Another seed makes other models and adapters: no test may rest on the luck of one of them."""


@pytest.fixture(scope="session", autouse=True)
def streamed():
    """With TLENS_TEST_WEIGHTS=streamed, the whole suite runs with weights that are streamed."""
    if os.environ.get("TLENS_TEST_WEIGHTS") == "streamed":
        from tlens_callback.shadow import memory

        memory.SHARE = 0


# Importing is a fifth faster without garbage collection.
gc.disable()


def pytest_collection_finish():
    gc.enable()


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that two processes end at about the same time.

    Slow are, beside the tests that are marked so themselves, those in a browser and those of more
    than a few families of models, as most kinds of adapters (`tests.adapters`): what one leaves out
    while working, with `-m "not slow"`.
    """
    from tests import tiny

    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)
    for item in items:
        given = getattr(item, "callspec", None)
        of = {str(value) for value in given.params.values()} if given else set()
        browser = any(mark.kwargs.get("reason") == NONE for mark in item.iter_markers("skipif"))
        if browser or of.intersection(tiny.FAMILIES[1:]) - {"gpt2", "mixtral"}:
            item.add_marker("slow")


def seed():
    """Adapters and dropout draw from the global states: the same in every run of the tests."""
    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="module")
def earlier_files_are_left_alone():
    """Garbage collection visits only what this file makes, and never again what is there now.

    accelerate collects after every training, which would take 0.6 s for all that is imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def seeded_file(earlier_files_are_left_alone):
    """What fixtures of a file make does not depend on the file that was tested before."""
    seed()


@pytest.fixture(autouse=True)
def seeded(seeded_file):
    seed()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """WANDB_DIR of the test. The wandb service ends with it: it keeps the folder of its start."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    yield tmp_path
    # A run that is not finished keeps hold of stdout, and fails at every print after the teardown.
    wandb.finish()
    wandb.teardown()


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small are slower on several threads; and several processes may be testing."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
