"""Subtask 4: the example's plan is the cheapest, runs in parallel where it may, and reaches the goal."""

import json
from pathlib import Path

import task4_planner

HERE = Path(__file__).resolve().parent
WAITS = {
    "saw legs": 0,
    "saw top": 0,
    "mix paint": 0,
    "glue table": 2,
    "paint table": 2,
}


def main():
    domain = task4_planner.read_domain(HERE / "domain/example.json")
    plan, _ = task4_planner.find_plan(domain, {"painted table"})
    assert sum(operator["cost"] for operator in plan) == 9
    nothing, _ = task4_planner.find_plan(domain, {"a boat"})
    assert nothing is None
    assert task4_planner.main() == 0
    report = json.loads((HERE / "reports/planner_report.json").read_text())
    waits = {}
    for task in report["plan"].values():
        waits[task["operator"]["name"]] = len(task["after"])
    assert waits == WAITS, waits
    assert report["goal_reached"] and report["success_rate"] == 1
    print("the plan was found, run by the orchestrator, and reported")


if __name__ == "__main__":
    main()
