import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.loss import MEASURES, false_negatives, info_nce


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dense(query, passage, positive, masked, temperature):
    """The definition, one query at a time, in float64; returns the loss and its gradients."""
    query, passage = (tensor.detach().double().requires_grad_() for tensor in (query, passage))
    losses = []
    for row in range(len(query)):
        kept = [column for column in range(len(passage)) if column == positive[row] or not masked[row, column]]
        logits = torch.stack([(query[row] * passage[column]).sum() / temperature for column in kept])
        losses.append(torch.logsumexp(logits, 0) - logits[kept.index(int(positive[row]))])
    loss = torch.stack(losses).mean()
    return loss, torch.autograd.grad(loss, (query, passage))


@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradients_equal_the_dense_definition(temperature, share):
    query, passage = unit(6, 16).requires_grad_(), unit(15, 16, seed=1).requires_grad_()
    positive = torch.tensor([3, 4, 5, 6, 7, 8])
    masked = torch.rand(6, 15, generator=torch.Generator().manual_seed(2)) < share
    output = info_nce(query, passage, positive, masked, temperature)
    expected, gradients = dense(query, passage, positive, masked, temperature)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for found, reference in zip(torch.autograd.grad(output.loss, (query, passage)), gradients, strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-6)


def test_without_masks_it_is_cross_entropy():
    query, passage = unit(8, 4), unit(8, 4, seed=1)
    output = info_nce(query, passage, torch.arange(8), torch.eye(8).bool(), 0.1)
    torch.testing.assert_close(output.loss, F.cross_entropy(query @ passage.T / 0.1, torch.arange(8)))


def test_equal_passages_and_known_positives_are_no_negatives():
    query_id, passage_id = torch.tensor([1, 2]), torch.tensor([10, 20])
    all_query, all_passage = torch.tensor([1, 2, 1, 3, 4]), torch.tensor([10, 20, 30, 10, 50])
    assert false_negatives(query_id, passage_id, all_query, all_passage).tolist() == [
        [True, False, True, True, False],  # its own; another positive of query 1; the same passage elsewhere
        [False, True, False, False, False],
    ]


def test_measures_equal_their_definitions():
    query, passage = unit(5, 3), unit(14, 3, seed=1)
    positive = torch.arange(5)
    masked = torch.rand(5, 14, generator=torch.Generator().manual_seed(3)) < 0.2
    masked[0] = True  # a query with no negative at all
    measures = dict(zip(MEASURES, info_nce(query, passage, positive, masked, 0.1).measures.tolist(), strict=True))
    similarity = (query @ passage.T).double().numpy()
    correct, of_positive, of_negative, hardness, share = [], [], [], [], []
    for row in range(5):
        negatives = [similarity[row, c] for c in range(14) if c != row and not masked[row, c]]
        correct.append(similarity[row, row] > max(negatives, default=-np.inf))
        of_positive.append(similarity[row, row])
        of_negative.append(np.mean(negatives) if negatives else 0)
        hardness.append(np.mean(sorted(negatives)[-10:]) if negatives else 0)
        share.append((13 - len(negatives)) / 13)
    for name, values in (
        ("accuracy", correct),
        ("positive_similarity", of_positive),
        ("negative_similarity", of_negative),
        ("hardness", hardness),
        ("masked_fraction", share),
    ):
        assert measures[name] == pytest.approx(np.mean(values), abs=1e-6), name
