#!/usr/bin/env python3
"""AgencyBench v1 (10 tasks, 49 subtasks) -> a task file for 04_eval.py; subtasks become turns.

    git clone https://github.com/GAIR-NLP/AgencyBench    # at ec65324
    python recipes/benchmarks/agencybench_v1.py AgencyBench --judge --network
    python 04_eval.py --config recipes/benchmarks/agencybench_v1.yaml --model outputs/limi

Its authors released questions and workspaces, no grader. A turn has a check only where a program decides all
that it asks for (agencybench_v1/grading.yaml says which). Every other turn has a rubric, from its own words,
for a judge; without --judge such turns are left out, and their text stands before the next turn's. Never
train on any of this.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

from agencybench_v1_turns import GRADING, HERE, make_turns


def find_tasks(clone: Path) -> dict[int, Path]:
    """The file of each task. Raises ValueError where one is missing, or is not that of the pinned commit."""
    files = {int(path.parent.name[4:]): path for path in clone.rglob("task*/Task*.json")}
    if sorted(files) != list(range(1, 11)):
        raise ValueError(f"{clone}: not a clone of GAIR-NLP/AgencyBench, whose version 1 has task1 to task10")
    missing = []
    for line in (HERE / "BLOBS").read_text().splitlines():
        digest, name = line.split("  ")
        file = files[1].parents[1] / name
        if not file.exists():
            missing.append(file)
        elif blob(file) != digest:
            raise ValueError(f"{file}: is not the file of commit ec65324; check it out again")
    named = set().union(*GRADING["needs"].values())  # what a task is left out without
    for file in missing:
        if f"file:{file.name}" not in named and any(file.parent.glob("*")):
            raise ValueError(f"{file}: is missing; check out commit ec65324 again")
    return dict(sorted(files.items()))


def blob(file):
    """The file's name in git."""
    data = file.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def is_missing(need, workspace, options):
    """Does this machine lack a need of grading.yaml?"""
    kind, _, name = need.rpartition(":")
    if kind == "file":
        return not (workspace / name).exists()
    if kind == "package":
        return not list(options.venv.glob(f"lib/python*/site-packages/{name}"))
    return not options.network if need == "network" else not shutil.which(need)


def make_task(number, path, options):
    """(the task, [what this machine lacks for the whole of it])."""
    turns, letters = make_turns(number, path, options.judge)
    needs = GRADING["needs"].get(number, [])
    workspace = path.with_name("workspace")
    task = {"query_id": f"agencybench-v1-{number}", "source": "agencybench-v1", "private": "private"}
    task["domain"] = "vibe_coding" if number < 5 else "research"
    task["turns"] = turns
    task["needs"] = [need for need in needs if ":" not in need]
    task["meta"] = {"graded_by": letters}
    if any(need.startswith("package:") for need in needs):
        task["venv"] = str(options.venv.absolute())
    if workspace.exists():
        task["workspace"] = f"workspaces/{number}"
        seen_at = options.output_dir / task["workspace"] / "workspace"
        for target in (seen_at, options.output_dir / "private" / f"task{number}"):
            shutil.copytree(workspace, target, dirs_exist_ok=True)
    lacks = [need for need in needs if is_missing(need, workspace, options)]
    return task, lacks


def convert(options):
    """Write the task file; returns lines to print: what runs here and what the rest needs, then a table."""
    files = find_tasks(options.clone)
    shutil.copytree(HERE, options.output_dir / "private", dirs_exist_ok=True)
    tasks = []
    running = []
    needed = []
    table = []
    for number, path in files.items():
        task, lacks = make_task(number, path, options)
        letters = task["meta"]["graded_by"]
        table.append(f"task {number:2}: {letters}")
        if task["turns"] and not any(":" in need for need in lacks):
            tasks.append(task)
        if task["turns"] and not lacks:
            running.append(task)
        if "-" in letters:
            lacks.append("--judge")
        if lacks:
            needed.append(f"; task {number} needs {', '.join(lacks)}")
    file = options.output_dir / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    counts = f"{len(running)} of 10 tasks and {count_turns(running)} of 49 turns"
    head = f"AgencyBench v1: this machine can run {counts}{''.join(needed)}"
    tail = f"{file}: {len(tasks)} tasks with {count_turns(tasks)} turns; never the paper's number for a part"
    return [head, "turns graded by a program (P), a judge (J), nobody and left out (-):", *table, tail]


def count_turns(tasks):
    return sum(len(task["turns"]) for task in tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("clone", type=Path, help="A clone of GAIR-NLP/AgencyBench.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/agencybench_v1"))
    parser.add_argument("--judge", action="store_true", help="04 will have one (--feedback judge).")
    parser.add_argument("--network", action="store_true", help="04 will have it (--network).")
    venv = "Python environment of tasks 6 and 8 (default: this one)."
    parser.add_argument("--venv", type=Path, default=Path(sys.prefix), help=venv)
    try:
        print("\n".join(convert(parser.parse_args())))
    except (ValueError, OSError) as error:
        print(f"agencybench_v1.py: {error}", file=sys.stderr)
        sys.exit(2)
