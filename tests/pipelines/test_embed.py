import numpy as np
import pyarrow as pa
import pytest
import sentence_transformers
import torch

from clusterlib.artifacts.artifact import Spec
from clusterlib.artifacts.config import fingerprint
from clusterlib.artifacts.tables import vectors
from clusterlib.errors import StrataError
from pipelines.embed import (
    STAGE,
    EmbedConfig,
    Teacher,
    _batches,
    _Worker,
    check_vectors,
    embeddings_spec,
)
from pipelines.stage import find_or_make
from train.model import ModelRef

PAIRS = Spec("pairs", 1, {})


@pytest.fixture(scope="module")
def reference(teacher_folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(teacher_folder), device="cpu")


def test_vectors_are_sentence_transformers_own(chain, reference):
    table = chain.embeddings["big"].read()
    for side, encode in (("query", reference.encode_query), ("passage", reference.encode_document)):
        found = vectors(table[f"{side}_embedding"])
        assert found.dtype == np.float16
        np.testing.assert_allclose(np.linalg.norm(found.astype(np.float32), axis=1), 1, atol=2e-3)
        np.testing.assert_allclose(found, encode(table[side].to_pylist()), atol=2e-3)


def test_every_pair_is_embedded_once_in_its_order(chain):
    for source, pairs in chain.pairs.items():
        table = pairs.read()
        assert chain.embeddings[source].read(columns=table.column_names).equals(table)
    assert len(chain.embeddings["big"].parts()) > 2  # several tasks


def test_prompts_and_length_are_the_models_unless_given(teacher_folder, encoder_folder, reference):
    texts = ["rose tulip", "wave tide reef " * 20]
    config = EmbedConfig(
        teacher=ModelRef(name=str(teacher_folder)), query_prompt="about ", max_tokens=10
    )
    reference.max_seq_length = 10
    expected = reference.encode(["about " + text for text in texts])
    reference.max_seq_length = 20
    np.testing.assert_allclose(Teacher(config).encode(texts, "query"), expected, atol=2e-3)
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(encoder_folder), device="cpu").encode(
        texts, normalize_embeddings=True
    )
    found = Teacher(EmbedConfig(teacher=ModelRef(name=str(encoder_folder)))).encode(
        texts, "passage"
    )
    np.testing.assert_allclose(found, plain, atol=2e-3)


def test_each_distinct_text_is_encoded_once(teacher_folder, monkeypatch):
    teacher = Teacher(EmbedConfig(teacher=ModelRef(name=str(teacher_folder))))
    seen = []
    forward = teacher.model.forward
    monkeypatch.setattr(
        teacher.model,
        "forward",
        lambda features: seen.append(len(features["input_ids"])) or forward(features),
    )
    found = teacher.encode(["a rose", "a wave", "a rose", "a rose"], "query")
    assert sum(seen) == 2
    np.testing.assert_array_equal(found[0], found[2])


def test_batches_hold_similar_lengths_and_stay_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    batches = list(_batches(lengths, 256))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(rows) * lengths[rows].max() <= 256 for rows in batches)
    assert sum(len(rows) * lengths[rows].max() for rows in batches) < 1.1 * lengths.sum()
    assert [rows.tolist() for rows in _batches(np.array([900]), 256)] == [
        [0]
    ]  # a long text goes alone


def test_precision_is_part_of_what_the_vectors_are(teacher_folder):
    teacher = ModelRef(name=str(teacher_folder))
    full, half = EmbedConfig(teacher=teacher), EmbedConfig(teacher=teacher, precision="bf16")
    assert (
        full.precision == "fp32"
        and embeddings_spec(full, PAIRS).name != embeddings_spec(half, PAIRS).name
    )
    for config, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        assert {weight.dtype for weight in Teacher(config).model.parameters()} == {dtype}
    # Where it is computed says nothing of what: no GPU switches the precision.
    assert fingerprint(full) == fingerprint(full.replace(gpus_per_worker=1, batch_tokens=7))


def test_a_gpu_that_was_not_asked_for_is_not_taken(teacher_folder, monkeypatch):
    """Ray shows every GPU of a node to workers that asked for none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    teacher = Teacher(EmbedConfig(teacher=ModelRef(name=str(teacher_folder))))
    assert teacher.model.device.type == "cpu"
    assert teacher.model.dtype == torch.float32 and teacher.batch_tokens == 1_024


def test_a_gpu_that_was_asked_for_is_taken(teacher_folder, monkeypatch):
    loaded = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = sentence_transformers.SentenceTransformer
    monkeypatch.setattr(
        sentence_transformers,
        "SentenceTransformer",
        lambda name, device, **how: (
            loaded.update(device=device, **how["model_kwargs"]) or whole(name, device="cpu")
        ),
    )
    teacher = Teacher(EmbedConfig(teacher=ModelRef(name=str(teacher_folder)), gpus_per_worker=0.5))
    assert (
        loaded["device"] == "cuda"
        and loaded["dtype"] == torch.float32
        and teacher.batch_tokens == 16_384
    )


def test_a_worker_that_was_promised_a_gpu_and_finds_none_says_so(chain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        StrataError, match=r"embed.gpus_per_worker=1: .* has no GPU that torch can use .*; install"
    ):
        _Worker(chain.configs.embed.replace(gpus_per_worker=1), chain.pairs["big"], None)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_bad_vector_is_an_error_that_names_its_row(value):
    matrix = np.full((4, 8), 8**-0.5, np.float16)
    matrix[2] = value
    ids = pa.chunked_array([pa.array([10, 11, 12, 13], pa.uint64())])
    with pytest.raises(
        StrataError, match=r"pair 12: the teacher's query vector has norm .*\(1 of 4 rows"
    ):
        check_vectors(matrix, ids, "query")


def test_a_teacher_without_weights_is_refused_before_any_work(chain, tokenizer_folder):
    config = EmbedConfig(teacher=ModelRef(name=str(tokenizer_folder)))
    spec = embeddings_spec(config, chain.specs.pairs["big"])
    with pytest.raises(StrataError, match="not a complete model folder"):
        find_or_make(STAGE, [spec], chain.root)
