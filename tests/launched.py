"""Runs a script as `accelerate launch --config_file CONFIG SCRIPT` does, but on CPUs.

torchrun ... -m tests.launched CONFIG SCRIPT [ARGUMENTS...]
"""

import os
import runpy
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests import engines


def main(config: str, script: str, *arguments: str) -> None:
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", config, script])
    )
    os.environ |= {key: str(value) for key, value in prepare_multi_gpu_env(args).items()}
    # These need GPUs.
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_SYNC_MODULE_STATES": "false"}
    os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "OMP_NUM_THREADS": "1"}
    engines.on_cpus()
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
