"""A connection to a Ray cluster, or a Ray of our own on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data

from pipelines import ENVIRONMENT, PACKAGES


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine and stop it at the end.

    A process that is connected already stays as it is.

    Args:
        address: of a running Ray cluster; by default RAY_ADDRESS, else this machine.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # One logical CPU more than there are: coordinators take it, or actors that hold all others
        # would leave none for the tasks they wait for, and the run would hang without a word.
        num_cpus = (os.cpu_count() or 1) + 1
        # Without the dashboard Ray Train cannot clean up after a trial that was stopped: it keeps
        # its placement group and the next one hangs (seen with ray 2.60). It listens on loopback
        # only. "local", or Ray would look for a cluster that someone else started here.
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=True, logging_level=logging.ERROR
        )
    else:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env=_runtime_env())
    try:
        yield
    finally:
        ray.shutdown()


def _runtime_env() -> dict[str, Any]:
    """What travels to the nodes of a Ray cluster: our packages, unless a job has brought them, and
    settings.
    """
    variables = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {"env_vars": variables}
    root = Path(__file__).parents[1]
    return {"env_vars": variables, "py_modules": [str(root / package) for package in PACKAGES]}
