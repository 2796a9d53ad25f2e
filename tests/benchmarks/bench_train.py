"""Pairs per second of the step loop against sentence-transformers'
CachedMultipleNegativesRankingLoss.

Same student, pairs, batches, micro-batch, precision, optimizer and machine, one thread a process.
Both sides are kept alive and asked for one step in turn, so that a busy machine hinders both alike;
the ratio is of medians.

Ours: the whole loop under DeepSpeed, with masks, measures and records, reading each batch from the
    cache.
Theirs: the loss module and torch's AdamW alone, fed with tokens that are ready and padded to the
    batch's
longest text, each mini-batch trimmed to its own longest by the loss; no Trainer, tokenizer or data
loader. Over several processes it gathers passages across them, and gradients are averaged once a
step, as one flat tensor.

With --compile, ours runs a second time as train.compile=true has it.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import command
import torch
import torch.distributed as dist
from tokens import open_store, write_shards

from clusterlib.artifacts.artifact import Artifact, Root
from clusterlib.batches.plan import BatchingConfig, Plan
from clusterlib.clusters.shards import Shards

WARM_UP = 2  # the first steps compile
TEMPERATURE = 0.05
SOURCE = "scitldr"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="pairs, over all processes")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--query-tokens", type=int, default=64)
    # 32/128 cuts most passages of this source, so that nearly all are as long and there is little
    # to sort.
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--side",
        choices=("ours", "compiled", "theirs"),
        help="be one process of a side; for this script itself",
    )
    return command.parse(
        parser, batch=8, micro_batch=4, query_tokens=8, passage_tokens=16, rounds=1
    )


def tokenized(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of the first pairs, as many as all steps need."""
    from train.model import TokenizerRef

    data = command.data(options)
    tokenizer = TokenizerRef(name=data.teacher().name).load()
    count = options.batch * (WARM_UP + options.rounds)
    limits = {"query": options.query_tokens, "passage": options.passage_tokens}
    return {
        side: tokenizer(data.texts(SOURCE, side, count), truncation=True, max_length=limit)[
            "input_ids"
        ]
        for side, limit in limits.items()
    }


def planned(shards: Artifact, options: argparse.Namespace) -> Plan:
    """The batches of both sides."""
    return Plan(
        Shards([shards]).index, BatchingConfig(strategy="random", global_batch_size=options.batch)
    )


def backbone():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
        )
    )


def ready() -> None:
    print("READY", flush=True)
    wait_for_turn()


def wait_for_turn() -> None:
    if not sys.stdin.readline():
        sys.exit(0)


def ours(options: argparse.Namespace) -> None:
    """Take a step for each line on stdin; print its seconds and those spent on data."""
    from train.config import TrainConfig
    from train.engine import Engine
    from train.loop import fit
    from train.loss import LossConfig
    from train.model import Encoder
    from train.optimizer import OptimizerConfig
    from train.progress import Progress

    dist.init_process_group("gloo")
    tokens = tokenized(options)
    config = TrainConfig(
        student={"architecture": {}},
        loss=LossConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        steps=WARM_UP + options.rounds,
        micro_batch_size=options.micro_batch,
    )
    student = backbone()
    if options.side == "compiled":
        student.compile(dynamic=True)
    engine = Engine(
        Encoder(student, "mean"), config.optimizer, "fp32", 0, options.batch // options.processes
    )

    def on_step(progress: Progress) -> None:
        print(
            "STEP",
            progress.records[-1]["step_seconds"],
            progress.records[-1]["data_seconds"],
            flush=True,
        )
        wait_for_turn()

    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Root(folder), **tokens)
        store = open_store(shards, Path(folder) / "cache")
        plan = planned(shards, options)
        ready()
        fit(engine, plan, store, config, Progress(), lambda *_: None, on_step, lambda _: None)


def theirs(options: argparse.Namespace) -> None:
    """The same with sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from train.model import TokenizerRef

    tokens = tokenized(options)
    with tempfile.TemporaryDirectory() as folder:
        backbone().save_pretrained(folder)
        TokenizerRef(name=command.data(options).teacher().name).load().save_pretrained(folder)
        transformer = Transformer(folder)
    student = SentenceTransformer(
        modules=[transformer, Pooling(256, pooling_mode="mean"), Normalize()], device="cpu"
    )
    student.train()
    loss = CachedMultipleNegativesRankingLoss(
        student,
        scale=1 / TEMPERATURE,
        mini_batch_size=options.micro_batch,
        gather_across_devices=options.processes > 1,
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    dist.init_process_group(
        "gloo"
    )  # not sooner: of several ranks only the first would have saved the student
    share = options.batch // options.processes
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(write_shards(Root(folder), **tokens), options)
    steps = WARM_UP + options.rounds
    batches = [
        plan.step(step, steps).rows[dist.get_rank() * share :][:share] for step in range(steps)
    ]
    ready()
    for batch in batches:
        features = []
        for side in ("query", "passage"):
            taken = [torch.tensor(tokens[side][row]) for row in batch]
            ids = torch.nn.utils.rnn.pad_sequence(taken, batch_first=True)
            features.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
        started = time.perf_counter()
        loss(features, None).backward()
        gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
        if options.processes > 1:
            flat = torch.cat([gradient.ravel() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= options.processes
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print("STEP", time.perf_counter() - started, 0.0, flush=True)
        wait_for_turn()


class Side:
    """A side's processes."""

    def __init__(self, name: str, num_processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        settings = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(num_processes),
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--side", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(num_processes)
        ]
        for process in self._processes:
            self._line(process, "READY")

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and of its reading, of the slowest process."""
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()
        seconds = [self._line(process, "STEP").split()[1:] for process in self._processes]
        return max(float(step) for step, _ in seconds), max(
            float(of_data) for _, of_data in seconds
        )

    def end(self) -> None:
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            process.wait(60)

    @staticmethod
    def _line(process: subprocess.Popen, word: str) -> str:
        for line in process.stdout:
            if line.startswith(word):
                return line
        raise RuntimeError("the process ended early")


def main() -> None:
    options = arguments()
    if options.side:
        {"ours": ours, "compiled": ours, "theirs": theirs}[options.side](options)
        return
    sides = {
        name: Side(name, options.processes)
        for name in ("ours", *(["compiled"] if options.compile else []), "theirs")
    }
    for _ in range(WARM_UP):
        for side in sides.values():
            side.step()
    seconds = {name: [] for name in sides}
    waiting = []
    print(
        f"student 4x256, {options.processes} processes, batch {options.batch}, micro-batch "
        f"{options.micro_batch}, {SOURCE}, at most {options.query_tokens}/{options.passage_tokens} "
        "tokens"
    )
    print(f"{'round':>6}" + "".join(f"{name + ', pairs/s':>18}" for name in sides))
    for number in range(options.rounds):
        for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
            taken, of_data = side.step()
            seconds[name].append(taken)
            if name == "ours":
                waiting.append(of_data / taken)
        print(
            f"{number:>6}"
            + "".join(f"{options.batch / seconds[name][-1]:>18.1f}" for name in sides),
            flush=True,
        )
    for side in sides.values():
        side.end()
    rates = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
    if options.compile:
        print(f"compiled over plain {rates['compiled'] / rates['ours']:.2f}")
    print(
        f"RESULT bench_train ratio={rates['ours'] / rates['theirs']:.2f} ours={rates['ours']:.1f} "
        f"theirs={rates['theirs']:.1f} waiting_fraction={statistics.median(waiting):.4f}"
    )


if __name__ == "__main__":
    main()
