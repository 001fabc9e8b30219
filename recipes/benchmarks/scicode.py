"""SciCode as 65 tasks with a turn for each of its 288 steps (or the 15 and 50 of its validation split).

    python3.11 -m venv venvs/scicode
    venvs/scicode/bin/pip install datasets==3.6.0 pyarrow==20.0.0 h5py==3.15.1 numpy==1.26.4 scipy==1.13.1 \\
        sympy==1.14.0 matplotlib==3.9.4
    venvs/scicode/bin/python recipes/benchmarks/scicode.py SciCode problems_test.jsonl test_data.h5 \\
        --venv venvs/scicode --output data/scicode
    python 04_eval.py --tasks data/scicode/tasks.jsonl --rounds 1 --temperature 0 --check_seconds 2000 ...

SciCode is a clone of github.com/scicode-bench/SciCode at 588b4069; the problems are the Hub's
SciCode1/SciCode (in the clone: git show a7221968:eval/data/problems_all.jsonl); the targets, 1 GB, are on
the drive that its README names. MP is pass@1 (all steps of a problem, 1,800 s each), SP is "SR@1 over
turns". The authors paste the code of earlier steps into a new conversation; here they are earlier turns of
the same. Problems 13 and 62 cannot be solved: of the classes that steps 13.6 and 62.1 give, the authors'
get_function_from_code() keeps one method.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import DEVNULL

import common

RELEASES = {  # problems, steps, of them given
    "38797fef78f434720be6d053b4f3a86839d6f8ea5fb9115450677cd3a6edf81d": (65, 291, 3),
    "193968aff23b7ed931c8f6d196b611e2f6694adb49e6cc085444a60ad2fc4f7b": (15, 50, 0),
}
TARGETS = {"48b0272a88b17dbd29777c217e1b4fb2b019b92e11cc2add847409db9541b890": "test_data.h5"}
GIVEN = ("13.6", "62.1", "76.3")  # gencode.py:187
QUIET = {"stdout": DEVNULL, "stderr": DEVNULL, "preexec_fn": common.spare}
ABOVE = "[the code of this step is above, in this conversation]"
WRITE = "\n\nWrite this Python code, instead of responding with it, into the file /workspace/step_{}.py"


def convert():
    found = common.options(__doc__, "clone", "problems", "targets")
    count, steps, given = common.pinned(found.problems, RELEASES)
    common.pinned(found.targets, TARGETS)
    common.unchanged(found.clone, "588b4069d73d211434790bdf4f5a3b80c7830912", "src", "eval")
    common.installed(found.venv, "datasets==3.6.0", "h5py==3.15.1", "numpy==1.26.4", "scipy==1.13.1")
    problems = [json.loads(line) for line in found.problems.open()]
    tasks = [task(problem, found) for problem in problems]
    assert sum(len(task["turns"]) for task in tasks) == steps - given
    private = {found.problems: "problems.jsonl", found.targets: "test_data.h5"}
    for path in (*found.clone.glob("src/scicode/**/*.py"), *found.clone.glob("eval/data/*.txt")):
        private[path] = path.relative_to(found.clone)
    common.write(found, tasks, count, private)
    print("a step may take 1,800 s: 04_eval.py --check_seconds 2000")


def task(problem, found):
    template = (found.clone / "eval/data/background_comment_template.txt").read_text()
    earlier, turns = [], []
    for step in problem["sub_steps"]:
        name, about = step["step_number"], step["step_description_prompt"]
        if name in GIVEN:
            earlier += [about, given_code(found.clone, step), "------"]
            continue
        query = template.format(
            problem_steps_str="\n\n".join(earlier[:-1]),
            next_step_str=f"{about}\n\n{step['function_header']}\n\n{step['return_line']}",
            dependencies=problem["required_dependencies"],
        )
        check = f"{found.check} {name} {found.place}"
        turn = {"query": query if found.no_tools else query + WRITE.format(name), "check": check}
        turns.append(turn | ({"solution": check + " solve"} if step.get("ground_truth_code") else {}))
        earlier += [about, ABOVE, "------"]
    head = {"query_id": f"scicode-{problem['problem_id']}", "domain": "research", "source": "SciCode"}
    return head | {"turns": turns}


def official(clone):
    """scicode.parse.parse of the clone (this file has the package's name)."""
    sys.path.insert(0, str(Path(clone, "src")))
    return importlib.import_module("scicode.parse.parse")


def given_code(clone, step):
    parse = official(clone)
    text = Path(clone, "eval/data", step["step_number"] + ".txt").read_text()
    return parse.get_function_from_code(text, parse.extract_function_name(step["function_header"]))


def find(name):
    problems = map(json.loads, Path("/private/problems.jsonl").open())
    problem = next(problem for problem in problems if problem["problem_id"] == name.split(".")[0])
    return problem, problem["sub_steps"][: int(name.split(".")[1])]


def solve(name, place):
    common.hand_in(place, f"step_{name}.py", find(name)[1][-1]["ground_truth_code"])


def check(name, place):
    """As gencode.py and test_generated_code.py: the code of all steps so far, then the step's tests."""
    problem, steps = find(name)
    parse = official("/private")
    scope = {"re": re}
    models = Path("/private/src/scicode/gen/models.py").read_text()
    exec(parse.get_function_from_code(models, "extract_python_script"), scope)
    codes, turns = [], 0
    for step in steps:
        if step["step_number"] in GIVEN:
            codes.append(given_code("/private", step))
            continue
        turns += 1
        text = common.submitted(place, f"step_{step['step_number']}.py", f"/answers/{turns}.md")
        codes.append(scope["extract_python_script"](text))
    tests = steps[-1]["test_cases"]
    parse.process_hdf5_to_tuple(name, len(tests), "/private/test_data.h5")  # a damaged file: not run
    lines = [problem["required_dependencies"], *codes[:-1], "", codes[-1], ""]
    lines += ["from scicode.parse.parse import process_hdf5_to_tuple"]
    lines += [f"targets = process_hdf5_to_tuple('{name}', {len(tests)})"]
    for number, test in enumerate(tests):
        lines += [f"target = targets[{number}]", "", test]
    return common.verdict(run, "\n".join(lines))


def run(script):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "eval/data").mkdir(parents=True)
        Path(folder, "eval/data/test_data.h5").symlink_to("/private/test_data.h5")
        Path(folder, "step.py").write_text(script)
        command = [sys.executable, "step.py"]
        env = os.environ | {"PYTHONPATH": "/private/src"}
        try:
            done = subprocess.run(command, timeout=1800, cwd=folder, env=env, **QUIET)
        except subprocess.TimeoutExpired:
            return False, "tests: more than 1,800 s"
    return not done.returncode, "tests: failed" if done.returncode else "tests: passed"


if __name__ == "__main__":
    convert()
