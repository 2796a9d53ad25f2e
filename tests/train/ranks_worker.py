"""One rank of tests/train/test_ranks.py: takes steps under DeepSpeed and writes what it found.

Usage: ranks_worker.py SETTINGS.json; RANK, WORLD_SIZE and the like are in the environment.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from clusterlib.artifacts.artifact import Root, Spec
from clusterlib.artifacts.draft import Draft
from clusterlib.artifacts.tables import MEAN
from clusterlib.batches.plan import BatchingConfig, Plan
from train import checkpoint
from train.data import TokenStore, cache_shards, load_tokenizer, shard_index
from train.engine import Engine
from train.export import export
from train.gradcache import accumulate_gradient
from train.loop import Progress, TrainConfig, fit
from train.mine import Miner
from train.model import build_student


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


def score(model, tokenizer):
    """A number that all weights of the exported model have a part in, found in a way that changes
    all that a test in the loop could."""
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as folder:
        export(model, tokenizer, Path(folder), {}, 24, "")
        torch.manual_seed(0)  # as mteb does
        left, right = SentenceTransformer(folder, device="cpu").encode(["rose and tulip", "piston"])
    return float(left @ right)


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    reduced = []
    count_reductions(reduced)
    synchronized = count_synchronisations()
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shards = Root(settings["root"]).open(settings["shards"], "make it")
    tokenizer = load_tokenizer(shards)
    index = shard_index(shards)
    if rank == 0:
        cache_shards(shards, Path(settings["cache"]), True)
    dist.barrier()
    store = TokenStore(
        cache_shards(shards, Path(settings["cache"]), True), index, tokenizer.pad_token_id, True
    )
    plan = Plan(index, BatchingConfig(**settings["batching"]))

    def build(config):
        return Engine(
            build_student(
                config.student, tokenizer, 64, config.seed, config.gradient_checkpointing
            ),
            config.optimizer,
            config.precision,
            config.zero_stage,
            plan.config.global_batch_size // num_ranks,
        )

    for name, case in settings["cases"].items():
        config = TrainConfig.model_validate(case)
        engine = build(config)
        batch = store.read(plan.step(0, 1).rows, rank, num_ranks, config.micro_batch_size)
        sizes = bucket_sizes(engine)
        before = whole_state(engine)
        broken = break_gradient(engine, rank) if name.startswith("broken") else None
        after = whole_state(engine)
        torch.manual_seed(0)
        in_backward = count_in_backward(engine, reduced)
        measures = accumulate_gradient(engine, batch, config.loss)
        before_step = sum(reduced)
        kept = keep_gradient(engine, reduced)
        norm = engine.step(1e-3)
        found = {
            "gradient": kept[1].float(),
            "measures": measures,
            "norm": norm,
            "dtype": str(next(engine.model.parameters()).dtype),
            "num_reduced": sum(in_backward) + kept[0] - before_step,
            "num_parameters": len(kept[1]),
            "bucket_bytes": max(sizes, default=0),
            "broken": broken,
            "states": (before, after, whole_state(engine)),
        }
        if rank == 0:
            torch.save(found, f"{settings['out']}/{name}-{num_ranks}.pt")

    for name, run in settings["runs"].items():
        config = TrainConfig.model_validate(run["config"])
        engine = build(config)
        planned = Plan(index, BatchingConfig(**run.get("batching", settings["batching"])))
        draft = Draft(Root(settings["root"]), Spec("model", 1, {"run": run.get("like", name)}))
        miner = Miner(
            draft,
            Path(settings["cache"]),
            planned,
            store,
            engine,
            config.micro_batch_size,
            rank == 0,
        )
        progress = checkpoint.load(Path(run["load"]), engine, rank) if run["load"] else Progress()
        started_at = progress.step
        if run.get("break_step", -1) >= started_at:
            break_step(engine, run["break_step"] - started_at, rank)
        synchronized.clear()
        folder = Path(settings["out"]) / name

        def save(progress, engine=engine, config=config, folder=folder):
            (folder / f"{progress.step}").mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder / f"{progress.step}", engine, progress, config, rank)

        def test(progress, engine=engine):
            if rank == 0:
                row = {"step": progress.step, "task": MEAN, "split": "", "metric": "ndcg_at_10"}
                progress.tests.append({**row, "value": score(engine.model, tokenizer)})
            dist.barrier()

        fit(engine, planned, store, config, progress, miner, lambda _: None, save, test)
        dist.barrier()
        if rank == 0:
            records = [
                {key: value for key, value in record.items() if not key.endswith("_seconds")}
                for record in progress.records
            ]
            found = {
                "weights": weights(engine),
                "records": records,
                "started_at": started_at,
                "tests": progress.tests,
                "num_synchronized": len(synchronized),
            }
            torch.save(found, f"{settings['out']}/{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main()
