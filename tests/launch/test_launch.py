"""The launchers: SLURM on a real cluster of one node, manifests against their schemas, tpu_vm.sh with a fake gcloud."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import with_devices

from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.model import sharding

ROOT = Path(__file__).parents[2]


RESTARTED = sorted(code for code in ExitCode if code.restarts)
GIVEN_UP = sorted(code for code in ExitCode if code and not code.restarts)


def test_docs_have_the_table_of_exit_codes():
    text = (ROOT / "docs/pods.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (yes|no) \|$", text, re.MULTILINE)
    assert rows == [(str(int(code)), code.when, "yes" if code.restarts else "no") for code in ExitCode]


@pytest.mark.parametrize("crash_loop, crashes", [(-1, True), (600, False)])
def test_slurm_requeues_by_the_table(tmp_path, crash_loop, crashes):
    """The script with commands in the place of SLURM's. A crash is requeued later than CRASH_LOOP after the start."""
    (tmp_path / "srun").write_text("#!/bin/bash\nexit $CODE\n")
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho again\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    for code in (*ExitCode, 137, 139):
        env = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CODE": f"{code}",
            "CRASH_LOOP": f"{crash_loop}",
        }
        env |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node"}
        done = subprocess.run(
            ["bash", ROOT / "launch/slurm.sbatch"], env=env, capture_output=True, text=True, timeout=60
        )
        at_once = code in (ExitCode.STORAGE, ExitCode.STOPPED)
        crashed = code in (ExitCode.LOST, 137, 139)
        assert done.returncode == code and ("again" in done.stdout) == (at_once or (crashed and crashes)), code


@pytest.mark.slow
def test_slurm_restarts_runs_unless_the_error_is_the_users(data_path, tmp_path):
    if not (shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin") and os.geteuid() == 0):
        pytest.skip("needs Debian's packages slurm-wlm and munge, and root")
    env = with_devices(1) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "tests/launch/slurm.sh", data_path, tmp_path], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclasses.dataclass(frozen=True)
class Gpu:
    id: int
    process_index: int
    slice_index: int  # number of its node, as JAX calls it
    platform: str = "gpu"
    device_kind: str = "GPU"


@pytest.mark.parametrize(
    "sizes, nodes",
    [
        ((1, -1, 1), [[[0]] * 4 + [[1]] * 4]),
        ((2, -1, 1), [[[0]] * 4, [[1]] * 4]),
        ((4, -1, 1), [[[0]] * 2, [[0]] * 2, [[1]] * 2, [[1]] * 2]),
        ((1, -1, 4), [[[0] * 4, [1] * 4]]),
    ],
)
def test_nodes_lie_along_the_first_axes(sizes, nodes):
    """Two nodes of four GPUs with one process a GPU, which jax.make_mesh would refuse."""
    gpus = [Gpu(i, i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(*sizes), gpus)
    assert [[[gpu.slice_index for gpu in row] for row in plane] for plane in mesh.devices.tolist()] == nodes


JOBSETS = pytest.mark.parametrize("name", ["jobset-tpu.yaml", "jobset-gpu.yaml"])


def jobset(name: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "launch" / name).read_text())


def job_of(tree: dict) -> tuple[dict, dict, dict]:
    """(replicated job, its Job's spec, its container)"""
    (replicated,) = tree["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return replicated, job, container


def check(model, tree) -> None:
    """Raises if a manifest has a field that the API does not have, or a value of another type."""

    def same(given, kept, where):
        if isinstance(given, dict):
            assert set(given) <= set(kept), f"{where}: no such field: {set(given) - set(kept)}"
            for key, value in given.items():
                same(value, kept[key], f"{where}.{key}")
        elif isinstance(given, list):
            for i, (a, b) in enumerate(zip(given, kept, strict=True)):
                same(a, b, f"{where}[{i}]")

    same(tree, model.from_dict(tree).to_dict(), "JobSet")


@JOBSETS
def test_jobset_has_only_fields_of_the_api(name):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the package kubeflow_trainer_api")
    tree = jobset(name)
    check(models.JobsetV1alpha2JobSet, tree)
    # `check` finds misspelt fields.
    for old, new in (("backoffLimit", "backofLimit"), ("maxRestarts", "maxRestart"), ("nodeSelector", "nodeSelectors")):
        text = json.dumps(tree)
        if old in text:
            with pytest.raises(AssertionError, match=f"no such field: {{'{new}'}}"):
                check(models.JobsetV1alpha2JobSet, json.loads(text.replace(old, new)))


@JOBSETS
def test_jobset_restarts_unless_the_error_is_the_users(name):
    tree = jobset(name)
    (rule,) = tree["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    _, job, container = job_of(tree)
    evicted, user_error = job["podFailurePolicy"]["rules"]
    assert evicted["action"] == "Count" and user_error["action"] == "FailJob"
    given_up = {"containerName": container["name"], "operator": "In", "values": GIVEN_UP}
    assert user_error["onExitCodes"] == given_up
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0


@JOBSETS
def test_numbers_of_pods_devices_and_the_mesh_agree(name):
    tree = jobset(name)
    replicated, job, container = job_of(tree)
    assert job["parallelism"] == job["completions"]
    arguments = container["command"][3:] + container["args"]
    flags = dict(re.match("--([^=]*)=?(.*)", argument).groups() for argument in arguments)
    assert "multihost" in flags
    if "gpu" in name:
        assert replicated["replicas"] == 1
        first_pod = f"{tree['metadata']['name']}-{replicated['name']}-0-0.{tree['metadata']['name']}"
        assert flags["coordinator"].startswith(first_pod + ":") and flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
        assert flags["num_processes"] == flags["config.mesh.data"] == str(job["parallelism"])
    else:
        topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        chips = math.prod(int(size) for size in topology.split("x"))
        assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
        assert flags["config.mesh.data"] == str(replicated["replicas"])


def test_skypilot_accepts_its_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky", reason="needs the package skypilot, too large to be a test's requirement")
    task = sky.Task.from_yaml(str(ROOT / "launch/skypilot.yaml"))
    (resources,) = task.resources
    assert resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == RESTARTED
    text = (ROOT / "launch/skypilot.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("num_nodes:", "num_node:"))
    with pytest.raises(ValueError, match="num_node"):
        sky.Task.from_yaml(str(tmp_path / "wrong.yaml"))


GCLOUD = """#!/bin/bash
# Logs its arguments, and answers with the next state of a request, or the next exit code of a training.
echo "$*" >> "$FAKE/calls"
next() { head -n 1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
case "$*" in
    *" describe "*)
        state=$(next states)
        if [ "$state" = NONE ]; then echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi
        if [ "$state" = TROUBLE ]; then echo "ERROR: the network is unreachable" >&2; exit 1; fi
        echo "$state" ;;
    *memoryllm_jax.train*) exit "$(next codes)" ;;
esac
"""


@pytest.mark.parametrize(
    "states, codes, code, calls",
    [
        ("NONE CREATING ACTIVE", "0", 0, "create install train"),
        ("ACTIVE SUSPENDING SUSPENDED NONE ACTIVE", "255 0", 0, "install train delete create install train"),
        ("ACTIVE ACTIVE ACTIVE", "143 75 0", 0, "install train install train install train"),
        ("TROUBLE ACTIVE", "0", 0, "install train"),
        *[("ACTIVE ACTIVE", f"{code}", code, "install train") for code in GIVEN_UP],
        ("ACTIVE SUSPENDED ACTIVE", "1 0", 0, "install train install train"),
        ("ACTIVE ACTIVE", "134", 134, "install train"),
    ],
)
def test_tpu_vm_goes_on_after_preemption(tmp_path, states, codes, code, calls):
    """Tests the commands alone, with a gcloud that does nothing; what they do on the cloud is not tested."""
    for name, text in (("gcloud", GCLOUD), ("states", states), ("codes", codes)):
        (tmp_path / name).write_text(text if name == "gcloud" else text.replace(" ", "\n") + "\n")
    (tmp_path / "gcloud").chmod(0o755)
    env = os.environ | {"FAKE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL": "0"}
    env |= {"ZONE": "z", "ACCELERATOR": "v5p-128", "SLICES": "2"}
    command = [ROOT / "launch/tpu_vm.sh", "run", "--config=configs/1b.py:flex-3", "--workdir=gs://b/a run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    every = "--node=all --worker=all --batch-size=all"
    start = "gcloud compute tpus queued-resources"
    train = r"--config=configs/1b.py:flex-3 --workdir=gs://b/a\ run --multihost"
    texts = {
        f"{start} create run --node-count=2 --node-prefix=run --accelerator-type=v5p-128 "
        "--runtime-version=v2-alpha-tpuv5 --spot --zone=z": "create",
        f"{start} delete run --force --quiet --zone=z": "delete",
        f"{start} ssh run {every} --command=cd memoryllm && flock run.lock .venv/bin/python -m memoryllm_jax.train "
        f"{train} --zone=z": "train",
    }
    lines = ["gcloud " + line for line in (tmp_path / "calls").read_text().splitlines()]
    found = [texts.get(line) or ("install" if f"run:memoryllm.tar.gz {every}" in line else None) for line in lines]
    assert [name for name in found if name] == calls.split()
