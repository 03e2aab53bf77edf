"""All that is looked at stays on one device, and no reduction keeps the CPU waiting for it.

On a pretend device, which is as strict as a GPU and needs none; it takes a process of its own.
"""

import os
import subprocess
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.marks import exhaustive
from tests.processes import python

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)


def run(*what: str) -> None:
    done = subprocess.run(
        [*python(), "-m", "tests.instruments.devices_script", *what],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("families", "dtypes"),
    [
        ("gpt2", "float32"),
        ("mixtral", "bfloat16"),
        pytest.param("llama,mixtral", "float32", marks=pytest.mark.exhaustive),
        pytest.param("llama,gpt2", "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("gemma2,gpt_neox,opt", "float32,bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_every_instrument_at_first_then_after_training_and_after_a_resume(families, dtypes):
    run("every", families, dtypes)


@pytest.mark.slow
def test_what_a_gpu_refuses_or_waits_for_is_found():
    run("culprits")


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices",
    exhaustive(["far of near", "near of far", "far of far", "near of near"],
               ["far of far", "near of near"]),
)  # fmt: skip
def test_a_model_spread_over_two_devices_reads_as_on_one(devices):
    """The shadow is on the one device, the first layer of the model on the other or the same."""
    run("spread", devices)
