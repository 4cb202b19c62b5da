"""How many CPUs each Ray worker gets, on clusters of every shape."""

import json
import subprocess
import sys

import pytest

from autocompress.core.errors import UsageError
from autocompress.drivers.ray_placement import place_workers


def nodes(*resources):
    """Nodes ``n0``, ``n1``, … of (CPUs, GPUs)."""
    found = {}
    for i, (cpus, gpus) in enumerate(resources):
        found[f"n{i}"] = {"CPU": float(cpus), "GPU": float(gpus), "memory": 1e9}
    return found


def place(cluster, workers, gpus=0.0, here="n0", may_grow=True):
    return place_workers(cluster, workers=workers, gpus=gpus, here=here, may_grow=may_grow)


@pytest.mark.parametrize(
    ("resources", "workers", "gpus", "cpus"),
    [
        ([(8, 0)], 1, 0, 8),
        ([(8, 0)], 3, 0, 2),
        ([(8, 0), (8, 0)], 2, 0, 8),
        ([(4, 0)] * 4, 2, 0, 4),  # 16 CPUs, but no node has 8
        ([(4, 0)] * 4, 5, 0, 2),
        ([(16, 0), (4, 0)], 3, 0, 5),
        ([(16, 0), (4, 0)], 5, 0, 4),
        ([(2, 0)], 4, 0, 1),  # two of them wait
        ([(0, 0), (8, 0), (8, 0)], 4, 0, 4),  # a head node without CPUs
        ([(8, 1), (64, 0)], 1, 1, 8),  # CPUs without a GPU are of no use
        ([(8, 1), (64, 0)], 2, 1, 8),  # the second one waits for a node with a GPU
        ([(8, 2), (8, 2)], 4, 1, 4),
        ([(8, 4), (8, 4)], 2, 4, 8),
        ([(12, 1)], 4, 0.25, 3),
        ([(12, 2)], 4, 0.4, 3),  # two on each GPU: none has parts of both
        ([(12, 2)], 5, 0.4, 3),
        ([(10, 1)], 10, 0.1, 1),
    ],
)
def test_a_worker_has_the_most_cpus_with_which_all_run(resources, workers, gpus, cpus):
    assert place(nodes(*resources), workers, gpus).cpus == cpus


def test_a_resource_that_a_node_does_not_name_is_none():
    assert place({"n0": {"memory": 1e9}, "n1": {"CPU": 3.0}}, 1).cpus == 3


@pytest.mark.parametrize(
    ("resources", "gpus", "message"),
    [
        ([(8, 1), (8, 0)], 2, r"2 GPUs.*most GPUs on a node: 1\).*lower --gpus-per-worker"),
        ([(0, 0)], 0, r"1 CPU, but none of the 1 nodes.*ray start"),
        ([(0, 1), (8, 0)], 1, r"1 CPU beside its 1 GPUs, but none of the 2 nodes.*--num-cpus"),
        ([], 0, "none of the 0 nodes"),
        ([(8, 4)], 1.5, "fraction of one GPU or whole ones.*give 1 or 2"),
    ],
)
def test_a_refusal_names_what_is_missing(resources, gpus, message):
    with pytest.raises(UsageError, match=message):
        place(nodes(*resources), 2, gpus)


@pytest.mark.parametrize(("workers", "may_grow"), [(2, True), (2, False), (9, False)])
def test_workers_stay_with_the_driver_if_its_node_is_alone_and_enough(workers, may_grow):
    assert place(nodes((8, 0)), workers, may_grow=may_grow).node == "n0"


@pytest.mark.parametrize(
    ("resources", "workers", "here"),
    [
        ([(8, 0), (8, 0)], 2, "n0"),  # another node
        ([(8, 0)], 9, "n0"),  # nodes may join for those that wait
        ([(8, 0)], 2, "elsewhere"),
        ([(8, 0)], 2, None),
    ],
)
def test_workers_that_may_run_elsewhere_are_not_kept(resources, workers, here):
    assert place(nodes(*resources), workers, here=here).node is None


SCRIPT = """
import json, sys
from contextlib import closing
from pathlib import Path
from autocompress.drivers.ray import RayDriver, ray
from autocompress.testing.driver_contract import scripted, scripted_context
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
for cpus in map(int, sys.argv[2:]):
    cluster.add_node(num_cpus=cpus)
asked = []
context = scripted_context(Path(sys.argv[1]))
type(context.bank).with_resident_statistics = lambda bank: asked.append(bank) or bank
with closing(RayDriver(context, workers=2, address=cluster.address)) as driver:
    done = list(driver.run(scripted(i, "rtn(bits=4,group_size=16)") for i in range(4)))
    reserved = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
print(json.dumps([reserved, len(asked), [r.is_complete for r in done]]))
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(360)
@pytest.mark.parametrize(("others", "reserved", "n_packed"), [((), 2, 0), ((4,), 6, 1)])
def test_trials_run_on_a_cluster_of_one_and_of_two_nodes(tmp_path, others, reserved, n_packed):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *map(str, others)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [reserved, n_packed, [True] * 4]
