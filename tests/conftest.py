"""Fixtures shared by all packages: tiny models made from a config, tiny data, and one Ray for all
tests.
"""

import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

# Before Ray, DeepSpeed and transformers are imported, here and in every process the tests start.
os.environ.update(
    {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        # Threads that wait for each other on busy cores take many times as long as one.
        "OMP_NUM_THREADS": "1",
        # Jobs run the first `python` there is.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
)

import numpy as np
import pyarrow as pa
import pytest

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft, Receipt
from clusterlib.artifacts.tables import INDEX, TREE, fixed_size_list, shards_schema
from clusterlib.clusters import shards as shardlib
from clusterlib.clusters.tree import build

TOPICS = {
    "garden": "rose tulip soil water seed root leaf plant bloom shade mulch prune",
    "engine": "piston valve torque oil gear brake clutch fuel spark motor wheel axle",
    "music": "chord tempo melody rhythm bass violin drum scale tune harmony note song",
    "ocean": "wave tide reef coral fish salt current shore whale depth sand shell",
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A WordPiece tokenizer that knows the topics' words and single letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:-()'\""
    words = sorted(
        {word for topic in TOPICS.values() for word in topic.split()}
        | {"what", "about", "the", "query", "passage"}
    )
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *words,
    ]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=special
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def architecture():
    """Settings of a BERT small enough for tests."""
    return {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, tokenizer_folder, architecture):
    """A plain transformers encoder with random weights."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    # Large weights, or all texts would have nearly the same vector and ties would decide.
    config = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.5, **settings
    )
    folder = tmp_path_factory.mktemp("encoder")
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, encoder_folder):
    """A sentence-transformers folder: CLS pooling, normalised, with prompts, at most 20 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(encoder_folder), max_seq_length=20)
    folder = tmp_path_factory.mktemp("teacher")
    SentenceTransformer(
        modules=[transformer, Pooling(32, pooling_mode="cls"), Normalize()],
        prompts={"query": "query: ", "document": "passage: "},
        device="cpu",
    ).save_pretrained(str(folder), create_model_card=False)
    return folder


def make_pairs(count, seed=0):
    """(query, passage) texts about four topics, all different."""
    generator = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        words = TOPICS[topic].split()
        query = "what about " + " ".join(generator.choice(words, 3, replace=False)) + f" {number}"
        pairs.append((query, " ".join(generator.choice(words, 8)) + f" the {number}"))
    return pairs


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """160 pairs as JSON lines."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [json.dumps({"query": query, "passage": passage}) for query, passage in make_pairs(160)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def beir_folder(tmp_path_factory):
    """A retrieval test in BEIR's layout, of pairs that no other fixture has."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    pairs = make_pairs(24, seed=99)
    corpus = [
        {"_id": f"d{number}", "title": "", "text": passage + " held out"}
        for number, (_, passage) in enumerate(pairs)
    ]
    queries = [{"_id": f"q{number}", "text": query} for number, (query, _) in enumerate(pairs)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judgements = "".join(f"q{number}\td{number}\t1\n" for number in range(24))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    return folder


@pytest.fixture(scope="session")
def make_shards(tokenizer_folder):
    """Makes a `shards` artifact of random tokens under a root: see `_shards`."""
    return lambda root, tokenizer=tokenizer_folder, **options: _shards(root, tokenizer, **options)


def _shards(root, tokenizer_folder, num_rows=240, block_rows=64, seed=0, teacher_width=0):
    """Two sources of four leaves; some ids occur twice; with random teacher vectors if they have a
    width. Returns it and its rows in the order of the input."""
    generator = np.random.default_rng(seed)
    tree, _ = build(generator.standard_normal((4, 3)), np.ones(4))
    table = _random_rows(generator, num_rows, teacher_width)
    config = {
        "query_prompt": "",
        "passage_prompt": "",
        "query_max_tokens": 8,
        "passage_max_tokens": 24,
        "teacher_vectors": bool(teacher_width),
    }
    draft = Draft(Root(str(root)), Spec("shards", 1, {"shard": {**config, "seed": seed}}))
    trees = [tree.to_table(source, [1] * 4) for source in ("a", "b")]
    extra = [
        draft.write("tree", "tree", TREE, trees),
        *draft.write_folder("tokenizer", tokenizer_folder),
    ]
    receipts = [*_write_blocks(draft, table, block_rows), Receipt(extra)]
    return draft.publish(receipts), table


def _random_rows(generator, num_rows, teacher_width):
    sources = [str(generator.choice(["a", "b"])) for _ in range(num_rows)]
    leaves = generator.integers(0, 4, num_rows)
    query_ids, passage_ids = generator.integers(0, num_rows // 2, (2, num_rows)).astype(np.uint64)
    columns = [
        pa.array(np.arange(num_rows, dtype=np.uint64)),
        pa.array(sources),
        pa.array(leaves, pa.int32()),
        pa.array(query_ids),
        pa.array(np.uint64(2**63) + passage_ids),
        _random_tokens(generator, num_rows, 1, 6),
        _random_tokens(generator, num_rows, 2, 20),
    ]
    if teacher_width:
        columns += [_random_vectors(generator, num_rows, teacher_width) for _ in range(2)]
    return pa.Table.from_arrays(columns, schema=shards_schema(pa.uint16(), teacher_width))


def _random_tokens(generator, num_rows, low, high):
    lengths = generator.integers(low, high, num_rows)
    rows = [[2, *generator.integers(4, 100, length).tolist(), 3] for length in lengths]
    return pa.array(rows, pa.list_(pa.uint16()))


def _random_vectors(generator, num_rows, width):
    vectors = generator.standard_normal((num_rows, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return fixed_size_list(vectors.astype(np.float16))


def _write_blocks(draft, table, block_rows):
    """The receipt of each block of rows, with its shard and index."""
    receipts = []
    for file, start in enumerate(range(0, table.num_rows, block_rows)):
        block = table.slice(start, block_rows)
        groups, runs = shardlib.group(block, file)
        parts = [
            draft.write("shards", f"{start:06d}", table.schema, groups),
            draft.write("index", f"{file}", INDEX, [runs]),
        ]
        receipts.append(Receipt(parts, block.num_rows))
    return receipts


@pytest.fixture
def shards(tmp_path, make_shards):
    return make_shards(tmp_path / "root")


@pytest.fixture
def s3(monkeypatch):
    """An empty S3 bucket on loopback; this process and its children find it by their environment.

    Has its `uri`, and `outages`: how many of the next requests are answered with 503.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    store = SimpleNamespace(uri="s3://bucket", outages=0, num_requests=0)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    answer = server._server.app

    def answer_or_fail(environment, start_response):
        store.num_requests += 1
        if not store.outages:
            return answer(environment, start_response)
        store.outages -= 1
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        body = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
        start_response(
            "503 Slow Down",
            [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))],
        )
        return [body]

    server._server.app = answer_or_fail
    host, port = server.get_host_and_port()
    # Its state outlives the server.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
    yield store
    server.stop()


@pytest.fixture
def bucket(s3):
    """The URI of an empty S3 bucket on loopback."""
    return s3.uri


@pytest.fixture(scope="session")
def ray_running():
    """One small Ray on this machine for all tests that need one."""
    import ray

    # Ray's processes may still be writing their logs for a moment after the shutdown.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=True,
            logging_level="ERROR",
            object_store_memory=200 * 2**20,
            _temp_dir=str(Path(folder)),
        )
        yield context
        ray.shutdown()
