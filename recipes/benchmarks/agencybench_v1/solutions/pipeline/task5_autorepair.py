"""Subtask 5: where a run fails, goes back to the last snapshot, patches the domain, tries again.

--simulate-failure: an operator of the example takes longer than it may.
"""

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path

import task4_planner
from kv.store import Store

HERE = Path(__file__).resolve().parent
RETRIES = 3


def find_fault(report, data):
    """Why the run is not what it should be, and the operators that did it; None where all is well."""
    tasks = [task for name, task in data.items() if name.startswith("task/step")]
    failed = [task for task in tasks if task["state"] == "failed"]
    if failed:
        reason = "; ".join(task["result"]["error"] for task in failed)
        return {"reason": reason, "operators": [task["operator"] for task in failed]}
    if any(task["state"] == "running" for task in tasks):
        return {"reason": "inconsistent: a task runs that nobody works on", "operators": []}
    return None if report["goal_reached"] else {"reason": "the goal is not reached", "operators": []}


def make_patch(fault):
    """What planner and worker read: more time for what ran out of it; None where nothing is known to help."""
    changes = {}
    for operator in fault["operators"]:
        if operator.get("seconds", 0) > operator.get("timeout", 1):
            changes[operator["name"]] = {"timeout": 2 * operator["seconds"]}
    return {"reason": fault["reason"], "operators": changes} if changes else None


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def repair(domain_path, goal, folder):
    """The report: status repaired, healthy or unrecoverable, and what was done."""
    now = datetime.datetime.now(datetime.timezone.utc)
    done = {"timestamp": now.isoformat(timespec="seconds"), "attempts": []}
    patch = None
    for attempt in range(RETRIES):
        report = task4_planner.run(task4_planner.read_domain(domain_path, patch), goal, folder)
        store = Store(folder)
        fault = find_fault(report, store.data)
        done["attempts"].append({"patch": patch and patch.name, "goal_reached": report["goal_reached"]})
        if not fault:
            store.close()
            return done | {"status": "repaired" if attempt else "healthy"}
        done |= {"trigger": fault["reason"], "snapshot": store.snapshot_number}
        done["transactions_undone"] = store.rollback()
        store.close()
        changes = make_patch(fault)
        if not changes:
            break
        patch = HERE / f"patches/patch{attempt + 1}.json"
        write(patch, changes)
        done["patch"] = str(patch.relative_to(HERE))
    return done | {"status": "unrecoverable"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate-failure", action="store_true")
    simulate = parser.parse_args().simulate_failure
    domain_path = HERE / "domain/example.json"
    if simulate:
        domain = json.loads(domain_path.read_text())
        for operator in domain["operators"]:
            if operator["name"] == "glue table":
                operator |= {"seconds": 0.6, "timeout": 0.3}
        domain_path = HERE / "domain/failing.json"
        write(domain_path, domain)
    folder = HERE / "kv/repair"
    shutil.rmtree(folder, ignore_errors=True)
    store = Store(folder)
    store.snapshot()  # the consistent state to come back to
    store.close()
    goal = set(json.loads((HERE / "domain/goal.json").read_text())["goal"])
    report = repair(domain_path, goal, folder)
    write(HERE / "reports/repair_report.json", report)
    print(json.dumps(report))
    sys.exit(report["status"] == "unrecoverable")


if __name__ == "__main__":
    main()
