"""One rank of tests/train/test_ranks.py: takes steps under DeepSpeed and writes what it found.

Usage: ranks_worker.py SETTINGS.json; RANK, WORLD_SIZE and the like are in the environment.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from clusterlib.artifact import Root
from clusterlib.plan import BatchingConfig, Plan
from train import checkpoint
from train.data import TokenStore, cache_shards, load_tokenizer, shard_index
from train.engine import Engine
from train.gradcache import accumulate_gradient
from train.loop import Progress, TrainConfig, fit
from train.model import build_student


def weights(engine):
    return torch.cat([weight.detach().float().ravel() for weight in engine.model.parameters()])


def keep_gradient(engine):
    """A list that the next step leaves the reduced gradient in, between its reduction and the update."""
    from deepspeed.utils import safe_get_full_grad

    kept = []
    update = engine._engine._take_model_step

    def take(*arguments):
        kept.append(torch.cat([safe_get_full_grad(weight).ravel().clone() for weight in engine.model.parameters()]))
        update(*arguments)

    engine._engine._take_model_step = take
    return kept


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shards = Root(settings["root"]).open(settings["shards"], "make it")
    tokenizer = load_tokenizer(shards)
    index = shard_index(shards)
    if rank == 0:
        cache_shards(shards, Path(settings["cache"]))
    dist.barrier()
    store = TokenStore(cache_shards(shards, Path(settings["cache"])), index, tokenizer.pad_token_id)
    plan = Plan(index, BatchingConfig(**settings["batching"]))

    def build(config):
        return Engine(
            build_student(config.student, tokenizer, 64, config.seed),
            config.optimizer,
            config.num_steps(plan),
            config.precision,
            config.zero_stage,
            plan.config.global_batch_size // num_ranks,
        )

    for name, case in settings["cases"].items():
        config = TrainConfig.model_validate({**case, "num_workers": num_ranks})
        engine = build(config)
        batch = store.read(plan.step(0, 1).rows, rank, num_ranks, config.micro_batch_size)
        torch.manual_seed(0)
        measures = accumulate_gradient(engine, batch, config.loss.temperature)
        kept = keep_gradient(engine)
        norm, _ = engine.step()
        dtype = str(next(engine.model.parameters()).dtype)
        found = {"gradient": kept[0].float(), "measures": measures, "norm": norm, "dtype": dtype}
        if rank == 0:
            torch.save(found, f"{settings['out']}/{name}-{num_ranks}.pt")

    for name, case in settings["resumes"].items():
        config = TrainConfig.model_validate({**case, "num_workers": num_ranks})
        folder = Path(settings["out"]) / f"checkpoint-{name}-{num_ranks}"

        def save(progress, engine, config=config, folder=folder):
            checkpoint.save(folder / f"{progress.step}", engine, progress, config, rank)

        whole = build(config)
        progress = Progress()
        fit(whole, plan, store, config, progress, lambda _: None, lambda p, e=whole: save(p, e))
        dist.barrier()
        again = build(config)
        resumed = checkpoint.load(folder / f"{config.checkpoint_every_steps}", again)
        started_at = resumed.step
        fit(again, plan, store, config, resumed, lambda _: None, lambda _: None)
        if rank == 0:
            timed = ("step_seconds", "data_seconds")
            records = [
                [{key: value for key, value in record.items() if key not in timed} for record in run.records]
                for run in (progress, resumed)
            ]
            found = {"weights": [weights(whole), weights(again)], "records": records, "started_at": started_at}
            torch.save(found, f"{settings['out']}/{name}-{num_ranks}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main()
