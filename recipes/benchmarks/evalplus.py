"""EvalPlus as tasks: HumanEval+ (164) or MBPP+ (378), graded by the functions of the package evalplus.

    python3.11 -m venv venvs/evalplus
    venvs/evalplus/bin/pip install evalplus==0.3.1 numpy==2.4.6 tree-sitter==0.26.1 tree-sitter-python==0.25.0
    python recipes/benchmarks/evalplus.py HumanEvalPlus.jsonl.gz --venv venvs/evalplus --output data/humaneval
    python 04_eval.py --tasks data/humaneval/tasks.jsonl --rounds 1 --temperature 0 --model ...

SR@1 is pass@1. The data: github.com/evalplus, humanevalplus_release v0.1.10 (in git: commit 200defce; what
is tagged v0.1.10 there is the data of v0.1.9) and mbppplus_release v0.2.0. With tools the agent writes
solution.py, graded as it stands; without, the prompt is the authors' and the answer goes through their
sanitize(). The verdicts are those of evalplus.evaluate, and as theirs they hang on its limits of time: on a
machine that does more than it has cores for, right answers fail. HumanEval/32 fails whatever the answer:
evalplus 0.3.1 never counts its tests as passed.
"""

import gzip
import json
import os
import sys
from types import SimpleNamespace

import common

RELEASES = {
    "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101": ("HumanEval+", 164),
    "af43697e8791c4c149bdfd6b489d8b5412507551ac20e28a439f650b8225db63": ("MBPP+", 378),
}
PROMPT = "Please provide a self-contained Python script that solves the following problem in {}:\n"
PLACES = {"answer": "a markdown code block", "file": "the file /workspace/solution.py"}
UNSOLVABLE = "HumanEval/32"  # evaluate: `continue` without progress.value += 1
OVERRIDES = ("HUMANEVAL_OVERRIDE_PATH", "MBPP_OVERRIDE_PATH")


def convert():
    found = common.options(__doc__, "data")
    name, count = common.pinned(found.data, RELEASES)
    common.installed(found.venv, "evalplus==0.3.1")
    tasks = []
    for line in gzip.open(found.data):
        problem = json.loads(line)
        prompt = PROMPT.format(PLACES[found.place]) + f"```python\n{problem['prompt'].strip()}\n```"
        check = f"{found.check} {problem['task_id']} {found.place}"
        turn = {"query": prompt, "check": check, "solution": check + " solve"}
        query_id = problem["task_id"].replace("/", "-")
        tasks.append({"query_id": query_id, "domain": "vibe_coding", "source": name, "turns": [turn]})
    common.write(found, tasks, count, {found.data: "problems.jsonl.gz"})


def load(task_id):
    """("humaneval" or "mbpp", problem, a program that solves it), by the authors' loaders."""
    os.environ |= dict.fromkeys(OVERRIDES, "/private/problems.jsonl.gz") | {"XDG_CACHE_HOME": "/tmp"}
    # Two thirds of the import's time are for EvalPerf's download alone
    sys.modules["datasets"] = SimpleNamespace(load_dataset=None)
    from evalplus.data import get_human_eval_plus, get_mbpp_plus

    dataset = "humaneval" if task_id.startswith("HumanEval") else "mbpp"
    problem = (get_human_eval_plus() if dataset == "humaneval" else get_mbpp_plus())[task_id]
    return dataset, problem, problem["prompt"] + problem["canonical_solution"]


def solve(task_id, place):
    common.hand_in(place, "solution.py", load(task_id)[2])


def check(task_id, place):
    """As evalplus.evaluate: an input has 1 s, or 4 times what the reference has just taken here."""
    dataset, problem, reference = load(task_id)
    from evalplus.evaluate import MBPP_OUTPUT_NOT_NONE_TASKS, check_correctness, get_groundtruth
    from evalplus.sanitize import sanitize

    code = common.submitted(place, "solution.py")
    if place == "answer":
        try:
            code = sanitize(code, problem["entry_point"])
        except (ValueError, RecursionError) as error:  # a sum that never ends: no reason for "not run"
            print(f"# sanitize() fails on the answer: {error}")
    not_none = MBPP_OUTPUT_NOT_NONE_TASKS if dataset == "mbpp" else []
    expected = get_groundtruth({task_id: problem}, task_id.replace("/", "-"), not_none)[task_id]
    common.confine()

    def grade(code):
        result = check_correctness(dataset, 0, problem, code, expected, fast_check=True)
        base, extra = result["base"][0], result["plus"][0]
        return base == extra == "pass", f"base tests: {base}, extra tests: {extra}"

    return common.verdict(grade, code, task_id != UNSOLVABLE and reference)


if __name__ == "__main__":
    convert()
