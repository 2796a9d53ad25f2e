"""A connection to a Ray cluster, or a Ray of our own on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._private import ray_constants, ray_logging

from clusterlib.errors import StrataError
from pipelines import ENVIRONMENT, PACKAGES

_LOOPBACK = "127.0.0.1"
# What Ray's C++ logs, such as `[2026-11-25 12:46:40,455 E 21682 21719] core_worker.cc:2465: ...`.
_LOGGED_BY_RAY = re.compile(r"\[[\d :,-]+ [DIWE] \d+ \d+\] (\(\w+\) )?\S+\.(cc|h):\d+: ")


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
    with _own_ray() if address is None else _connection(address), _plain_output():
        yield


@contextmanager
def _connection(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env=_runtime_env())
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StrataError(
            f"--address {address}: no Ray cluster to connect to ({reason}); give the HOST:PORT of "
            "its head, or none for a Ray of its own"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray() -> Iterator[None]:
    """A Ray on this machine that no other machine can reach."""
    # One logical CPU more than there are: coordinators take it, or actors that hold all others
    # would leave none for the tasks they wait for, and the run would hang without a word.
    num_cpus = (os.cpu_count() or 1) + 1
    with _loopback():
        # Without the dashboard Ray Train cannot clean up after a trial that was stopped: it keeps
        # its placement group and the next one hangs (seen with ray 2.60). "local", or Ray would
        # look for a cluster that someone else started here.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            logging_level=logging.ERROR,
            _node_ip_address=_LOOPBACK,
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _plain_output() -> Iterator[None]:
    """What workers print is printed here as it is, where Ray would put a prefix before each line,
    and not what Ray's own C++ logs; that stays in Ray's log files.
    """
    _give_warning_to_nobody()
    lines = ray_logging.global_worker_stdstream_dispatcher
    lines.remove_handler("ray_print_logs")
    lines.add_handler("strata", _print_lines)
    try:
        yield
    finally:
        lines.remove_handler("strata")


def _print_lines(data: dict[str, Any]) -> None:
    # Ray's own processes, such as its autoscaler, have names for numbers.
    whose = "" if str(data["pid"]).isdecimal() else f"ray {data['pid']}: "
    for line in data["lines"]:
        if not _LOGGED_BY_RAY.match(line):
            print(f"{whose}{line}", file=sys.stderr if data["is_err"] else sys.stdout, flush=True)


class _Nobody:
    def __init__(self, argument: Any) -> None:
        """It has one, or there is nothing to warn of."""


def _give_warning_to_nobody() -> None:
    """Ray warns once in a process that an actor has arguments in the object store, which is how
    Ray Data makes its actors. It has no setting for it: so it warns now, and nobody sees it.
    Delete it when https://github.com/ray-project/ray/issues/53727 is closed.
    """
    actor = ray.remote(_Nobody).options(max_restarts=1, resources={"nowhere": 1})
    argument = ray.put(None)
    nowhere, seen = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(nowhere, 2)  # C++ writes there, whatever sys.stderr is
    try:
        made = actor.remote(argument)
    finally:
        os.dup2(seen, 2)
        os.close(nowhere)
        os.close(seen)
    ray.kill(made)


@contextmanager
def _loopback() -> Iterator[None]:
    """All that Ray and its ranks listen on is on loopback, and its processes know their cluster
    from others on this machine, of which Ray Train's would otherwise find several and fail.
    """
    with socket.socket() as free:
        free.bind((_LOOPBACK, 0))
        port = str(free.getsockname()[1])
    interface = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    variables = {
        "RAY_ADDRESS": f"{_LOOPBACK}:{port}",
        "RAY_GCS_SERVER_PORT": port,
        # Else Ray takes another address for loopback's, and listens on every interface. It is how
        # Ray does it on laptops.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "GLOO_SOCKET_IFNAME": interface,
    }
    before = dict(os.environ)
    enabled = ray_constants.ENABLE_RAY_CLUSTER  # read from the environment when Ray was imported
    os.environ.update(variables)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name in variables:
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})


def _runtime_env() -> dict[str, Any]:
    """What travels to the nodes of a Ray cluster: our packages, unless a job has brought them, and
    settings.
    """
    variables = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {"env_vars": variables}
    root = Path(__file__).parents[1]
    return {"env_vars": variables, "py_modules": [str(root / package) for package in PACKAGES]}
