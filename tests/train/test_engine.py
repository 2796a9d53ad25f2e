import pytest
import torch

from train.engine import OptimizerConfig

STEPS = 40


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

    config = OptimizerConfig(learning_rate=0.1, schedule=schedule, warmup_fraction=warmup, decay_fraction=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    num_warmup = int(warmup * STEPS)
    if schedule == "wsd":
        reference = get_wsd_schedule(optimizer, num_warmup, 12, num_training_steps=STEPS, decay_type="linear")
    elif schedule == "cosine":
        reference = get_cosine_schedule_with_warmup(optimizer, num_warmup, STEPS)
    else:
        reference = get_linear_schedule_with_warmup(optimizer, num_warmup, STEPS)
    for step in range(STEPS + 1):
        assert config.rate(step, STEPS) == pytest.approx(reference.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        reference.step()


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="add up to more than 1"):
        OptimizerConfig(learning_rate=0.1, schedule="wsd", warmup_fraction=0.5, decay_fraction=0.6)
