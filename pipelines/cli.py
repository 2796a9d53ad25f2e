"""The command `strata`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clusterlib.errors import StrataError

if TYPE_CHECKING:
    from pipelines.run import Run, RunConfig

STAGES = {
    "ingest": "read source files into pairs",
    "embed": "embed the pairs with the teacher",
    "cluster": "fit k-means of every source",
    "shard": "group rows by cluster and tokenise them",
    "train": "train the student of every arm",
    "evaluate": "score students and references",
    "report": "write the HTML report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, or 1 after an error message."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except StrataError as error:
        return _fail(str(error))
    except Exception as error:  # noqa: BLE001 - Ray wraps what a task raised; find our own message in it
        found = _strata_error(error)
        if found is None:
            raise
        return _fail(str(found))


def _fail(message: str) -> int:
    print(f"strata: {message}", file=sys.stderr)
    return 1


def _strata_error(error: BaseException) -> StrataError | None:
    """The StrataError that another exception was raised from or wraps, if any."""
    seen: list[Any] = [error]
    for current in seen:
        if isinstance(current, StrataError):
            cause = getattr(current, "cause", None)  # Ray's copy carries the task's traceback in its text
            return cause if isinstance(cause, StrataError) else current
        linked = [current.__cause__, current.__context__, getattr(current, "cause", None)]
        linked += list(getattr(current, "worker_failures", {}).values())
        seen += [item for item in linked if isinstance(item, BaseException) and item not in seen]
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="strata",
        description="Cluster-stratified contrastive pretraining of text embeddings, on Ray.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", help="name of a packaged recipe, or path of a .yaml file")
    recipe.add_argument("overrides", nargs="*", help="settings to change, such as train.steps=100")
    recipe.add_argument("--root", default="runs", help="folder or URI for artifacts (default: %(default)s)")
    recipe.add_argument("--address", help="of a running Ray cluster; by default RAY_ADDRESS, else this machine")
    recipe.add_argument("--dry-run", action="store_true", help="print the resolved recipe and what would run")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[recipe], help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("run", _stages, "run all stages of a recipe, skipping what is done")
    for stage, text in STAGES.items():
        add(stage, _stages, text)
    add("tune", _tune, "train and score every combination of tune.space on finished shards")
    submit = add("submit", _submit, "run a recipe as a job on a Ray cluster; --address is its dashboard's URL")
    submit.add_argument("--job-command", default="run", choices=["run", *STAGES, "tune"], help="(default: %(default)s)")
    inspect = commands.add_parser("inspect", help="show an artifact, or list all", description="Show an artifact.")
    inspect.add_argument("artifact", nargs="?", help="KIND or KIND/FINGERPRINT; by default all are listed")
    inspect.add_argument("--root", default="runs", help="folder or URI of the artifacts (default: %(default)s)")
    inspect.add_argument("--verify", action="store_true", help="read every part and check its digest")
    inspect.set_defaults(run=_inspect)
    return parser


def _load(arguments: argparse.Namespace) -> RunConfig:
    _quiet()
    from clusterlib.config import parse_overrides
    from pipelines.run import load_recipe

    return load_recipe(arguments.recipe, parse_overrides(arguments.overrides))


def _quiet() -> None:
    """Settings that libraries read when they are imported, here and in the processes Ray starts."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "DS_LOG_LEVEL": "error",
    }.items():
        os.environ.setdefault(name, value)


def _stages(arguments: argparse.Namespace) -> int:
    """Run one stage, or all."""
    run = _run(arguments)
    if arguments.dry_run:
        return _dry_run(run)
    from pipelines.stage import ray_session

    stages = list(STAGES) if arguments.command == "run" else [arguments.command]
    run.root.check_writable()
    with ray_session(arguments.address):
        for stage in stages:
            made = getattr(run, stage)()
            for artifact in {item.name: item for item in (made.values() if isinstance(made, dict) else [made])}.values():
                print(f"{stage}: {artifact.path}")
    if "report" in stages:
        _show_scores(run)
    return 0


def _show_scores(run: Run) -> None:
    from pipelines.report import REPORT, format_scores, score_tables, verdict

    scores = run.evaluate_finished()
    tables = score_tables(scores, list(run.arms))
    for table in tables:
        print("\n" + format_scores(table, list(run.arms)))
    print(f"\n{verdict(tables[0], list(run.arms))}".rstrip())
    print(f"report: {run.report().path}/{REPORT}")


def _run(arguments: argparse.Namespace) -> Run:
    config = _load(arguments)
    from clusterlib.artifact import Root
    from pipelines.run import Run

    return Run(config, Root(arguments.root))


def _dry_run(run: Run) -> int:
    import yaml

    print(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    for owner, spec in run.specs():
        state = "done" if run.root.find(spec) else "to make"
        print(f"{state:<8} {spec.name:<32} {owner}")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    run = _run(arguments)
    if arguments.dry_run:
        return _dry_run(run)
    from pipelines.stage import ray_session

    run.root.check_writable()
    with ray_session(arguments.address, dashboard=True):
        outcomes = run.tune()
    metric = run.config.tune.metric
    print(f"\n{metric:>12}  {'seconds':>8}  trial")
    for outcome in outcomes:
        value = "failed" if outcome.value is None else f"{outcome.value:.4f}"
        print(f"{value:>12}  {outcome.seconds:>8.0f}  {outcome.name}{'  ' + outcome.error if outcome.error else ''}")
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _submit(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from pipelines.submit import submit

    return submit(config, arguments.job_command, arguments.root, arguments.address or "http://127.0.0.1:8265")


def _inspect(arguments: argparse.Namespace) -> int:
    from clusterlib.artifact import Root
    from pipelines.inspect import describe, listing

    root = Root(arguments.root)
    artifacts = root.artifacts()
    wanted = arguments.artifact
    if wanted is None:
        print(listing(artifacts))
        return 0
    found = [artifact for artifact in artifacts if wanted in (artifact.kind, artifact.name)]
    if not found:
        known = ", ".join(artifact.name for artifact in artifacts) or "none"
        raise StrataError(f"{wanted}: no finished artifact of that name under {root.path}; there are: {known}")
    for artifact in found:
        if arguments.verify:
            artifact.verify()
        print(describe(artifact))
    return 0


if __name__ == "__main__":
    sys.exit(main())
