"""Subtask 3: a worker; gets tasks, does them, reports. --crash-at N: it dies with its Nth task in hand."""

import argparse
import hashlib
import json
import logging
import os
import time
from pathlib import Path

from task3_orchestrator import Caller

HERE = Path(__file__).resolve().parent


def execute(task):
    """The result of a task; {"error"} where its operator takes longer than it may."""
    if "event" in task:
        text = json.dumps(task["event"]["payload"], sort_keys=True)
        return {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    operator = task["operator"]
    needed = operator.get("seconds", 0)
    time.sleep(min(needed, operator.get("timeout", 1)))
    if needed > operator.get("timeout", 1):
        return {"error": f"timeout after {operator['timeout']} s"}
    return {"applied": operator["name"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--id", required=True)
    parser.add_argument("--port", type=int, default=7310)
    parser.add_argument("--crash-at", type=int, default=0)
    options = parser.parse_args()
    (HERE / "logs").mkdir(exist_ok=True)
    place = HERE / f"logs/worker-{options.id}.log"
    logging.basicConfig(filename=place, level=logging.INFO, format="%(asctime)s %(message)s")
    call = Caller(options.port)
    done = 0
    try:
        while True:
            task = call("GET_TASK", worker=options.id)["task"]
            if not task:
                time.sleep(0.02)
                continue
            done += 1
            if done == options.crash_at:
                os._exit(1)
            result = execute(task)
            call("REPORT_RESULT", task_id=task["task_id"], result=result)
            logging.info("%s: %s", task["task_id"], result)
    except (ConnectionError, ValueError):
        logging.info("the orchestrator is gone")


if __name__ == "__main__":
    main()
