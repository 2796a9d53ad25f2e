"""Peak memory of the gradient at growing global batches with one micro-batch size; one fresh
process each.

The embeddings of the whole batch, their gradients and its tokens must be somewhere; the score
matrix must not: at 16,384 pairs it alone would be 1 GiB, with its softmax and gradient 3.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import command
import numpy as np
import torch
from tokens import open_store, write_shards

from clusterlib.artifacts.artifact import Root
from train.clock import Clock
from train.gradcache import accumulate_gradient
from train.loss import LossConfig
from train.model import Encoder

MICRO_BATCH = 64
VOCABULARY = 1000
QUERY_TOKENS, PASSAGE_TOKENS = 8, 16
WIDTH = 128


class Student:
    """Torch alone: what an engine does on one rank, without its optimizer's memory."""

    def __init__(self, model: Encoder) -> None:
        self.encode = model
        self.clock = Clock(torch.device("cpu"))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def student() -> Encoder:
    from transformers import BertConfig, BertModel

    architecture = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=64,
    )
    return Encoder(BertModel(architecture), "mean")


def peak(root: Root, batch: int) -> None:
    """Print this process's peak resident memory after one gradient, and before it, MiB."""
    torch.set_num_threads(1)
    torch_student = Student(student())
    (shards,) = root.artifacts()
    store = open_store(shards, Path(root.path) / "cache")

    def step(num_rows: int) -> None:
        tokens = store.read(np.arange(num_rows), rank=0, num_ranks=1, micro_batch_size=MICRO_BATCH)
        accumulate_gradient(torch_student, tokens, LossConfig())

    step(MICRO_BATCH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--peak", help="folder of the pairs; run the first batch only; for this script itself"
    )
    arguments = command.parse(parser, batches=[128, 256])
    if arguments.peak:
        peak(Root(arguments.peak), arguments.batches[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        sides = [
            list(generator.integers(5, VOCABULARY, (max(arguments.batches), num_tokens)))
            for num_tokens in (QUERY_TOKENS, PASSAGE_TOKENS)
        ]
        open_store(write_shards(Root(folder), *sides), Path(folder) / "cache")  # cached for all
        measure(arguments.batches, folder)


def measure(batches: list[int], folder: str) -> None:
    print(
        f"student 2x{WIDTH}, micro-batch {MICRO_BATCH}, {QUERY_TOKENS}/{PASSAGE_TOKENS} tokens, "
        "float32, MiB"
    )
    print(
        f"{'batch':>8} {'peak':>8} {'of it before':>13} {'embeddings':>11} {'tokens':>8} "
        f"{'one score matrix':>17}"
    )
    peaks, embeddings = [], []
    for batch in batches:
        words = [sys.executable, __file__, "--batches", str(batch), "--peak", folder]
        output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        highest, before = map(float, output.split())
        vectors = 2 * batch * WIDTH * 4 / 2**20
        tokens = 2 * batch * (QUERY_TOKENS + PASSAGE_TOKENS) * 8 / 2**20
        matrix = batch**2 * 4 / 2**20
        print(
            f"{batch:>8,} {highest:>8.0f} {before:>13.0f} {vectors:>11.1f} {tokens:>8.1f} "
            f"{matrix:>17.0f}"
        )
        peaks.append(highest)
        embeddings.append(vectors)
    growth = np.array(peaks) - peaks[0]
    print(
        f"RESULT bench_memory ratio={peaks[-1] / peaks[0]:.3f} growth_mib={growth[-1]:.0f} "
        f"embeddings_mib={embeddings[-1]:.0f}"
    )


if __name__ == "__main__":
    main()
