"""Pairs per second of the step loop against sentence-transformers' CachedMultipleNegativesRankingLoss.

Same student, pairs, batches, micro-batch, precision, optimizer and machine; one process each, one thread each,
both kept alive and asked for one step in turn, so that a busy machine hinders both alike.

Ours: the whole loop under DeepSpeed, with masks, measures and records, reading each batch from the cache.
Theirs: the loss module and torch's AdamW alone, fed with tokens that are ready and padded to the batch's
longest text, each mini-batch trimmed to its own longest by the loss; no Trainer, tokenizer or data loader.

With --compile, ours runs a second time as train.compile=true has it.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from real import TEACHER, texts

BATCH, MICRO_BATCH = 128, 32
# TOKENS=32/128 cuts most passages of this source, so that nearly all are as long and there is little to sort.
QUERY_TOKENS, PASSAGE_TOKENS = map(int, os.environ.get("TOKENS", "64/256").split("/"))
WARM_UP, ROUNDS = 1, int(os.environ.get("ROUNDS", "5"))
TEMPERATURE = 0.05
SOURCE = "scitldr"


def tokenized() -> dict[str, list[list[int]]]:
    """Token ids of the first pairs, as many as all steps need."""
    from train.model import TokenizerRef

    tokenizer = TokenizerRef(name=TEACHER.name).load()
    count = BATCH * (WARM_UP + ROUNDS)
    limits = {"query": QUERY_TOKENS, "passage": PASSAGE_TOKENS}
    return {
        side: tokenizer(texts(SOURCE, side, count), truncation=True, max_length=limit)["input_ids"]
        for side, limit in limits.items()
    }


def backbone():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024))


def wait_for_turn() -> None:
    if not sys.stdin.readline():
        sys.exit(0)


def ours(compiled: bool = False) -> None:
    """Take a step for each line on stdin; print its seconds and those spent on data."""
    import torch.distributed as dist

    from train.data import TokenStore
    from train.engine import Engine, OptimizerConfig
    from train.loop import Progress, TrainConfig, fit
    from train.loss import LossConfig
    from train.model import Encoder

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["PORT"], RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo")
    tokens = tokenized()
    count = len(tokens["query"])
    config = TrainConfig(
        student={"architecture": {}},
        loss=LossConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        steps=WARM_UP + ROUNDS,
        micro_batch_size=MICRO_BATCH,
    )
    student = backbone()
    if compiled:
        student.compile(dynamic=True)
    engine = Engine(Encoder(student, "mean"), config.optimizer, "fp32", 0, BATCH)
    one_file = SimpleNamespace(locate=lambda rows: (np.zeros(len(rows), np.int64), rows))
    rows = np.random.default_rng(0).permutation(count)
    plan = SimpleNamespace(
        num_batches=count // BATCH,
        step=lambda step, _: SimpleNamespace(
            rows=rows[step * BATCH : (step + 1) * BATCH], label="all", phase=0, epoch=0
        ),
    )

    def on_step(progress: Progress) -> None:
        print("STEP", progress.records[-1]["step_seconds"], progress.records[-1]["data_seconds"], flush=True)
        wait_for_turn()

    with tempfile.TemporaryDirectory() as folder:
        table = pa.table(
            {
                "query_id": pa.array(range(count), pa.uint64()),
                "passage_id": pa.array(range(count), pa.uint64()),
                **{f"{side}_tokens": pa.array(tokens[side], pa.list_(pa.uint16())) for side in tokens},
            }
        )
        with pa.ipc.new_file(Path(folder) / "000000.arrow", table.schema) as writer:
            writer.write_table(table)
        store = TokenStore(Path(folder), one_file, pad_token_id=0)
        print("READY", flush=True)
        wait_for_turn()
        fit(engine, plan, store, config, Progress(), on_step, lambda _: None)


def theirs() -> None:
    """The same with sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from train.model import TokenizerRef

    tokens = tokenized()
    count = len(tokens["query"])
    with tempfile.TemporaryDirectory() as folder:
        backbone().save_pretrained(folder)
        TokenizerRef(name=TEACHER.name).load().save_pretrained(folder)
        transformer = Transformer(folder)
    student = SentenceTransformer(modules=[transformer, Pooling(256, pooling_mode="mean"), Normalize()], device="cpu")
    student.train()
    loss = CachedMultipleNegativesRankingLoss(student, scale=1 / TEMPERATURE, mini_batch_size=MICRO_BATCH)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    rows = np.random.default_rng(0).permutation(count)
    print("READY", flush=True)
    for step in range(WARM_UP + ROUNDS):
        wait_for_turn()
        features = []
        for side in ("query", "passage"):
            taken = [torch.tensor(tokens[side][row]) for row in rows[step * BATCH : (step + 1) * BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(taken, batch_first=True)
            features.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
        started = time.perf_counter()
        loss(features, None).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print("STEP", time.perf_counter() - started, 0.0, flush=True)


class Side:
    """A side's process."""

    def __init__(self, name: str, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "HF_HUB_OFFLINE": "1",
            },
        )
        self._line("READY")

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and of its reading."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        _, seconds, of_data = self._line("STEP").split()
        return float(seconds), float(of_data)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _line(self, word: str) -> str:
        for line in self._process.stdout:
            if line.startswith(word):
                return line
        raise RuntimeError("the process ended early")


def main() -> None:
    compiles = "--compile" in sys.argv
    if len(sys.argv) > 1 and not compiles:
        {"ours": ours, "compiled": functools.partial(ours, True), "theirs": theirs}[sys.argv[1]]()
        return
    names = ["ours", "compiled", "theirs"] if compiles else ["ours", "theirs"]
    sides = {name: Side(name, 29755 + number) for number, name in enumerate(names)}
    for _ in range(WARM_UP):
        for side in sides.values():
            side.step()
    seconds = {name: [] for name in sides}
    waiting = []
    print(f"student 4x256, batch {BATCH}, micro-batch {MICRO_BATCH}, {SOURCE}, at most {QUERY_TOKENS}/{PASSAGE_TOKENS}")
    print(f"{'round':>6}" + "".join(f" {f'{name}, pairs/s':>17}" for name in names))
    for number in range(ROUNDS):
        for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
            taken, of_data = side.step()
            seconds[name].append(taken)
            if name == "ours":
                waiting.append(of_data / taken)
        print(f"{number:>6}" + "".join(f" {BATCH / seconds[name][-1]:>17.1f}" for name in names), flush=True)
    for side in sides.values():
        side.end()
    rates = {name: BATCH / statistics.median(values) for name, values in seconds.items()}
    print(
        f"RESULT bench_train ratio={rates['ours'] / rates['theirs']:.2f} "
        + "".join(f"{name}={rates[name]:.1f} " for name in names)
        + f"waiting_fraction={statistics.median(waiting):.4f}"
    )


if __name__ == "__main__":
    main()
