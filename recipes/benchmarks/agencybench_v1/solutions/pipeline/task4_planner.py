"""Subtask 4: a planner. A* over sets of facts; the orchestrator runs the plan as a graph of tasks.

--patch FILE changes operators before planning: {"operators": {name: {field: value}}}.
"""

import argparse
import heapq
import itertools
import json
import shutil
import time
from pathlib import Path

from running import running, wait

HERE = Path(__file__).resolve().parent
DOMAIN = HERE / "domain/example.json"
GOAL = HERE / "domain/goal.json"


def read_domain(path, patch=None):
    domain = json.loads(path.read_text())
    changes = json.loads(patch.read_text())["operators"] if patch else {}
    for operator in domain["operators"]:
        operator.update(changes.get(operator["name"], {}))
    return domain


def find_plan(domain, goal):
    """([operator] of the least cost or None, nodes searched)."""
    operators = domain["operators"]
    widest = max(len(operator["add"]) for operator in operators)
    cheapest = min(operator["cost"] for operator in operators)

    def estimate(facts):  # never too high: no step reaches more facts, or costs less
        return cheapest * -(-len(goal - facts) // widest)

    first = frozenset(domain["initial"])
    order = itertools.count()
    queue = [(estimate(first), next(order), 0, first, [])]
    best = {first: 0}
    nodes = 0
    while queue:
        _, _, cost, facts, plan = heapq.heappop(queue)
        if cost > best[facts]:
            continue
        nodes += 1
        if goal <= facts:
            return plan, nodes
        for operator in operators:
            if set(operator["pre"]) <= facts:
                reached = facts - set(operator.get("del", [])) | set(operator["add"])
                total = cost + operator["cost"]
                if total < best.get(reached, float("inf")):
                    best[reached] = total
                    entry = (total + estimate(reached), next(order))
                    heapq.heappush(queue, (*entry, total, reached, [*plan, operator]))
    return None, nodes


def depends(later, earlier):
    """Must the one wait? It needs what the other makes or removes, or removes what that needs."""
    made = set(earlier["add"])
    removed = set(earlier.get("del", []))
    removes = set(later.get("del", []))
    needs = set(later["pre"]) & (made | removed)
    takes = removes & (made | set(earlier["pre"]))
    return bool(needs or takes or removed & set(later["add"]))


def as_tasks(plan):
    """{name: task}: those that do not wait for each other run at the same time."""
    tasks = {}
    for number, operator in enumerate(plan):
        after = [f"step{n + 1}" for n in range(number) if depends(operator, plan[n])]
        tasks[f"step{number + 1}"] = {"operator": operator, "after": after}
    return tasks


def run(domain, goal, folder):
    """The report; raises TimeoutError where the orchestrator does not end."""
    started = time.monotonic()
    plan, nodes = find_plan(domain, goal)
    report = {"plan_found": plan is not None, "search_nodes": nodes, "plan_length": len(plan or [])}
    report["planning_seconds"] = round(time.monotonic() - started, 4)
    if not plan:
        return report | {"success_rate": 0.0, "goal_reached": plan is not None}
    tasks = as_tasks(plan)
    started = time.monotonic()
    with running(folder, "--no-events") as call:
        start = {"name": "start", "add": domain["initial"]}
        call("SUBMIT", tasks={"start": {"operator": start}})
        wait(call, ["start"])
        call("SUBMIT", tasks=tasks)
        ended, facts = wait(call, list(tasks))
    states = {name: ended[name]["state"] for name in tasks}
    report["plan"] = {name: task | {"state": states[name]} for name, task in tasks.items()}
    report["success_rate"] = list(states.values()).count("done") / len(states)
    report["scheduling_seconds"] = round(time.monotonic() - started, 3)
    return report | {"goal_reached": goal <= set(facts), "facts": facts}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", type=Path, default=DOMAIN)
    parser.add_argument("--goal", type=Path, default=GOAL)
    parser.add_argument("--patch", type=Path)
    options = parser.parse_args()
    folder = HERE / "kv/planner"
    shutil.rmtree(folder, ignore_errors=True)
    goal = set(json.loads(options.goal.read_text())["goal"])
    report = run(read_domain(options.domain, options.patch), goal, folder)
    (HERE / "reports").mkdir(exist_ok=True)
    (HERE / "reports/planner_report.json").write_text(json.dumps(report, indent=1) + "\n")
    for key in ("plan_length", "search_nodes", "success_rate", "goal_reached"):
        print(f"{key}: {report[key]}")
    return 0 if report["goal_reached"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
