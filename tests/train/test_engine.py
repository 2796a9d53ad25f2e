import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.engine import OptimizerConfig

STEPS = 40


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    from transformers import (
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
        get_wsd_schedule,
    )

    config = OptimizerConfig(
        learning_rate=0.1, schedule=schedule, warmup_fraction=warmup, decay_fraction=0.3
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    num_warmup = int(warmup * STEPS)
    if schedule == "wsd":
        reference = get_wsd_schedule(
            optimizer, num_warmup, 12, num_training_steps=STEPS, decay_type="linear"
        )
    elif schedule == "cosine":
        reference = get_cosine_schedule_with_warmup(optimizer, num_warmup, STEPS)
    else:
        reference = get_linear_schedule_with_warmup(optimizer, num_warmup, STEPS)
    for step in range(STEPS + 1):
        # Theirs begins at 0, which wastes a step; ours is there one step after its warmup would be.
        wanted = (
            0.1 * (step + 1) / (num_warmup + 1) if step < num_warmup else reference.get_last_lr()[0]
        )
        assert config.rate(step, STEPS) == pytest.approx(wanted, abs=1e-12), step
        optimizer.step()
        reference.step()


@given(
    schedule=st.sampled_from(["linear", "cosine", "wsd"]),
    warmup=st.floats(0, 0.7),
    decay=st.floats(0.01, 0.3),
    num_steps=st.integers(1, 300),
)
def test_no_step_is_wasted_at_a_rate_of_0(schedule, warmup, decay, num_steps):
    config = OptimizerConfig(
        learning_rate=0.1, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay
    )
    rates = [config.rate(step, num_steps) for step in range(num_steps)]
    assert min(rates) > 0 and max(rates) == 0.1
    peak = rates.index(0.1)
    assert peak == int(warmup * num_steps)
    assert all(rates[step] < rates[step + 1] for step in range(peak))
    assert all(rates[step] >= rates[step + 1] for step in range(peak, num_steps - 1))


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="add up to more than 1"):
        OptimizerConfig(learning_rate=0.1, schedule="wsd", warmup_fraction=0.5, decay_fraction=0.6)


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
