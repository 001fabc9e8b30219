"""An orchestrator and its workers as processes, for the integration tests, the planner and the repair."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

from task3_orchestrator import Caller

HERE = Path(__file__).resolve().parent
ENDED = ("done", "failed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *flags):
    return subprocess.Popen([sys.executable, HERE / script, *map(str, flags)], cwd=HERE)


@contextlib.contextmanager
def running(folder, *flags, workers=3, crash_at=0):
    """The caller of an orchestrator on the folder's store; the first worker may crash."""
    port = free_port()
    processes = [start("task3_orchestrator.py", "--port", port, "--folder", folder, *flags)]
    try:
        call = Caller(port)
        for number in range(workers):
            crash = ("--crash-at", crash_at) if number == 0 and crash_at else ()
            processes.append(start("task3_worker.py", "--id", number + 1, "--port", port, *crash))
        call.orchestrator = processes[0]
        yield call
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait(call, names=None, seconds=30):
    """(tasks, facts) once the named tasks, or all, ended; TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = call("STATUS")
        tasks = status["tasks"]
        states = [tasks[name]["state"] for name in names or tasks]
        if states and (all(state in ENDED for state in states) or "failed" in states):
            return tasks, status["facts"]
        time.sleep(0.05)
    raise TimeoutError(f"tasks did not end in {seconds} s")
