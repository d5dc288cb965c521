"""Work on a node of a Ray cluster that has a named resource, such as the machine that a plan is for."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from mpsearch.errors import InputError, MpsearchError

#: What Ray would otherwise do on its own: count its users, and repeat every worker's output.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
#: What every node of a cluster has.
_BUILT_IN = ("node:", "object_store_memory", "memory", "CPU", "GPU", "accelerator_type:")


def run_on(address: str, resource: str, work: Callable[..., Any], *arguments: Any, patience: float = 3600.0) -> Any:
    """Run a function on a node that has a resource, and return what it returns.

    The node runs the mpsearch that is installed there. Arguments and results are plain values.

    Args:
        address: of the cluster; ``auto`` for the one that this machine is part of.
        resource: name of the custom resource that the node was started with
            (``ray start --resources '{"phone": 1}'``).
        work: a function that can be imported on the node.
        arguments: of the function.
        patience: seconds to wait for the result.

    Raises:
        InputError: Ray is not installed, the cluster is not reached, or no node has the resource (E432).
    """
    os.environ.update({name: text for name, text in _QUIET.items() if name not in os.environ})
    try:
        import ray
    except ImportError as error:
        raise InputError("E432", "Ray is not installed", advice="pip install 'mpsearch[ray]'") from error
    begun = not ray.is_initialized()
    if begun:
        _check_reached(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                "E432", f"no Ray cluster at '{address}': {str(error).splitlines()[0]}",
                advice="ray start --head on one machine, ray start --address=… on the others",
            ) from error  # fmt: skip
    try:
        there = ray.cluster_resources()
        if resource not in there or resource.startswith(_BUILT_IN):
            own = sorted(name for name in there if not name.startswith(_BUILT_IN))
            raise InputError(
                "E432", f"no node of the cluster has the resource '{resource}'; there is {', '.join(own) or 'none'}",
                advice=f"start the node with: ray start --address=… --resources '{{\"{resource}\": 1}}'",
            )  # fmt: skip
        remote = ray.remote(num_cpus=1, resources={resource: 1}, max_retries=0)(work)
        asked = remote.remote(*arguments)
        try:
            return ray.get(asked, timeout=patience)
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(asked, force=True)
            raise InputError("E432", f"the node with '{resource}' did not answer within {patience:g} s") from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MpsearchError):
                raise error.cause from None
            raise InputError("E432", f"the node with '{resource}' failed: {error.cause!r}") from error
    finally:
        if begun:
            ray.shutdown()


def _check_reached(address: str) -> None:
    """Refuse an address where nothing answers; Ray itself would go on trying for minutes.

    Raises:
        InputError: E432.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise InputError("E432", f"no Ray cluster at '{address}': {error}", advice="ray start --head there") from error
