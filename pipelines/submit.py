"""submit: run a recipe as a job on a Ray cluster, with its log here and its exit status
returned.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
import tempfile
from pathlib import Path

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from clusterlib.artifacts.credentials import redacted
from clusterlib.errors import StrataError
from pipelines import PACKAGES
from pipelines.files import absolute
from pipelines.recipe import RunConfig

_ROOT = Path(__file__).parents[1]


def submit(config: RunConfig, command: str, root: str, address: str) -> int:
    """Send `strata COMMAND` with the resolved recipe to a Ray cluster and follow it to the end.

    The job's working folder holds our packages and the recipe. Installed packages, data and the
    root must be reachable from the nodes.

    Args:
        address: of the cluster's dashboard, such as http://127.0.0.1:8265.

    Returns:
        0 when the job succeeded, 1 otherwise.

    Raises:
        StrataError: no cluster answers at the address.
    """
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise StrataError(
            f"--address {address}: no Ray dashboard answers there ({error})"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            shutil.copytree(
                _ROOT / package,
                Path(folder) / package,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        )
        job = client.submit_job(
            entrypoint=shlex.join(
                ["python", "-m", "pipelines.cli", command, "recipe.yaml", "--root", absolute(root)]
            ),
            runtime_env={"working_dir": folder},
        )
    print(f"submit: {job} on {redacted(address)}")
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    print(f"submit: {job} {status.value.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
