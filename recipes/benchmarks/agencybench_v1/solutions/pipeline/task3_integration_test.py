"""Subtask 3: all events get done, though a worker crashes and the orchestrator is killed."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from running import running, wait

HERE = Path(__file__).resolve().parent


def main():
    if not (HERE / "data/events.jsonl").exists():
        subprocess.run([sys.executable, HERE / "task1_generator.py"], check=True)
    folder = HERE / "kv/state"
    shutil.rmtree(folder, ignore_errors=True)
    with running(folder, workers=1) as call:
        while not any(task["state"] == "done" for task in call("STATUS")["tasks"].values()):
            time.sleep(0.01)
    # running() has killed both; the second start finds the store as it was
    with running(folder, crash_at=2) as call:
        tasks, _ = wait(call)
    assert len(tasks) == len((HERE / "data/events.jsonl").read_text().splitlines())
    assert all(task["state"] == "done" for task in tasks.values()), tasks
    print(f"{len(tasks)} tasks in {folder} have status done; logs in {HERE / 'logs'}")


if __name__ == "__main__":
    main()
