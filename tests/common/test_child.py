"""A child process ends with its parent, and has time to save."""

import os
import signal
import subprocess
import sys
import time

import pytest

# Stands for `train`: says that it runs, and on SIGTERM saves before it ends.
CHILD = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.1)
    open("saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
with open("pid.part", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid.part", "pid")
time.sleep(60)
"""
PARENT = """
import sys
from memoryllm_jax.common import child
with child.Children() as children:
    children.start([sys.executable, "child.py"])
    sys.exit(children.wait()[1])
"""


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for 30 seconds")


def is_running(pid):
    try:
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a process that has ended, but which no parent has waited for


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nothing tells a process that its parent was killed")
@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_child_saves_and_ends_when_its_parent_is_stopped_or_killed(tmp_path, number, code):
    (tmp_path / "child.py").write_text(CHILD)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=env)
    wait_until((tmp_path / "pid").exists)
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(number)
    assert parent.wait(60) == code
    wait_until(lambda: not is_running(child))
    assert (tmp_path / "saved").exists()
