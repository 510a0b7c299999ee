"""A Ray cluster of two nodes on this machine: a node and the command itself are killed."""

import contextlib
import json
import time

import psutil
import pytest

pytest.importorskip("ray", reason="needs the package ray")

from gralora_diffusion.benchmark.command import main
from gralora_diffusion.benchmark.ledger import FAILURE_NAME
from gralora_diffusion.benchmark.main import benchmark
from gralora_diffusion.benchmark.ray_tasks import run_task
from tests.benchmark import runs
from tests.benchmark.test_main import result_files, scores, until

SMALL = {"object_store_memory": 80 << 20}
OPTIONS = {
    "methods": ["lora-r4-lr1e30", "lora-r4"],
    "protocols": ["subject", "drift"],
    "seeds": [0, 1, 2],
    "max_train_steps": 2,
    "images_per_prompt": 1,
    "max_prompts": 2,
}


@pytest.fixture
def cluster(monkeypatch):
    """Its head runs nothing, and its two nodes a trial each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # the default gives way to other tests
    head = {"num_cpus": 0, "include_dashboard": False, **SMALL}
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("this machine is too busy: a Ray node did not start within Ray's 30 seconds")
    yield cluster
    cluster.shutdown()


def at_work(node):
    """Return the processes of a node that run a trial; Ray names a process by what it runs."""
    (raylet,) = node.all_processes["raylet"]
    title = f"ray::{run_task.__name__}"
    found = []
    for process in psutil.Process(raylet.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] == [title]:
                found.append(process)
    return found


def kill_at_work(cluster, node):
    """Kill a node that runs a trial and cannot finish it."""
    while not (stopped := at_work(node)):
        time.sleep(0.01)
    for process in stopped:
        process.suspend()
    cluster.remove_node(node, allow_graceful=False)
    for process in stopped:  # it would wait for its node for ever
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_node_and_command_are_killed_and_a_trial_always_fails(world, tmp_path, cluster, capsys):
    """A node is killed, then the command, which is started again on the other node."""
    output, address = tmp_path / "run", cluster.address
    killed = runs.start(world, output, ray=address, **OPTIONS)
    until(lambda: result_files(output) and at_work(cluster.nodes[0]), killed)
    kill_at_work(cluster, cluster.nodes[0])
    until(lambda: "It is run again" in killed.said, killed)  # Ray may take a while to notice
    before = len(result_files(output))
    until(lambda: len(result_files(output)) > before, killed)
    killed.process.kill()
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in result_files(output)}
    assert 1 < len(done) < 6
    with pytest.raises(SystemExit) as caught:
        main(runs.arguments(world, output, ray=address, **OPTIONS))
    assert caught.value.code == 1
    assert "failed trials: 6" in capsys.readouterr().err
    failures = [json.loads(path.read_text()) for path in output.rglob(FAILURE_NAME)]
    assert ["TrainingDiverged: step 2" in failure["error"] for failure in failures] == [True] * 6
    assert all("raise TrainingDiverged" in failure["traceback"] for failure in failures)
    found = scores(output)
    assert sorted(found) == [
        ("subject", subject, "lora-r4", seed) for subject in ("cat2", "dog") for seed in range(3)
    ]
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing twice
    assert not list(output.rglob(".work*"))
    assert "lora-r4" in (output / "report" / "report.md").read_text()

    one = {**OPTIONS, "methods": ["lora-r4"], "subjects": ["dog"], "seeds": [1]}
    assert benchmark(runs.settings(world, tmp_path / "here", **one)) == 0
    ((key, values),) = scores(tmp_path / "here").items()
    assert found[key] == values
