"""Peak memory of the gradient at growing global batches with one micro-batch size; one fresh process each.

The embeddings of the whole batch, their gradients and its tokens must be somewhere; the score matrix must not:
at 16,384 pairs it alone would be 1 GiB, with its softmax and gradient 3.
"""

import resource
import subprocess
import sys

import numpy as np
import torch

from train.clock import Clock
from train.data import RankBatch, Side
from train.gradcache import accumulate_gradient
from train.loss import LossConfig, Pairs
from train.model import Encoder

BATCHES = (1024, 4096, 16384)
MICRO_BATCH = 64
QUERY_TOKENS, PASSAGE_TOKENS = 8, 16
WIDTH = 128


class Learner:
    """Torch alone: what an engine does on one rank, without its optimizer's memory."""

    def __init__(self, model: Encoder) -> None:
        self.encode = model
        self.clock = Clock(torch.device("cpu"))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def student() -> Encoder:
    from transformers import BertConfig, BertModel

    architecture = BertConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=64,
    )
    return Encoder(BertModel(architecture), "mean")


def side(batch: int, num_tokens: int) -> Side:
    ids = torch.randint(5, 1000, (batch, num_tokens))
    return Side([(part, torch.ones_like(part)) for part in ids.split(MICRO_BATCH)], torch.arange(batch))


def peak(batch: int) -> None:
    """Print this process's peak resident memory after one gradient, and before it, MiB."""
    torch.set_num_threads(1)
    learner = Learner(student())
    accumulate_gradient(learner, rank_batch(MICRO_BATCH), LossConfig())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    accumulate_gradient(learner, rank_batch(batch), LossConfig())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before)


def rank_batch(batch: int) -> RankBatch:
    numbers = torch.arange(batch)
    sides = (side(batch, QUERY_TOKENS), side(batch, PASSAGE_TOKENS))
    return RankBatch(*sides, Pairs(numbers, numbers), batch * (QUERY_TOKENS + PASSAGE_TOKENS))


def main() -> None:
    if len(sys.argv) > 1:
        peak(int(sys.argv[1]))
        return
    print(f"student 2x{WIDTH}, micro-batch {MICRO_BATCH}, {QUERY_TOKENS}/{PASSAGE_TOKENS} tokens, float32, MiB")
    print(f"{'batch':>8} {'peak':>8} {'of it before':>13} {'embeddings':>11} {'tokens':>8} {'one score matrix':>17}")
    peaks, embeddings = [], []
    for batch in BATCHES:
        output = subprocess.run([sys.executable, __file__, str(batch)], capture_output=True, text=True, check=True)
        highest, before = map(float, output.stdout.split())
        vectors = 2 * batch * WIDTH * 4 / 2**20
        tokens = 2 * batch * (QUERY_TOKENS + PASSAGE_TOKENS) * 8 / 2**20
        matrix = batch**2 * 4 / 2**20
        print(f"{batch:>8,} {highest:>8.0f} {before:>13.0f} {vectors:>11.1f} {tokens:>8.1f} {matrix:>17.0f}")
        peaks.append(highest)
        embeddings.append(vectors)
    growth = np.array(peaks) - peaks[0]
    print(
        f"RESULT bench_memory ratio={peaks[-1] / peaks[0]:.3f} growth_mib={growth[-1]:.0f} "
        f"embeddings_mib={embeddings[-1]:.0f}"
    )


if __name__ == "__main__":
    main()
