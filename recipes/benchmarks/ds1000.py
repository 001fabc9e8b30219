"""DS-1000 as 1,000 tasks, graded by its own execution.py in the environment of its environment.yml.

    python3.10 -m venv venvs/ds1000                # 6.9 GB, of which most is torch's CUDA, which is not used
    venvs/ds1000/bin/pip install gensim==4.3.2 matplotlib==3.8.4 numpy==1.26.4 pandas==1.5.3 torch==2.2.0 \\
        seaborn==0.13.2 scikit-learn==1.4.0 scipy==1.12.0 statsmodels==0.14.1 xgboost==2.0.3 \\
        tensorflow-cpu==2.16.1 PyYAML==6.0.2 tqdm==4.67.1
    python recipes/benchmarks/ds1000.py DS-1000 --venv venvs/ds1000 --output data/ds1000
    python 04_eval.py --tasks data/ds1000/tasks.jsonl --rounds 1 --temperature 0 --model ...

DS-1000 is a clone of github.com/xlang-ai/DS-1000 at b39aab71. SR@1 is pass@1. Without tools: the authors'
system prompt, their stop words cut from the answer, their postprocess(); for their 1,024 tokens add
--max_tokens 1024. With tools: the same completion in solution.py. What loads a data set needs "network".
"""

import gzip
import json
import os
import re

import common

FILES = {
    "data/ds1000.jsonl.gz": "e8c6daa9d7223976bce0296644f3933f78d7f47830669ff05cd61da62c6ba9b3",
    "execution.py": "fab0beb2a5c3300f4540c2225ffc013881e5770fed388ad20d4620ae040cd311",
    "test_ds1000.py": "32ebe279eefa2d3cb1d633a82b43954ea813567e2fca28a9f6d777ce7f04d50c",
}
SHORT = "Write a short code following the given format and indentation"  # run_openai.py:36
SYSTEM = f"{SHORT}. Place the executable code between <code> and </code> tags, without any other "
SYSTEM += "non-executable things."
WRITE = f"\n\n{SHORT}: only what stands in place of the solution, not the code around it. "
WRITE += "Put it into the file /workspace/solution.py."
DOWNLOADS = re.compile(r"load_dataset\(|fetch_\w+\(")


def convert():
    found = common.options(__doc__, "clone")
    private = {found.clone / name: name for name in FILES}
    for path, name in private.items():
        common.pinned(path, {FILES[name]: name})
    common.installed(found.venv, "pandas==1.5.3", "numpy==1.26.4", "torch==2.2.0", "tensorflow-cpu==2.16.1")
    tasks = []
    for problem in read(found.clone / "data/ds1000.jsonl.gz"):
        number = problem["metadata"]["problem_id"]
        check = f"{found.check} {number} {found.place}"
        turn = {"query": problem["prompt"], "check": check, "solution": check + " solve"}
        task = {"query_id": f"ds1000-{number}", "domain": "research", "source": "DS-1000"}
        task["subdomain"] = problem["metadata"]["library"]
        if found.no_tools:
            task["system"] = SYSTEM
        else:
            turn["query"] += WRITE
        if DOWNLOADS.search(problem["prompt"] + problem["code_context"] + problem["reference_code"]):
            task["needs"] = ["network"]
        tasks.append(task | {"turns": [turn]})
    common.write(found, tasks, 1000, private)
    print(f"{sum('needs' in task for task in tasks)} of them need the network")


def read(path):
    return [json.loads(line) for line in gzip.open(path)]


def solve(number, place):
    problem = read("/private/data/ds1000.jsonl.gz")[int(number)]
    common.hand_in(place, "solution.py", problem["reference_code"])


def check(number, place):
    """As eval_ds1000() in test_ds1000.py: the program of lines 30 to 35, 120 s."""
    answer = common.submitted(place, "solution.py")
    os.chdir("/private")
    import execution
    import test_ds1000

    problem = test_ds1000.ds1000[int(number)]
    common.confine()

    def grade(code):
        program = f"{problem['code_context']}\ncode = {code!r}\ntest_execution(code)\n"
        if "test_string(" in problem["code_context"]:
            program += "test_string(code)\n"
        result = execution.check_correctness(program, timeout=120)
        return result["passed"], "tests: " + result["result"].split(":")[0]

    code = test_ds1000.postprocess(answer.split("# SOLUTION END")[0])
    return common.verdict(grade, code, problem["reference_code"])


if __name__ == "__main__":
    convert()
