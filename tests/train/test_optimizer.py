"""Learning rates against those of transformers, and the parameter groups."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from train.model import StudentConfig, TokenizerRef, build_student
from train.optimizer import MOMENTS, SCHEDULES, OptimizerConfig, adamw, start_moments

NUM_STEPS = 40
REFERENCES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "wsd": lambda optimizer, warmup, steps: transformers.get_wsd_schedule(
        optimizer, warmup, 12, num_training_steps=steps, decay_type="linear"
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    config = OptimizerConfig(
        learning_rate=0.1, schedule=schedule, warmup_fraction=warmup, decay_fraction=0.3
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    num_warmup = int(warmup * NUM_STEPS)
    reference = REFERENCES[schedule](optimizer, num_warmup, NUM_STEPS)
    for step in range(NUM_STEPS + 1):
        # Theirs begins at 0, which wastes a step; ours is there one step after its warmup would be.
        wanted = (
            0.1 * (step + 1) / (num_warmup + 1) if step < num_warmup else reference.get_last_lr()[0]
        )
        assert config.rate(step, NUM_STEPS) == pytest.approx(wanted, abs=1e-12), step
        optimizer.step()
        reference.step()


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
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


def test_the_settings_name_and_describe_every_schedule():
    described = OptimizerConfig.model_fields["schedule"].description
    assert all(f"{name}: {entry.description}" in described for name, entry in SCHEDULES.items())
    with pytest.raises(ValueError, match="Input should be .*'wsd'"):
        OptimizerConfig(learning_rate=0.1, schedule="square")


@pytest.fixture
def student(tokenizer_folder, architecture):
    tokenizer = TokenizerRef(name=str(tokenizer_folder)).load()
    return build_student(StudentConfig(architecture=architecture), tokenizer, 24, seed=0)


def test_matrices_decay_and_norms_and_biases_do_not(student):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.25, beta1=0.5, beta2=0.75)
    optimizer = adamw(student, config)
    decays = {
        id(weight): group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    found = {name: decays.pop(id(weight)) for name, weight in student.named_parameters()}
    assert not decays
    for name, decay in found.items():
        assert decay == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.25), name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.75)}


def test_moments_that_are_started_are_those_of_a_first_update(student):
    started, fresh = (adamw(student, OptimizerConfig(learning_rate=0.1)) for _ in range(2))
    start_moments(started)
    assert all(set(state) == {"step", *MOMENTS} for state in started.state.values())
    before = [weight.detach().clone() for weight in student.parameters()]
    for weight in student.parameters():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for optimizer in (fresh, started):
        with torch.no_grad():
            for weight, value in zip(student.parameters(), before, strict=True):
                weight.copy_(value)
        optimizer.step()
        found.append(torch.cat([weight.detach().ravel() for weight in student.parameters()]))
    assert torch.equal(*found)
    assert all(torch.equal(*states) for states in _states(fresh, started))


def _states(*optimizers):
    """The same piece of state of each optimizer, for all pieces."""
    first, second = (optimizer.state for optimizer in optimizers)
    return [(first[weight][kind], second[weight][kind]) for weight in first for kind in MOMENTS]
