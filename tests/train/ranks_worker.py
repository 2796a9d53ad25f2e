"""One rank of tests/train/test_ranks.py: takes steps under DeepSpeed and writes what it found.

Usage: ranks_worker.py SETTINGS.json; RANK, WORLD_SIZE and the like are in the environment.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft
from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import BatchingConfig
from clusterlib.clusters.shards import Shards
from train.config import TrainConfig
from train.gradcache import accumulate_gradient
from train.learner import Learner, Run


def weights(engine):
    return torch.cat([weight.detach().float().ravel() for weight in engine.model.parameters()])


def whole_state(engine):
    """Weights and moments as one tensor; nothing on ranks but the first."""
    return torch.cat([torch.empty(0), *(part.ravel() for part in engine.state().values())])


def count_reductions(monitored):
    """Make every reduction over ranks add its number of elements to `monitored`, but for single
    numbers.
    """

    def monitor(original):
        def counted(tensor, *arguments, **options):
            if tensor.numel() > 1:
                monitored.append(tensor.numel())
            return original(tensor, *arguments, **options)

        return counted

    for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"):
        setattr(dist, name, monitor(getattr(dist, name)))


def count_in_backward(engine, monitored):
    """A list of what `monitored` counts while the engine goes back."""
    counted = []
    backward = engine.backward

    def watched(loss):
        before = len(monitored)
        backward(loss)
        counted.extend(monitored[before:])

    engine.backward = watched
    return counted


def keep_gradient(engine, monitored):
    """A list that the next step leaves two things in before the update: how much was reduced so
    far, and the reduced gradient."""
    from deepspeed.utils import safe_get_full_grad

    kept = []
    update = engine._engine._take_model_step

    def take(*arguments):
        kept.append(sum(monitored))
        kept.append(
            torch.cat(
                [safe_get_full_grad(weight).ravel().clone() for weight in engine.model.parameters()]
            )
        )
        update(*arguments)

    engine._engine._take_model_step = take
    return kept


def count_synchronisations():
    """A list that gets an item whenever DeepSpeed makes the device wait."""
    from deepspeed.accelerator import get_accelerator

    accelerator, counted = get_accelerator(), []
    synchronize = accelerator.synchronize

    def counting(*arguments):
        counted.append(None)
        return synchronize(*arguments)

    accelerator.synchronize = counting
    return counted


def bucket_sizes(engine):
    """A list of the bytes that ZeRO's buckets take whenever they are made."""
    sizes = []
    if engine._zero:
        set_up = engine._zero.setup_buckets

        def watched():
            set_up()
            buckets = engine._zero.ipg_buckets.values()
            sizes.append(sum(buffer.nbytes for bucket in buckets for buffer in bucket.buffer))

        engine._zero.setup_buckets = watched
    return sizes


def break_gradient(engine, rank):
    """Make a gradient of the last rank alone that is not finite, and take the step."""
    break_step(engine, 0, rank)
    ids = torch.tensor([[2, 50, 3]])
    engine.backward(engine.encode(ids, torch.ones_like(ids)).sum())
    return engine.step(1e-3)


def break_step(engine, number, rank):
    """Make the last rank's gradient infinite in a step that is to come."""
    backward, step, taken = engine.backward, engine.step, []

    def breaking(loss):
        here = len(taken) == number and rank == dist.get_world_size() - 1
        backward(loss * float("inf") if here else loss)

    def counting(learning_rate):
        taken.append(None)
        return step(learning_rate)

    engine.backward, engine.step = breaking, counting


class Tests:
    """A number that all weights of the exported model have a part in, found in a way that changes
    all that a test in the loop could.
    """

    def __call__(self, model, device):
        from sentence_transformers import SentenceTransformer

        torch.manual_seed(0)  # as mteb does
        texts = ["rose and tulip", "piston"]
        left, right = SentenceTransformer(str(model), device=device).encode(texts)
        row = {"task": MEAN, "split": "", "metric": "ndcg_at_10"}
        return [{**row, "value": float(left @ right)}]


PROMPTS = {"query": "", "document": ""}


class Folders:
    """Surroundings without Ray: a folder for each checkpoint, and one that is given to begin
    from.
    """

    device = torch.device("cpu")

    def __init__(self, folder, load):
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.checkpoints = str(folder)
        self._load = load

    def latest_checkpoint(self):
        return contextlib.nullcontext(self._load and Path(self._load))

    def keep_checkpoint(self, folder, step):
        if dist.get_rank() == 0:
            shutil.copytree(folder, f"{self.checkpoints}/{step}")

    def wait_for_all(self):
        dist.barrier()


def learner_of(settings, name, config, load=None, batching=None, like=""):
    """The learner of a case or a run; one that is `like` another goes on in its draft."""
    root = Root(settings["root"])
    run = Run(
        TrainConfig.model_validate({**config, "cache_dir": settings["cache"]}),
        BatchingConfig.model_validate(batching or settings["batching"]),
        Shards([root.peek(settings["shards"])]),
        Draft(root, Spec("model", 1, {"run": like or name, "prompts": PROMPTS})),
        name,
        Tests(),
    )
    return Learner(run, Folders(Path(settings["out"]) / name, load))


def one_step(learner, reduced, broken):
    """What a step finds, from the first batch of a run of one step."""
    engine, config = learner.engine, learner.run.config
    rank, num_ranks = learner.rank, learner.num_ranks
    batch = learner.store.read(
        learner.plan.step(0, 1).rows, rank, num_ranks, config.micro_batch_size
    )
    sizes = bucket_sizes(engine)
    before = whole_state(engine)
    broken_norm = break_gradient(engine, rank) if broken else None
    after = whole_state(engine)
    torch.manual_seed(0)
    in_backward = count_in_backward(engine, reduced)
    measures = accumulate_gradient(engine, batch, config.loss)
    before_step = sum(reduced)
    kept = keep_gradient(engine, reduced)
    norm = engine.step(1e-3)
    return {
        "gradient": kept[1].float(),
        "measures": measures,
        "norm": norm,
        "dtype": str(next(engine.model.parameters()).dtype),
        "num_reduced": sum(in_backward) + kept[0] - before_step,
        "num_parameters": len(kept[1]),
        "bucket_bytes": max(sizes, default=0),
        "broken": broken_norm,
        "states": (before, after, whole_state(engine)),
    }


def whole_run(learner, synchronized, broken_step):
    """What a run finds, from where it begins to its last step."""
    engine, started_at = learner.engine, learner.progress.step
    if broken_step >= started_at:
        break_step(engine, broken_step - started_at, learner.rank)
    synchronized.clear()
    learner.fit()
    return {
        "weights": weights(engine),
        "records": [
            {key: value for key, value in record.items() if not key.endswith("_seconds")}
            for record in learner.progress.records
        ],
        "started_at": started_at,
        "tests": learner.progress.tests,
        "num_synchronized": len(synchronized),
    }


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    reduced = []
    count_reductions(reduced)
    synchronized = count_synchronisations()
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for name, config in settings["cases"].items():
        learner = learner_of(settings, name, config)
        found = one_step(learner, reduced, broken=name.startswith("broken"))
        if rank == 0:
            torch.save(found, f"{settings['out']}/{name}-{num_ranks}.pt")
    for name, run in settings["runs"].items():
        broken_step = run.pop("break_step", -1)
        found = whole_run(learner_of(settings, name, **run), synchronized, broken_step)
        if rank == 0:
            torch.save(found, f"{settings['out']}/{name}.pt")
    assert "ray" not in sys.modules
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main()
