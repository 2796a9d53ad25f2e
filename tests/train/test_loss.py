import pytest
import torch
import torch.nn.functional as F

from clusterlib.errors import StrataError
from train.loss import LossConfig, Pairs, contrast, false_negatives, info_nce
from train.measures import by_name


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def block_masks(by_id, by_teacher=None):
    """Masks as info_nce asks for them, of whole matrices."""
    by_teacher = torch.zeros_like(by_id) if by_teacher is None else by_teacher
    return lambda rows: (by_id[rows], by_teacher[rows])


def dense(query, passage, positive, masked, temperature):
    """The definition, one row at a time."""
    losses = []
    for row in range(len(query)):
        kept = [
            column
            for column in range(len(passage))
            if column == positive[row] or not masked[row, column]
        ]
        logits = torch.stack(
            [(query[row] * passage[column]).sum() / temperature for column in kept]
        )
        losses.append(torch.logsumexp(logits, 0) - logits[kept.index(int(positive[row]))])
    return torch.stack(losses).mean()


@pytest.fixture(params=[2**20, 20], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr("train.loss._BLOCK_SCORES", request.param)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradients_equal_the_dense_definition(blocks, temperature, share):
    query, passage = unit(6, 16).requires_grad_(), unit(15, 16, seed=1).requires_grad_()
    positive = torch.tensor([3, 4, 5, 6, 7, 8])
    masked = torch.rand(6, 15, generator=torch.Generator().manual_seed(2)) < share
    output = info_nce(query, passage, positive, block_masks(masked), temperature)
    double = [tensor.detach().double().requires_grad_() for tensor in (query, passage)]
    expected = dense(*double, positive, masked, temperature)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3 * output.loss, (query, passage))
    for found, reference in zip(gradients, torch.autograd.grad(3 * expected, double), strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-6)


def test_without_masks_it_is_cross_entropy(blocks):
    query, passage = unit(8, 4), unit(8, 4, seed=1)
    output = info_nce(query, passage, torch.arange(8), block_masks(torch.eye(8).bool()), 0.1)
    torch.testing.assert_close(
        output.loss, F.cross_entropy(query @ passage.T / 0.1, torch.arange(8))
    )


def test_equal_passages_and_known_positives_are_no_negatives():
    own = Pairs(torch.tensor([1, 2]), torch.tensor([10, 20]))
    everyone = Pairs(torch.tensor([1, 2, 1, 3, 4]), torch.tensor([10, 20, 30, 10, 50]))
    by_id, by_teacher = false_negatives(own, everyone, None)(slice(0, 2))
    assert by_id.tolist() == [
        [
            True,
            False,
            True,
            True,
            False,
        ],  # its own; another positive of query 1; the same passage elsewhere
        [False, True, False, False, False],
    ]
    assert not by_teacher.any()


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, [False, True, True, False]),  # CDE's rule: at or above the positive's similarity
        (0.25, [False, True, True, True]),  # NV-Retriever's margin: just below it too
        (-0.25, [False, False, True, False]),  # CDE's bound moved up
    ],
)
def test_the_teacher_masks_what_it_holds_nearer_than_the_positive(margin, expected):
    # Teacher similarity of query 0 to its positive: 0.5; to passages 1, 2, 3: 0.5, 1, 0.375; all
    # exact in float16.
    teacher_passage = torch.tensor(
        [[0.5, 0.75**0.5], [0.5, -(0.75**0.5)], [1, 0], [0.375, 0.859375**0.5]]
    ).half()
    teacher_query = torch.tensor([[1.0, 0]] + [[0, 1.0]] * 3).half()
    everyone = Pairs(torch.arange(4), torch.arange(4), teacher_query, teacher_passage)
    own = everyone.map(lambda tensor: tensor[:1])
    _, by_teacher = false_negatives(own, everyone, margin)(slice(0, 1))
    assert by_teacher[0].tolist() == expected
    # The same pairings seen from the passages, rows and columns exchanged.
    _, of_passages = false_negatives(everyone, everyone, margin, by_passage=True)(slice(0, 4))
    _, of_queries = false_negatives(everyone, everyone, margin)(slice(0, 4))
    assert torch.equal(of_passages, of_queries.T)


def pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, count, (2, count), generator=generator)
    return Pairs(*ids, unit(count, 5, seed=seed + 1).half(), unit(count, 5, seed=seed + 2).half())


def reference(query, passage, known, first, config):
    """`contrast` of the pairs first..first+6 by its definition, from whole matrices."""
    count, own = len(query), slice(first, first + 6)
    masked = torch.zeros(count, count, dtype=torch.bool)  # of queries and passages
    similarity = known.teacher_query.double() @ known.teacher_passage.double().T
    for i in range(count):
        for j in range(count):
            masked[i, j] = (
                known.query_id[i] == known.query_id[j] or known.passage_id[i] == known.passage_id[j]
            )
            if config.teacher_margin is not None:
                masked[i, j] |= similarity[i, j] >= similarity[i, i] - config.teacher_margin
    losses = []
    for width in {*config.matryoshka_dims, query.shape[1]}:
        short = [
            vectors[:, :width] / vectors[:, :width].norm(dim=1, keepdim=True)
            for vectors in (query, passage)
        ]
        positive = range(first, first + 6)
        losses.append(dense(short[0][own], short[1], positive, masked[own], config.temperature))
        if config.bidirectional:
            losses.append(
                dense(short[1][own], short[0], positive, masked.T[own], config.temperature)
            )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("matryoshka_dims", [(), (4,), (2, 8, 12)])
@pytest.mark.parametrize("teacher_margin", [None, 0.1])
def test_every_option_equals_its_dense_definition(
    blocks, bidirectional, matryoshka_dims, teacher_margin
):
    config = LossConfig(
        temperature=0.1,
        bidirectional=bidirectional,
        matryoshka_dims=matryoshka_dims,
        teacher_margin=teacher_margin,
    )
    leaves = [unit(18, 12, seed=seed).double().requires_grad_() for seed in (3, 4)]
    query, passage = (F.normalize(leaf, dim=-1) for leaf in leaves)
    known, first = pairs(18, 5), 7
    own = slice(first, first + 6)
    output = contrast(
        query[own],
        passage[own],
        query if bidirectional else None,
        passage,
        known.map(lambda tensor: tensor[own]),
        known,
        first,
        config,
    )
    expected = reference(query, passage, known, first, config)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    assert by_name(output.measures)["loss"] == pytest.approx(expected.item(), rel=1e-10)
    references = torch.autograd.grad(expected, leaves, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(output.loss, leaves), references, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_prefixes_longer_than_the_embedding_are_refused():
    LossConfig(matryoshka_dims=(8, 32)).check_width(32)
    with pytest.raises(
        StrataError, match=r"train.loss.matryoshka_dims=\[8, 33\]: the student's embedding has 32"
    ):
        LossConfig(matryoshka_dims=(8, 33)).check_width(32)
