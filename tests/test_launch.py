"""The configurations of examples/accelerate are those that `accelerate launch` reads."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.processes import torchrun
from tests.test_examples import small  # noqa: F401
from tlens_callback import read_store

FOLDER = Path(__file__).parent.parent / "examples" / "accelerate"
SAYS = {
    "ddp": {},
    "fsdp1": {"FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": "true"},
    "fsdp2": {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
}


def test_each_engine_has_one():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*SAYS, "zero2", "zero3"}


@pytest.mark.parametrize("engine", SAYS)
def test_what_a_script_is_told(engine):
    arguments = ["--config_file", str(FOLDER / f"{engine}.yaml"), "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    told = prepare_multi_gpu_env(args)
    assert ("ACCELERATE_USE_FSDP" in told) == engine.startswith("fsdp")
    assert {key: told[key] for key in SAYS[engine]} == SAYS[engine]
    # The examples save checkpoints for `tlens-callback analyze`, which reads whole ones.
    assert told.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT") == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage):
    config = load_config_from_file(str(FOLDER / f"zero{stage}.yaml"))
    assert config.distributed_type.value == "DEEPSPEED" or config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == stage


@pytest.mark.slow
def test_an_example_runs_sharded_as_it_is(small, tmp_path):  # noqa: F811
    config, script = FOLDER / "fsdp2.yaml", FOLDER.parent / "sft_lora.py"
    arguments = ["--model", small, "--steps", "2", "--every", "1", "--output-dir", "out"]
    done = subprocess.run(
        [*torchrun(2), "-m", "tests.launched", str(config), str(script), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded over 2 processes (FSDP2)") == 1
    assert done.stdout.count("probability of the target, by step") == 1
    assert read_store(tmp_path / "out" / "tlens").steps == (0, 1, 2)
