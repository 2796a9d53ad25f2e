"""The command `strata`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from clusterlib.errors import StrataError
from pipelines import ENVIRONMENT, STAGES

if TYPE_CHECKING:
    from clusterlib.artifacts.artifact import Artifact, Root
    from pipelines.recipe import RunConfig
    from pipelines.run import Run


class _Command(click.Command):
    """A command that ends in one clear message and status 1 when the user's input is at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StrataError as error:
            click.echo(f"strata: {error}", err=True)
            ctx.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="strata", prog_name="strata")
def main() -> None:
    """Cluster-stratified contrastive pretraining of text embeddings, on Ray."""


_root = click.option(
    "--root", default="runs", show_default=True, help="Folder or URI for artifacts."
)


def _recipe_command(name: str, text: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command that takes a recipe, dotted overrides and the common options."""

    def decorate(function: Callable[..., None]) -> click.Command:
        for decorator in (
            click.option(
                "--dry-run", is_flag=True, help="Print the resolved recipe and what would run."
            ),
            click.option(
                "--address",
                help="Of a running Ray cluster; by default RAY_ADDRESS, else this machine.",
            ),
            _root,
            click.argument("overrides", nargs=-1, metavar="[SETTING=VALUE]..."),
            click.argument("recipe"),
        ):
            function = decorator(function)
        text_of_all = (
            f"{text}\n\nRECIPE is the name of a packaged recipe or the path of a .yaml file."
        )
        return main.command(name, cls=_Command, help=text_of_all, short_help=text)(function)

    return decorate


def _load(recipe: str, overrides: tuple[str, ...]) -> RunConfig:
    os.environ.update({**ENVIRONMENT, **os.environ})
    from clusterlib.artifacts.config import parse_overrides
    from pipelines.recipe import load_recipe

    return load_recipe(recipe, parse_overrides(overrides))


def _root_at(uri: str) -> Root:
    from clusterlib.artifacts.artifact import Root
    from clusterlib.artifacts.config import refuse_credentials
    from pipelines.files import absolute

    refuse_credentials("--root", uri)
    root = Root(absolute(uri))
    root.check_readable()
    return root


def _open(recipe: str, overrides: tuple[str, ...], root: str, dry_run: bool) -> Run | None:
    """The run to do, its root writable; None when it was only to be shown."""
    config = _load(recipe, overrides)
    from pipelines.run import Run

    run = Run(config, _root_at(root))
    if dry_run:
        _dry_run(run)
        return None
    run.all_specs()  # inputs and models that are not there show now, not after hours
    run.root.check_writable()
    return run


def _do(
    stages: list[str],
    recipe: str,
    overrides: tuple[str, ...],
    root: str,
    address: str | None,
    dry_run: bool,
) -> None:
    run = _open(recipe, overrides, root, dry_run)
    if run is None:
        return
    from pipelines.session import ray_session

    with ray_session(address):
        for stage in stages:
            for artifact in run.make(stage):
                click.echo(f"{stage}: {artifact.path}")
                if stage == "contamination":
                    _show_contamination(artifact)
    if "evaluate" in stages:
        _show_scores(run.scores(), list(run.arms))
    if "report" in stages:
        (report,) = run.make("report")
        click.echo(f"report: {report.path}/{report.parts()[0].path}")


@_recipe_command("run", "Run all stages of a recipe, skipping what is done.")
def _run_all(**arguments: Any) -> None:
    _do(list(STAGES), **arguments)


def _add_stage(stage: str, text: str) -> None:
    @_recipe_command(stage, text)
    def _run_stage(**arguments: Any) -> None:
        _do([stage], **arguments)


for _stage, _text in STAGES.items():
    if _stage != "evaluate":
        _add_stage(_stage, _text)


@_recipe_command("evaluate", STAGES["evaluate"])
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Score this folder or hub model instead.",
)
def _evaluate(models: tuple[str, ...], **arguments: Any) -> None:
    if not models:
        _do(["evaluate"], **arguments)
        return
    from clusterlib.artifacts.config import refuse_credentials

    for name in models:
        refuse_credentials("--model", name)
    address = arguments.pop("address")
    run = _open(**arguments)
    if run is None:
        return
    from pipelines.session import ray_session

    with ray_session(address):
        scores = run.score(models)
    _show_scores(scores, [])


@_recipe_command("tune", "Train and score every combination of tune.space, on finished shards.")
def _tune(
    recipe: str, overrides: tuple[str, ...], root: str, address: str | None, dry_run: bool
) -> None:
    run = _open(recipe, overrides, root, dry_run)
    if run is None:
        return
    from pipelines.session import ray_session

    with ray_session(address):
        outcomes = run.tune()
    click.echo(f"\n{run.config.tune.metric:>12}  {'seconds':>8}  trial")
    for outcome in outcomes:
        value = "failed" if outcome.value is None else f"{outcome.value:.4f}"
        click.echo(
            f"{value:>12}  {outcome.seconds:>8.0f}  {outcome.name}  {outcome.error or ''}".rstrip()
        )
    if any(outcome.error for outcome in outcomes):
        raise StrataError("some trials failed")


@main.command("plan", cls=_Command)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[SETTING=VALUE]...")
@_root
def _plan(recipe: str, overrides: tuple[str, ...], root: str) -> None:
    """Show what fills the batches of every arm of RECIPE, from finished shards and before training.

    Sizes of strata are the smallest, the median and the largest, in batches. Covered are the rows
    that an epoch visits; dropped are those that fill no batch, others every time; repeated those
    visited again.
    """
    config = _load(recipe, overrides)
    from pipelines.plan import format_plan
    from pipelines.run import Run

    run = Run(config, _root_at(root))
    for arm, phases in run.plan().items():
        click.echo(f"{format_plan(arm, phases, run.arms[arm].config.batching.global_batch_size)}\n")


@main.command("submit", cls=_Command)
@click.argument("command", type=click.Choice(["run", *STAGES, "tune"]))
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[SETTING=VALUE]...")
@click.option(
    "--address",
    default="http://127.0.0.1:8265",
    show_default=True,
    help="URL of the cluster's dashboard.",
)
@click.option("--root", required=True, help="Folder or URI for artifacts that every node reaches.")
def _submit(command: str, recipe: str, overrides: tuple[str, ...], address: str, root: str) -> None:
    """Run COMMAND on RECIPE as a job on a Ray cluster; follow its log and return its exit
    status.
    """
    config = _load(recipe, overrides)
    from clusterlib.artifacts.config import refuse_credentials
    from pipelines.submit import submit

    refuse_credentials("--root", root)
    sys.exit(submit(config, command, root, address))


@main.command("inspect", cls=_Command)
@click.argument("artifact", required=False)
@_root
@click.option("--verify", is_flag=True, help="Read every part and check its digest.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON array, an object for each artifact."
)
def _inspect(artifact: str | None, root: str, verify: bool, as_json: bool) -> None:
    """Show an ARTIFACT, named KIND or KIND/FINGERPRINT; list all without one."""
    from pipelines.inspect import as_text, describe, listing

    opened = _root_at(root)
    artifacts = opened.artifacts()
    found = [item for item in artifacts if artifact in (None, item.kind, item.name)]
    if artifact is not None and not found:
        known = ", ".join(item.name for item in artifacts) or "none"
        raise StrataError(
            f"{artifact}: no finished artifact of that name under {opened.path}; there are: {known}"
        )
    if verify:
        for item in found:
            item.verify()
    if as_json:
        click.echo(json.dumps([describe(item) for item in found], indent=1))
    elif artifact is None:
        click.echo(listing(found))
    else:
        click.echo("\n".join(as_text(describe(item)) for item in found))


@main.command("settings", cls=_Command)
@click.argument("section", default="")
@click.option("--markdown", is_flag=True, help="As the page pipelines/settings.md.")
def _settings(section: str, markdown: bool) -> None:
    """Show every setting of a recipe, or those of one SECTION such as train.optimizer."""
    from pipelines.recipe import RunConfig
    from pipelines.settings import as_markdown, as_text, settings

    found = settings(RunConfig, section)
    click.echo(as_markdown(found) if markdown else as_text(found), nl=not markdown)


@main.command("clean", cls=_Command)
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@_root
@click.option("--delete", is_flag=True, help="Delete what is shown.")
def _clean(recipes: tuple[str, ...], root: str, delete: bool) -> None:
    """Show what no RECIPE given needs: in the root, artifacts, drafts nobody works on and files
    that no manifest names; on this machine, caches.

    Without a RECIPE all finished artifacts and caches stay. What a driver is writing always does;
    what it reads does if its recipe is given.
    """
    configs = [_load(recipe, ()) for recipe in recipes]
    from clusterlib.artifacts.artifact import Root
    from pipelines.clean import as_text, survey
    from pipelines.files import absolute
    from pipelines.run import Run

    opened = Root(absolute(root))
    found = survey(opened, [Run(config, opened) for config in configs])
    click.echo(as_text(found))
    if delete:
        for waste in found:
            waste.delete()
    click.echo("deleted" if delete else "nothing was deleted; --delete does it")


def _show_contamination(made: Artifact) -> None:
    from pipelines.contamination import format_contamination

    if made.num_rows:
        click.echo(f"\n{format_contamination(made.read().to_pylist())}\n")


def _show_scores(scores: Mapping[str, Artifact], arms: Sequence[str]) -> None:
    from pipelines.report import format_scores, score_tables, verdict

    tables = score_tables(scores, arms)
    for table in tables:
        click.echo(f"\n{format_scores(table, arms)}")
    click.echo(f"\n{verdict(tables[0], arms)}".rstrip())


def _dry_run(run: Run) -> None:
    import yaml

    click.echo(
        yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    )
    for spec in run.all_specs():
        state = "done" if run.root.find(spec) else "to make"
        click.echo(f"{state:<8} {spec.name:<32} {spec.label}")


if __name__ == "__main__":
    main()
