"""How far a run is, and what it prints."""

import itertools
from types import SimpleNamespace

from clusterlib.artifacts.tables import MEAN
from train.progress import Progress, ProgressLines

OTHERS = [("local", "ndcg_at_10"), (MEAN, "mrr_at_10")]


def test_the_best_step_is_the_first_of_the_highest_means():
    means = {5: 0.25, 10: 0.5, 15: 0.5, 20: 0.125}
    rows = [
        {"step": step, "task": MEAN, "metric": "ndcg_at_10", "value": value}
        for step, value in means.items()
    ]
    others = [{"step": 20, "task": task, "metric": metric, "value": 1.0} for task, metric in OTHERS]
    progress = Progress(tests=[*rows, *others])
    assert progress.means() == means and progress.best_step == 10


def test_steps_that_were_skipped_are_counted_in_all_and_at_the_end():
    for flags in itertools.product([False, True], repeat=4):
        progress = Progress([{"skipped": flag} for flag in flags])
        at_end = "".join("x" if flag else "." for flag in flags).rpartition(".")[2]
        assert (progress.num_skipped, progress.num_skipped_last) == (sum(flags), len(at_end))


def record(**changes):
    return {"skipped": False, "loss": 2.0, "accuracy": 0.5, "hardness": 0.25, **changes}


def test_lines_come_at_the_start_seldom_at_skipped_steps_at_tests_and_at_the_end(
    monkeypatch, capsys
):
    now = [100.0]
    monkeypatch.setattr("train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    phase = SimpleNamespace(
        settings=SimpleNamespace(title="cluster k=2"), num_batches=7, strata=[1, 2, 3]
    )
    plan = SimpleNamespace(config=SimpleNamespace(global_batch_size=8), phases=[phase])
    progress = Progress([record()] * 2)
    lines = ProgressLines("demo/arm", plan, 8, progress)
    for step in range(3, 9):
        now[0] += 4.0
        odd = record(skipped=True, loss=float("nan"), stratum="a/1") if step == 6 else record()
        progress.records.append(odd)
        lines.on_step(progress)
    progress.tests.append({"step": 8, "task": MEAN, "metric": "ndcg_at_10", "value": 0.75})
    lines.on_test(progress)
    assert capsys.readouterr().out.splitlines() == [
        "train demo/arm: cluster k=2: 7 batches an epoch, 3 strata, 8 steps of 8 pairs, continued "
        "at step 2",
        "train step 3/8 loss 2.000 accuracy 0.500 hardness 0.250 2 pairs/s 20 s left",
        "train step 6/8 skipped: its gradient is not finite (loss nan, stratum a/1); 1 skipped so "
        "far",
        "train step 6/8 loss nan accuracy 0.500 hardness 0.250 2 pairs/s 8 s left",
        "train step 8/8 loss 2.000 accuracy 0.500 hardness 0.250 2 pairs/s 0 s left",
        "train step 8/8 tests: mean NDCG@10 0.7500, best 0.7500 at step 8",
    ]
