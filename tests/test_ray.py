"""Timing kernels on a node of a real Ray cluster that has a named resource."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from mpsearch import registry
from mpsearch.cli.main import run
from mpsearch.errors import InputError, MpsearchError, ResourceError
from mpsearch.executors.ray import RayWorkers, check_shown, run_on, submit_job
from mpsearch.hardware.profile import Profile
from mpsearch.logs import without_password
from mpsearch.ports import Executor
from mpsearch.testing.executors import ProcessSuite
from mpsearch.testing.pretended import Bench, pretend
from tests.conftest import study_settings
from tests.postgres import PASSWORD


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes on this machine; the second one is the phone. Workers know the made-up work of the suite as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", pretend(tmp_path_factory.mktemp("start")))
        from ray.cluster_utils import Cluster

        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        found.add_node(num_cpus=1, resources={"phone": 1})
        yield found
        found.shutdown()


def where() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


@pytest.mark.filterwarnings("ignore")  # of Ray's own start
def test_kernels_are_timed_where_the_resource_is(cluster: Any, small_llama: Path, tmp_path: Path) -> None:
    listed = tmp_path / "layers.json"
    listed.write_text(json.dumps(mp.layers(str(small_llama)).to_json()), encoding="utf-8")
    out = tmp_path / "profile.json"
    command = ["profile", str(listed), "-f", "int8-g64", "-w", "tpot", "--limit", "0.02", "-q", "--out", str(out)]
    assert run([*command, "--ray", cluster.address, "--on", "phone"]) == 0
    profile = Profile.from_json(json.loads(out.read_text(encoding="utf-8")))
    assert all(time.status == "ok" for time in profile.times)
    phone = cluster.list_all_nodes()[1].node_id
    assert run_on(cluster.address, "phone", where) == phone
    with pytest.raises(InputError, match="no node of the cluster has the resource 'watch'; there is phone") as caught:
        run_on(cluster.address, "watch", where)
    assert caught.value.code == "E432"


def nap() -> None:
    time.sleep(60)


def refuse() -> None:
    raise InputError("E431", "there is no such kernel on this node")


def fail() -> None:
    raise RuntimeError("the disk is gone")


@pytest.mark.filterwarnings("ignore")
def test_what_goes_wrong_on_the_node_is_said_here(cluster: Any) -> None:
    with pytest.raises(InputError, match="no such kernel on this node") as caught:
        run_on(cluster.address, "phone", refuse)
    assert caught.value.code == "E431"
    with pytest.raises(InputError, match="the disk is gone"):
        run_on(cluster.address, "phone", fail)
    with pytest.raises(InputError, match="did not answer within 1 s"):
        run_on(cluster.address, "phone", nap, patience=1.0)
    assert run_on(cluster.address, "phone", where)  # the node is free again
    with pytest.raises(InputError, match="no node of the cluster has the resource 'CPU'"):
        run_on(cluster.address, "CPU", where)


def test_a_cluster_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], small_llama: Path) -> None:
    with pytest.raises(InputError, match=r"no Ray cluster at '127\.0\.0\.1:9'"):
        run_on("127.0.0.1:9", "phone", where)
    assert run(["profile", str(small_llama), "-f", "int8-g64", "--ray", "auto"]) == 2
    assert "--ray and --on go together" in capsys.readouterr().err


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[str]:
    """The address of the cluster, that this process stays connected to."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster.address
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
class OnRay(ProcessSuite):
    @pytest.fixture
    def executor(self, connected: str) -> Executor:
        return RayWorkers(1, connected)

    @pytest.fixture
    def two(self, connected: str) -> Executor:
        return RayWorkers(2, connected)


class TestRayOnFile(OnRay):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'results.db'}"


class TestRayOnServer(OnRay):
    @pytest.fixture
    def storage(self, database: str) -> str:
        return database


@pytest.mark.filterwarnings("ignore")
def test_what_a_cluster_can_never_give_is_refused_at_once(connected: str, tmp_path: Path) -> None:
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    for settings, asked in (({"resource": "watch"}, "1 watch"), ({"gpus": 0.5}, "0.5 GPU"), ({"cpus": 64}, "64 CPU")):
        with bench.driver(RayWorkers(1, connected, **settings)) as driver:
            with pytest.raises(ResourceError, match=f"each worker asks for {asked}, and no node of") as caught:
                list(driver.do(bench.jobs(1)))
            driver.leave("paused")
        assert caught.value.code == "E621"
    bench.store.close()


@pytest.mark.filterwarnings("ignore")
def test_workers_are_placed_by_resource(connected: str, cluster: Any, tmp_path: Path) -> None:
    import ray

    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    free = "node:__internal_head__"
    with bench.driver(RayWorkers(1, connected, resource="phone")) as driver:
        doing = driver.do(bench.jobs(3, seconds=0.2))
        next(doing)
        assert ray.available_resources().get("phone", 0.0) == 0.0
        assert ray.available_resources()[free] == 1.0
        assert len(list(doing)) == 2
    bench.store.close()


def test_an_old_version_of_ray_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.51.9")
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    with bench.driver(RayWorkers(1)) as driver, pytest.raises(MpsearchError, match="CVE-2025-62593") as caught:
        list(driver.do(bench.jobs(1)))
    bench.store.close()
    assert (caught.value.code, caught.value.exit_code) == ("E620", 8)


@pytest.mark.filterwarnings("ignore")
def test_a_study_ends_the_same_when_a_node_is_lost(
    connected: str, cluster: Any, small_llama: Path, tmp_path: Path
) -> None:
    alone = mp.study(**study_settings(small_llama, tmp_path, estimator="fisher", storage=str(tmp_path / "alone.db")))
    alone.run()
    spares = [cluster.add_node(num_cpus=1, resources={"spare": 1}) for _ in range(2)]
    where = {"executor": "ray", "executor_settings": {"address": connected, "resource": "spare"}, "workers": 2}
    study = mp.study(**study_settings(small_llama, tmp_path, estimator="fisher", **where))

    def look(phase: str, done: int, total: int) -> None:
        if phase == "measure" and done and len(spares) == 2:
            cluster.remove_node(spares.pop())

    study.told = look
    study.run()
    cluster.remove_node(spares.pop())
    assert not spares
    assert study.store.study("small").state == "complete"
    assert study.plans[0].plan.to_json() == alone.plans[0].plan.to_json()
    assert study.scores.value.tobytes() == alone.scores.value.tobytes()
    key = [(m.label, m.plan, m.loss, m.spread) for m in study.measurements]
    assert key == [(m.label, m.plan, m.loss, m.spread) for m in alone.measurements]


def test_an_address_with_a_password_is_not_given_to_a_job(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        f'name = "s"\nmodel = "bundled:tiny-llama"\nstorage = "{database}"\n'
        'calibration = "stdlib:calibration"\nvalidation = "stdlib:validation"\nbudgets = ["weights <= 4 bits"]\n'
    )
    assert run(["submit", str(file), "--ray", "http://127.0.0.1:1"]) == 8
    told = capsys.readouterr().err
    assert "E622" in told
    assert ".pgpass" in told
    assert PASSWORD not in told
    with registry.make("stores", "sql", url=database) as store:
        assert store.studies() == []
    with pytest.raises(MpsearchError) as caught:
        submit_job("http://127.0.0.1:1", "s", database, 1, None, None)
    assert caught.value.code == "E622"
    check_shown("s", without_password(database))
