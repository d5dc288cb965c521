"""Timing kernels on a node of a real Ray cluster that has a named resource."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from mpsearch.cli.main import run
from mpsearch.errors import InputError
from mpsearch.executors.ray import run_on
from mpsearch.hardware.profile import Profile


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine; the second one is the phone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
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
