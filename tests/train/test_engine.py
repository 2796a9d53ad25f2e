"""The engine's DeepSpeed; what it computes is tested in test_ranks.py."""

import os
import subprocess
import sys

ON_CPU = """
import torch
torch.cuda.is_available = lambda: True  # a GPU that this rank was not given, and Ray does not hide
from train.engine import _deepspeed
print(_deepspeed(torch.device("cpu")).accelerator.get_accelerator().device_name())
"""


def test_deepspeed_is_on_the_device_that_was_asked_for_whatever_there_is():
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(
        [sys.executable, "-c", ON_CPU], capture_output=True, text=True, env=environment
    )
    assert result.stdout.split() == ["cpu"], result.stderr
