import pytest
import torch

from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.shards import Shards
from train.clock import Clock
from train.data import TokenStore, cache_shards, load_tokenizer
from train.gradcache import accumulate_gradient
from train.loss import LossConfig
from train.measures import by_name
from train.model import StudentConfig, build_student


class TorchStudent:
    """Torch alone: what the engine does on one rank."""

    def __init__(self, model):
        self.model = model
        self.num_graphs = 0
        self.encoded = []
        self.clock = Clock(torch.device("cpu"))

    def encode(self, input_ids, attention_mask):
        self.num_graphs += torch.is_grad_enabled()
        embedding = self.model(input_ids, attention_mask)
        self.encoded.append(embedding.detach())
        return embedding

    def backward(self, loss):
        loss.backward()


@pytest.fixture
def setting(shards, tmp_path, architecture):
    artifact, _ = shards
    tokenizer = load_tokenizer(Shards([artifact]))
    index = Shards([artifact]).index
    plan = Plan(index, BatchingConfig(strategy="random", global_batch_size=32))
    store = TokenStore(
        cache_shards(Shards([artifact]), tmp_path / "cache", False), index, tokenizer.pad_token_id
    )

    def gradient(micro_batch_size, dropout, compiled=False, **changes):
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = StudentConfig(architecture={**architecture, **rates, **changes})
        student = TorchStudent(build_student(config, tokenizer, 64, seed=1, compiled=compiled))
        torch.manual_seed(5)
        batch = store.read(plan.step(1, 2).rows, 0, 1, micro_batch_size)
        measures = accumulate_gradient(student, batch, LossConfig(temperature=0.05))
        return (
            torch.cat([weight.grad.ravel() for weight in student.model.parameters()]),
            measures,
            student,
            batch,
        )

    return gradient


@pytest.mark.parametrize("micro_batch_size", [32, 16, 7, 1])
def test_cached_gradient_equals_plain(setting, micro_batch_size):
    plain, plain_measures, _, batch = setting(32, 0.0)
    cached, measures, student, _ = setting(micro_batch_size, 0.0)
    assert len(batch.query.micro_batches) == 1
    assert student.num_graphs == 2 * -(-32 // micro_batch_size)  # one micro-batch's graph at a time
    assert float((cached - plain).norm() / plain.norm()) < 1e-6
    torch.testing.assert_close(measures, plain_measures, rtol=1e-5, atol=1e-6)
    assert by_name(measures)["masked_fraction"] > 0


def test_cached_gradient_is_that_of_its_own_dropout(setting):
    """With dropout the second pass must drop what the first dropped: check against finite
    differences.
    """
    _, measures, student, batch = setting(8, 0.3)
    weight = student.model.backbone.encoder.layer[0].output.dense.weight
    direction = weight.grad / weight.grad.norm()
    losses = []
    for sign in (1, -1):
        weight.data += sign * 1e-2 * direction
        torch.manual_seed(5)
        losses.append(
            float(
                accumulate_gradient(_Forward(student.model), batch, LossConfig(temperature=0.05))[0]
            )
        )
        weight.data -= sign * 1e-2 * direction
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=0.05)
    torch.manual_seed(5)
    assert float(
        accumulate_gradient(_Forward(student.model), batch, LossConfig(temperature=0.05))[0]
    ) == pytest.approx(float(measures[0]), rel=1e-6)


SMALLER = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
}  # half a minute each to compile


def test_a_compiled_student_has_the_same_gradient_and_names(setting):
    plain, plain_measures, uncompiled, _ = setting(32, 0.0, **SMALLER)
    cached, measures, student, _ = setting(7, 0.0, compiled=True, **SMALLER)
    assert float((cached - plain).norm() / plain.norm()) < 1e-5  # fused kernels round differently
    torch.testing.assert_close(measures, plain_measures, rtol=1e-5, atol=1e-6)
    assert list(student.model.state_dict()) == list(uncompiled.model.state_dict())


def test_a_compiled_student_drops_the_same_in_both_passes(setting):
    _, _, student, batch = setting(7, 0.3, compiled=True, **SMALLER)
    half = len(student.encoded) // 2
    first, second = (
        torch.cat(passed) for passed in (student.encoded[:half], student.encoded[half:])
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    student.encode(*batch.query.micro_batches[0])
    assert (
        float((student.encoded[-1] - student.encoded[0]).abs().max()) > 1e-3
    )  # dropout is at work


class _Forward(TorchStudent):
    """Encodes as usual, and takes no step back: only the loss is wanted."""

    def backward(self, loss):
        pass
