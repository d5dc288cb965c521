"""Work on a Ray cluster: workers of a study, or one piece of work on a node that has a named resource."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from mpsearch.errors import InputError, MpsearchError, ResourceError, UnsafeError
from mpsearch.logs import without_password

if TYPE_CHECKING:
    from mpsearch.working import Done, Order, Worker

_SAFE = Version("2.52")
#: Bytes of Ray's store of objects on this machine, when Ray is started here: the least that it takes.
_STORE = 80 * 2**20
#: Workers may die this often in a row without having claimed anything.
_PATIENCE = 3
#: Seconds that workers may take to end when they are told to.
_FAREWELL = 10.0

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
    ray, begun = _connected(address)
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


def _connected(address: str) -> tuple[Any, bool]:
    """Return Ray, connected to a cluster, and whether that was done here.

    Raises:
        InputError: Ray is not installed, or the cluster is not reached (E432).
        UnsafeError: a version that a page in a browser can drive (E620).
    """
    os.environ.update({name: text for name, text in _QUIET.items() if name not in os.environ})
    try:
        import ray
    except ImportError as error:
        raise InputError("E432", "Ray is not installed", advice="pip install 'mpsearch[ray]'") from error
    _check_version(ray.__version__)
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # A store for objects is not needed: only names travel.
        ray.init(include_dashboard=False, object_store_memory=_STORE, **quiet)
        return ray, True
    _check_reached(address)
    try:
        ray.init(address=address, **quiet)
    except _no_entry(ray) as error:
        raise _locked(address) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            "E432", f"no Ray cluster at '{address}': {str(error).splitlines()[0]}",
            advice="ray start --head on one machine, ray start --address=… on the others",
        ) from error  # fmt: skip
    return ray, True


def _no_entry(ray: Any) -> Any:
    """What Ray raises where a token is missing; its earlier versions ask for none."""
    return getattr(ray.exceptions, "AuthenticationError", ())


def _locked(address: str) -> InputError:
    return InputError(
        "E432",
        f"the Ray cluster at '{address}' asks for its token",
        advice="export RAY_AUTH_MODE=token, and give its token in the file that RAY_AUTH_TOKEN_PATH names",
    )


def _check_version(version: str) -> None:
    """Refuse versions of Ray that any page in a browser on the same machine can make run code (CVE-2025-62593).

    >>> _check_version("2.60.0")
    """
    if Version(version) < _SAFE:
        raise UnsafeError(
            "E620",
            f"Ray {version} can be driven by any web page (CVE-2025-62593)",
            advice=f"pip install -U 'ray>={_SAFE}', or leave Ray out: executor = 'local'",
        )


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


class RayWorkers:
    """Keeps workers alive on a Ray cluster. They are told names alone: models and connections never travel.

    Every node must reach the database and have the model's folder under the same path, and the same versions.

    Attributes:
        workers: how many.
        address: of the cluster; ``auto`` for the one that this machine is part of; one is started here when empty.
        resource: name of a custom resource that the nodes must have; any node when empty.
        gpus: of each worker, or its share of one.
        cpus: of each worker.
    """

    inside = False

    def __init__(
        self, workers: int = 2, address: str = "", resource: str = "", gpus: float = 0.0, cpus: float = 1.0
    ) -> None:
        self.workers, self.address, self.resource, self.gpus, self.cpus = workers, address, resource, gpus, cpus
        self._ray: Any = None
        self._begun = False
        self._running: dict[Any, str] = {}
        self._order: Order | None = None
        self._lost: Callable[[str, str], Sequence[str]] = lambda name, reason: ()
        self._early = 0

    def begin(self, order: Order, here: Callable[[], Worker], lost: Callable[[str, str], Sequence[str]]) -> None:
        """Connect, and start the workers.

        Raises:
            InputError: no Ray, no cluster (E432), or an executor's setting that makes no sense (E107).
            ResourceError: the cluster can never give what the workers ask for (E621).
            UnsafeError: an old version of Ray (E620).
        """
        self._order, self._lost = order, lost
        self._ray, self._begun = _connected(self.address)
        asked = {"CPU": self.cpus, "GPU": self.gpus, **({self.resource: 1.0} if self.resource else {})}
        for name, amount in asked.items():
            most = max((node["Resources"].get(name, 0.0) for node in self._ray.nodes() if node["Alive"]), default=0.0)
            if amount > most:
                self._leave()
                raise ResourceError(
                    "E621",
                    f"each worker asks for {amount:g} {name}, and no node of the cluster has more than {most:g}",
                    because="workers would wait for ever",
                    advice="ask for less, or join a node that has it: ray start --address=…",
                )
        self.turn()

    def turn(self) -> Sequence[Done]:
        """Start workers for those that died, with their node or without.

        Raises:
            ResourceError: they die before they do anything (E522), or the cluster is gone (E621).
        """
        try:
            ended = (
                self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)[0]
                if self._running
                else []
            )
            for ref in ended:
                name = self._running.pop(ref)
                tasks = self._lost(name, self._why(ref))
                self._early = 0 if tasks else self._early + 1
                if self._early >= _PATIENCE * self.workers:
                    raise ResourceError("E522", f"workers die before they do anything ({self._why(ref)})")
            while len(self._running) < self.workers:
                self._start()
        except (ConnectionError, self._ray.exceptions.RaySystemError) as error:
            raise ResourceError(
                "E621",
                f"the Ray cluster is gone: {str(error).splitlines()[0][:200]}",
                advice="nothing is lost; when the cluster is back: mpsearch resume",
            ) from error
        return ()

    def _start(self) -> None:
        name = f"ray:{socket.gethostname()}:{uuid.uuid4().hex[:12]}"
        resources = {self.resource: 1.0} if self.resource else None
        remote = self._ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, resources=resources, max_retries=0)(_work)
        self._running[remote.remote(self._order, name)] = name

    def _why(self, ref: Any) -> str:
        try:
            self._ray.get(ref, timeout=1.0)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return "ended by itself"

    def rest(self) -> None:
        """Workers wait for tasks."""

    def end(self, now: bool = False) -> None:
        """End the workers."""
        try:
            for ref in self._running:
                self._ray.cancel(ref, force=True)
            if self._running:
                # Until it has really ended a worker may claim another task.
                self._ray.wait(list(self._running), num_returns=len(self._running), timeout=_FAREWELL)
        except (ConnectionError, self._ray.exceptions.RayError):
            # Without their cluster workers end by themselves.
            pass
        for name in self._running.values():
            self._lost(name, "")
        self._running = {}
        self._leave()

    def _leave(self) -> None:
        if self._begun:
            self._begun = False
            self._ray.shutdown()


def _work(order: Order, name: str) -> None:
    from mpsearch.working import serve

    serve(order, lambda: False, name)


def check_shown(study: str, storage: str) -> None:
    """Refuse an address with a password: Ray shows the environment of its jobs to whoever opens its dashboard.

    Raises:
        UnsafeError: E622.
    """
    plain = without_password(storage)
    if plain != storage:
        raise UnsafeError(
            "E622",
            f"study '{study}' is not made a Ray job: the address of its database holds a password",
            because="Ray's dashboard shows the environment of jobs to everybody who reaches it",
            advice=f"put the password into ~/.pgpass on the nodes, and give --storage {shlex.quote(plain)}",
        )


def submit_job(
    address: str,
    study: str,
    storage: str,
    workers: int,
    working_dir: Path | None,
    requirements: Path | None,
    trusts: bool = False,
) -> str:
    """Have a Ray cluster drive a stored study as a job; return the job's name.

    Args:
        address: of the cluster's dashboard, such as ``http://127.0.0.1:8265``.
        study: name of the study.
        storage: address of the database, as the cluster sees it.
        workers: of the study.
        working_dir: folder that goes along; none when None.
        requirements: list of packages that the job's environment has; the nodes' own environment when None.
        trusts: run code that comes with the model.

    Raises:
        InputError: no dashboard answers there, or the list of packages is not there (E432, E101).
        UnsafeError: an old version of Ray (E620), or an address with a password, which the dashboard would show (E622).
    """
    check_shown(study, storage)
    try:
        import ray
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise InputError(
            "E432", "Ray is not installed with what its jobs need", advice="pip install 'mpsearch[ray]'"
        ) from error
    _check_version(ray.__version__)
    environment: dict[str, Any] = {"env_vars": {"MPSEARCH_STORAGE": storage}}
    if working_dir is not None:
        environment["working_dir"] = str(working_dir)
    if requirements is not None:
        if not requirements.is_file():
            raise InputError("E101", f"'{requirements}' not found", advice="give a requirements.txt, or leave it out")
        environment["pip"] = str(requirements)
    command = f"mpsearch worker --study {shlex.quote(study)} --executor ray --workers {workers} --set address=auto"
    command += " --trust-remote-code" if trusts else ""
    try:
        client = JobSubmissionClient(address)
        job: str = client.submit_job(entrypoint=command, runtime_env=environment, metadata={"study": study})
    except _no_entry(ray) as error:
        raise _locked(address) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            "E432", f"no Ray dashboard takes jobs at '{address}': {str(error).splitlines()[0][:200]}",
            advice="ray start --head --include-dashboard=true, and give its address: http://HOST:8265",
        ) from error  # fmt: skip
    return job
