"""The converters of recipes/benchmarks and their checks, on hand-made data in each benchmark's own layout."""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes/benchmarks"
needs_sandbox = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


def load(path):
    """A file of recipes/benchmarks as a module, whatever its name."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"tested_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def common():
    return load(FOLDER / "common.py")


@pytest.fixture(scope="module")
def tau2():
    return load(FOLDER / "tau2.py")


@pytest.fixture(scope="module")
def relays():
    return load(FOLDER / "tau2_relay.py")


@pytest.fixture
def make_venv(tmp_path):
    """make_venv({"package": "1.0"}, {file in site-packages: text}) -> a real environment with stand-ins."""

    def make(packages, files):
        venv = tmp_path / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        [site] = venv.glob("lib/python3*/site-packages")
        for name, version in packages.items():
            (site / f"{name}-{version}.dist-info").mkdir()
        for name, text in files.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)
        return venv

    return make


def pinned_copy(name, folder, **changes):
    """The converter with the sha256 or commit of hand-made data in the place of the published: {old: new}."""
    shutil.copy(FOLDER / "common.py", folder)
    text = (FOLDER / name).read_text()
    for old, new in changes["changes"].items():
        assert old in text
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return path


def run(script, *flags):
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scores(tasks, agent, folder):
    """{query_id: [score of each turn]}, and the reasons of what did not run, of 04 on a task file."""
    output = folder / f"{agent}-{tasks.stem}"
    flags = ["--tasks", tasks, "--agent", agent, "--rounds", 1, "--output_dir", output]
    result = run(ROOT / "04_eval.py", *flags)
    assert result.returncode in (0, 1), result.stderr
    found = {}
    for episode in rows(output / "episodes.jsonl"):
        found[episode["query_id"]] = [record["score"] for record in episode["rounds"]]
    return found, {row["query_id"]: row["reason"] for row in rows(output / "not_run.jsonl")}


def commit_all(clone):
    """The commit of a new repository with what the folder has."""
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=clone, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- EvalPlus: its loaders, checker and sanitizer as stand-ins of a few lines ----

EVALPLUS = {
    "evalplus/__init__.py": "",
    "evalplus/data.py": (
        "import gzip, json, os\n"
        "from datasets import load_dataset\n"  # slow to import, and for EvalPerf alone
        "def get_human_eval_plus():\n"
        "    rows = map(json.loads, gzip.open(os.environ['HUMANEVAL_OVERRIDE_PATH']))\n"
        "    return {row['task_id']: row for row in rows}\n"
        "get_mbpp_plus = get_human_eval_plus\n"
    ),
    "evalplus/sanitize.py": (
        "def sanitize(code, entrypoint):\n"
        "    if 'x + x' in code:\n"
        "        raise RecursionError('as ast.parse does on a long sum')\n"
        "    return code.split('```python')[-1].split('```')[0]\n"
    ),
    "evalplus/evaluate.py": (
        "import multiprocessing\n"
        "MBPP_OUTPUT_NOT_NONE_TASKS = []\n"
        "def get_groundtruth(problems, name, not_none):\n"
        "    print('Computing expected output...')\n"
        "    return {task_id: [4, 9] for task_id in problems}\n"
        "def child(code, name, expected, status):\n"
        "    scope = {}\n"
        "    try:\n"
        "        exec(code, scope)\n"
        "        status.value = [scope[name](n) for n in (2, 3)] == expected\n"
        "    except Exception:\n"
        "        pass\n"
        "def check_correctness(dataset, number, problem, code, expected, fast_check):\n"
        "    status = multiprocessing.Value('i', 0)\n"
        "    arguments = (code, problem['entry_point'], expected, status)\n"
        "    process = multiprocessing.Process(target=child, args=arguments)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    said = 'pass' if status.value else 'fail'\n"
        "    return {'base': (said, []), 'plus': (said, [])}\n"
    ),
}
PROMPT = 'def square(n):\n    """The square."""\n'
BODIES = {"HumanEval/0": "    return n * n\n", "HumanEval/1": "    return n ** 2\n"}
BODIES["HumanEval/2"] = "    return 1\n"  # broken


@pytest.fixture
def evalplus(tmp_path, make_venv):
    """(converter for three problems, the last with a broken reference; flags that it needs)."""
    data = tmp_path / "mini.jsonl.gz"
    with gzip.open(data, "wt") as file:
        for task_id, body in BODIES.items():
            row = {"task_id": task_id, "prompt": PROMPT, "canonical_solution": body, "entry_point": "square"}
            file.write(json.dumps(row) + "\n")
    venv = make_venv({"evalplus": "0.3.1"}, EVALPLUS)
    published = "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101"
    changes = {published: digest(data), '"HumanEval+", 164': '"HumanEval+", 3'}
    script = pinned_copy("evalplus.py", tmp_path, changes=changes)
    return script, [data, "--venv", venv, "--output", tmp_path / "out"]


@needs_sandbox
def test_evalplus_proves_itself_and_a_broken_reference_is_not_run(evalplus, tmp_path):
    script, flags = evalplus
    for more, name in (([], "tasks.jsonl"), (["--no_tools"], "no_tools.jsonl")):
        assert run(script, *flags, *more).returncode == 0
        tasks = tmp_path / "out" / name
        assert scores(tasks, "solution", tmp_path) == (
            {"HumanEval-0": [1.0], "HumanEval-1": [1.0]},
            {"HumanEval-2": "bailed_out"},
        )
        assert scores(tasks, "nothing", tmp_path) == (
            {"HumanEval-0": [0.0], "HumanEval-1": [0.0]},
            {"HumanEval-2": "bailed_out"},
        )


def test_evalplus_asks_in_the_authors_words_and_shows_no_solution(evalplus, tmp_path):
    script, flags = evalplus
    assert run(script, *flags).returncode == 0 and run(script, *flags, "--no_tools").returncode == 0
    asked = [json.loads(line) for line in (tmp_path / "out/no_tools.jsonl").read_text().splitlines()]
    assert asked[0]["turns"][0]["query"] == (
        "Please provide a self-contained Python script that solves the following problem in a markdown "
        "code block:\n"
        '```python\ndef square(n):\n    """The square."""\n```'
    )
    with_tools = (tmp_path / "out/tasks.jsonl").read_text()
    assert "in the file /workspace/solution.py:" in with_tools and "n * n" not in with_tools
    assert [task["query_id"] for task in asked] == ["HumanEval-0", "HumanEval-1", "HumanEval-2"]


def test_evalplus_data_that_are_cut_and_another_version_are_one_line(evalplus, tmp_path, one_line_error):
    script, [data, _, venv, *output] = evalplus
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    one_line_error(run(script, data, "--venv", venv, *output), f"{data}: sha256 ", "get it again")
    one_line_error(run(script, tmp_path, "--venv", venv, *output), f"{tmp_path}: no such file")
    data.write_bytes(whole)
    one_line_error(run(script, data, "--venv", tmp_path, *output), "evalplus==0.3.1 is not installed there")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    one_line_error(run(script, data, "--venv", venv, *output), "--output: ", "out")
    (tmp_path / "out").unlink()
    (tmp_path / "out/tasks.jsonl").mkdir(parents=True)
    one_line_error(run(script, data, "--venv", venv, *output), "--output: ", "out/tasks.jsonl")


RIGHT = "def square(n):\n    return n * n\n"
CHEATS = {
    "prints a verdict": "import os\nos.write(1, b'Bail out! no\\nok - all\\n')\n",
    "reads the tests": "print(open('/private/problems.jsonl.gz', 'rb').read())\n" + RIGHT,
    "reads them as bytes": "import os\nos.open(b'/private/../private/common.py', 0)\n" + RIGHT,
    "starts a program": "import os\nos.system('true')\n" + RIGHT,
    "asks for too much memory": "hold = bytearray(7 << 30)\n" + RIGHT,
}


@needs_sandbox
@pytest.mark.parametrize("cheat", CHEATS)
def test_code_under_test_neither_speaks_for_the_check_nor_opens_its_files(evalplus, tmp_path, cheat):
    script, flags = evalplus
    assert run(script, *flags).returncode == 0
    tasks = tmp_path / "out/tasks.jsonl"
    task = json.loads(tasks.read_text().splitlines()[0])
    workspace = tmp_path / "out/workspace"
    workspace.mkdir()
    (workspace / "solution.py").write_text(CHEATS[cheat])
    tasks.write_text(json.dumps(task | {"workspace": "workspace"}) + "\n")
    assert scores(tasks, "nothing", tmp_path) == ({"HumanEval-0": [0.0]}, {})


@needs_sandbox
def test_an_answer_that_the_authors_code_cannot_read_is_wrong_and_not_not_run(evalplus, tmp_path):
    script, flags = evalplus
    assert run(script, *flags, "--no_tools").returncode == 0
    tasks = tmp_path / "out/no_tools.jsonl"
    task = json.loads(tasks.read_text().splitlines()[0])
    task["turns"][0]["solution"] = "echo 'x + x + x'"
    tasks.write_text(json.dumps(task) + "\n")
    assert scores(tasks, "solution", tmp_path) == ({"HumanEval-0": [0.0]}, {})


# ---- DS-1000 ----

DS1000 = {
    "execution.py": (
        "def check_correctness(program, timeout):\n"
        "    assert timeout == 120\n"
        "    try:\n"
        "        exec(program, {})\n"
        "    except Exception as error:\n"
        "        return {'passed': False, 'result': f'failed: {error}'}\n"
        "    return {'passed': True, 'result': 'passed'}\n"
    ),
    "test_ds1000.py": (
        "import gzip, json\n"
        "ds1000 = [json.loads(line) for line in gzip.open('data/ds1000.jsonl.gz')]\n"
        "def postprocess(code):\n"
        "    code = code.split('</code>')[0].replace('```python', '')\n"
        "    return code.split('```')[0].replace('<code>', '')\n"
    ),
}
CONTEXT = "def test_execution(code):\n    test = {}\n    exec(code, test)\n    assert test['result'] == 7\n"
LOADS = "import seaborn\ndata = seaborn.load_dataset('penguins')\n"


@needs_sandbox
def test_ds1000_stop_words_network_and_system_prompt(tmp_path, make_venv):
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    problems = []
    for number, code in enumerate(("result = 7\n", "result = 3 + 4\n", LOADS)):
        metadata = {"problem_id": number, "library": "Numpy"}
        row = {"prompt": "Set result.\n<code>\n", "metadata": metadata, "code_context": CONTEXT}
        problems.append(row | {"reference_code": code})
    with gzip.open(clone / "data/ds1000.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)
    for name, text in DS1000.items():
        (clone / name).write_text(text)
    changes = {"common.write(found, tasks, 1000, private)": "common.write(found, tasks, 3, private)"}
    for name, old in load(FOLDER / "ds1000.py").FILES.items():
        changes[old] = digest(clone / name)
    versions = {"pandas": "1.5.3", "numpy": "1.26.4", "torch": "2.2.0+cpu", "tensorflow_cpu": "2.16.1"}
    flags = [clone, "--venv", make_venv(versions, {}), "--output", tmp_path / "out"]
    script = pinned_copy("ds1000.py", tmp_path, changes=changes)
    assert run(script, *flags).stdout.splitlines()[-1] == "1 of them need the network"
    assert run(script, *flags, "--no_tools").returncode == 0
    for name in ("tasks.jsonl", "no_tools.jsonl"):
        found = scores(tmp_path / "out" / name, "solution", tmp_path)
        assert found == ({"ds1000-0": [1.0], "ds1000-1": [1.0]}, {"ds1000-2": "missing_need"})
    found = scores(tmp_path / "out/no_tools.jsonl", "nothing", tmp_path)
    assert found == ({"ds1000-0": [0.0], "ds1000-1": [0.0]}, {"ds1000-2": "missing_need"})
    task = json.loads((tmp_path / "out/no_tools.jsonl").read_text().splitlines()[0])
    assert task["system"].endswith("tags, without any other non-executable things.")
    assert task["turns"][0]["query"] == "Set result.\n<code>\n"
    # The authors' requests stop at these words
    task["turns"][0]["solution"] = "printf 'result = 7\\n# SOLUTION END\\nresult = 0'"
    one = tmp_path / "out/stop.jsonl"
    one.write_text(json.dumps(task) + "\n")
    assert scores(one, "solution", tmp_path) == ({"ds1000-0": [1.0]}, {})


@pytest.mark.parametrize("name", ["data/ds1000.jsonl.gz", "execution.py", "test_ds1000.py"])
def test_ds1000_that_is_not_the_published_one_is_one_line(tmp_path, make_venv, one_line_error, name):
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    flags = [clone, "--venv", make_venv({}, {}), "--output", tmp_path / "out"]
    changes = {}
    for file, old in load(FOLDER / "ds1000.py").FILES.items():
        (clone / file).write_text(file)
        changes[old] = digest(clone / file)
    script = pinned_copy("ds1000.py", tmp_path, changes=changes)
    one_line_error(run(script, *flags), "pandas==1.5.3 is not installed there")  # the files are right
    (clone / name).write_text("<html>quota exceeded</html>")
    one_line_error(run(script, *flags), f"{clone / name}: sha256 ", "get it again")
    (clone / name).unlink()
    one_line_error(run(script, *flags), f"{clone / name}: no such file")
    assert not (tmp_path / "out").exists()


# ---- SciCode ----

PARSE = (
    "import ast\n"
    "def extract_function_name(header):\n"
    "    return header.split('def ')[1].split('(')[0]\n"
    "def get_function_from_code(text, name):\n"
    "    for node in ast.walk(ast.parse(text)):\n"
    "        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:\n"
    "            return ast.unparse(node)\n"
    "def process_hdf5_to_tuple(step, count, path='eval/data/test_data.h5'):\n"
    "    return [int(number) for number in open(path).read().split()][:count]\n"
)
MODELS = (
    "import packages_that_no_check_needs\n"
    "def extract_python_script(response):\n"
    "    script = response.split('```python')[1].split('```')[0] if '```' in response else response\n"
    "    return re.sub(r'^\\s*(import .*|from .*\\s+import\\s+.*)', '', script, flags=re.MULTILINE)\n"
)
STEPS = {  # header, code, test; each step needs the one before
    "76.1": ("def one():", "def one():\n    return 1\n", "assert one() + 41 == target"),
    "76.2": ("def two():", "def two():\n    return one() + 1\n", "assert two() * 21 == target"),
    "76.3": ("def three():", None, ""),
    "76.4": (
        "def four():",
        "import os\ndef four():\n    return three() + one()\n",
        "assert four() + 38 == target",
    ),
}


@pytest.fixture
def scicode(tmp_path, make_venv):
    """(converter for one problem whose third step is given; its flags)."""
    clone = tmp_path / "clone"
    files = {"src/scicode/__init__.py": "", "src/scicode/parse/__init__.py": ""}
    files |= {"src/scicode/parse/parse.py": PARSE, "src/scicode/gen/models.py": MODELS}
    files["eval/data/76.3.txt"] = "def three():\n    return two() + 1\n"
    files["eval/data/background_comment_template.txt"] = "{problem_steps_str}|{next_step_str}|{dependencies}"
    for name, text in files.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(text)
    head = commit_all(clone)
    steps = []
    for name, (header, code, test) in STEPS.items():
        step = {"step_number": name, "step_description_prompt": f"Step {name}", "function_header": header}
        step |= {"return_line": "return", "ground_truth_code": code}
        steps.append(step | {"test_cases": [test] if test else []})
    problem = {"problem_id": "76", "required_dependencies": "import math", "sub_steps": steps}
    problems, targets = tmp_path / "problems.jsonl", tmp_path / "targets"
    problems.write_text(json.dumps(problem) + "\n")
    targets.write_text("42 7")
    module = load(FOLDER / "scicode.py")
    [published, *_] = module.RELEASES
    [old_targets] = module.TARGETS
    changes = {published: digest(problems), "(65, 291, 3)": "(1, 4, 1)", old_targets: digest(targets)}
    changes["588b4069d73d211434790bdf4f5a3b80c7830912"] = head
    venv = make_venv({"datasets": "3.6.0", "h5py": "3.15.1", "numpy": "1.26.4", "scipy": "1.13.1"}, {})
    flags = [clone, problems, targets, "--venv", venv, "--output", tmp_path / "out"]
    return pinned_copy("scicode.py", tmp_path, changes=changes), flags


@needs_sandbox
def test_scicode_step_runs_on_the_code_of_all_steps_before_it(scicode, tmp_path):
    script, flags = scicode
    for more, name in (([], "tasks.jsonl"), (["--no_tools"], "no_tools.jsonl")):
        assert run(script, *flags, *more).returncode == 0
        tasks = tmp_path / "out" / name
        assert scores(tasks, "solution", tmp_path) == ({"scicode-76": [1.0, 1.0, 1.0]}, {})
        assert scores(tasks, "nothing", tmp_path) == ({"scicode-76": [0.0, 0.0, 0.0]}, {})


@needs_sandbox
def test_scicode_with_targets_that_cannot_be_read_is_not_run(scicode, tmp_path):
    script, flags = scicode
    assert run(script, *flags).returncode == 0
    (tmp_path / "out/private/test_data.h5").write_text("<html>quota exceeded</html>")
    assert scores(tmp_path / "out/tasks.jsonl", "nothing", tmp_path) == ({}, {"scicode-76": "bailed_out"})


def test_scicode_prompt_is_the_authors_template(scicode, tmp_path):
    script, flags = scicode
    assert run(script, *flags, "--no_tools").returncode == 0
    turns = json.loads((tmp_path / "out/no_tools.jsonl").read_text())["turns"]
    above = "[the code of this step is above, in this conversation]"
    assert [turn["query"] for turn in turns] == [
        "|Step 76.1\n\ndef one():\n\nreturn|import math",
        f"Step 76.1\n\n{above}|Step 76.2\n\ndef two():\n\nreturn|import math",
        f"Step 76.1\n\n{above}\n\n------\n\nStep 76.2\n\n{above}\n\n------\n\n"
        "Step 76.3\n\ndef three():\n    return two() + 1|Step 76.4\n\ndef four():\n\nreturn|import math",
    ]


def test_a_changed_clone_a_cut_file_and_a_missing_package_are_one_line(
    scicode, tmp_path, one_line_error, monkeypatch
):
    script, flags = scicode
    clone, problems, targets, _, venv, *_ = flags
    targets.write_text("42")
    one_line_error(run(script, *flags), f"{targets}: sha256 ", "get it again")
    targets.write_text("42 7")
    shutil.rmtree(next(venv.glob("lib/python3*/site-packages")) / "h5py-3.15.1.dist-info")
    one_line_error(run(script, *flags), f"{venv}: h5py==3.15.1 is not installed there")
    (clone / "src/scicode/parse/parse.py").write_text("")
    one_line_error(run(script, *flags), f"{clone}: src and eval are not as in its commit")
    monkeypatch.setenv("PATH", str(tmp_path))  # and without git
    one_line_error(run(script, *flags), f"{clone}: src and eval are not as in its commit")
    one_line_error(run(script, clone, tmp_path / "none", *flags[2:]), f"{tmp_path / 'none'}: no such file")
    assert not (tmp_path / "out").exists()


# ---- What the checks share ----


def test_a_link_and_what_is_too_long_count_as_no_submission(common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text("code")
    Path("solution.py").symlink_to("secret")
    os.mkfifo("pipe")
    assert common.submitted("file", "solution.py") == common.submitted("file", "pipe") == ""
    Path("long").write_bytes(b" " * (1 << 20) + b"\n")
    assert common.submitted("file", "long") == ""
    assert common.submitted("file", "secret") == "code" and common.submitted("file", "none") == ""


def test_a_check_has_one_thread_a_pool_however_many_cores_there_are(tmp_path):
    shutil.copy(FOLDER / "common.py", tmp_path)
    text = "import os\ndef check():\n    print(sorted(name for name in os.environ if 'THREADS' in name))\n"
    text += "    return sum(os.environ[name] != '1' for name in os.environ if 'THREADS' in name)\n"
    (tmp_path / "check.py").write_text(text)
    command = [sys.executable, "-I", tmp_path / "common.py"]
    result = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "64"})
    names = ["MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    names += ["TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS"]
    assert (result.returncode, result.stdout) == (0, f"{names}\n")


def test_verdict(common, capsys):
    def grade(code):
        return code == "right", f"saw {code}"

    assert common.verdict(grade, "right", "right") == 0 and common.verdict(grade, "wrong", "right") == 1
    assert capsys.readouterr().out == "ok - saw right\nnot ok - saw wrong\n"
    with pytest.raises(RuntimeError, match="own solution fails here as well: saw broken"):
        common.verdict(grade, "wrong", "broken")
    assert common.verdict(grade, "wrong") == 1


@needs_sandbox
def test_the_example_of_the_readme_proves_itself(tmp_path):
    [text] = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 45
    data = tmp_path / "test.jsonl"
    problems = [{"question": "2 + 2?", "answer": "4, so\n#### 4"}, {"question": "?", "answer": "#### 1,000"}]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    text = re.sub(r'"\w{64}": 1319', f'"{digest(data)}": 2', text)
    shutil.copy(FOLDER / "common.py", tmp_path)
    (tmp_path / "gsm8k.py").write_text(text)
    result = run(tmp_path / "gsm8k.py", data, "--output", tmp_path / "out")
    assert result.stdout == f"{tmp_path}/out/tasks.jsonl: 2 tasks with 2 turns\n", result.stderr
    tasks = tmp_path / "out/tasks.jsonl"
    assert scores(tasks, "solution", tmp_path) == ({"gsm8k-0": [1.0], "gsm8k-1": [1.0]}, {})
    assert scores(tasks, "nothing", tmp_path) == ({"gsm8k-0": [0.0], "gsm8k-1": [0.0]}, {})


# ---- tau2 ----


def simulation(task, reason, reward):
    return {"task_id": task, "termination_reason": reason, "reward_info": {"reward": reward}}


def test_tau2_pass_k_is_over_all_tasks_and_none_while_a_conversation_is_missing(tau2):
    runs = [simulation("a", "user_stop", 1.0), simulation("a", "agent_stop", 1.0)]
    runs += [simulation("b", "user_stop", 1.0), simulation("b", "max_steps", 0.0)]
    assert tau2.summarize({"simulations": runs}, 2, 2) == (
        {"pass^1": 0.75, "pass^2": 0.5},
        {},
        {"user_stop": 2, "agent_stop": 1, "max_steps": 1},
    )
    nothing = {"pass^1": None, "pass^2": None}
    fault = {"task_id": "b", "termination_reason": "infrastructure_error", "reward_info": None}
    assert tau2.summarize({"simulations": [*runs[:3], fault]}, 2, 2)[:2] == (nothing, {"fault": 1})
    assert tau2.summarize({"simulations": runs[:3]}, 2, 2)[:2] == (nothing, {"missing": 1})


def test_tau2_what_the_model_did_wrong_stays_its_own(relays):
    empty = {"role": "assistant", "content": None}
    assert list(relays.mend_message(empty)) == ["empty"] and empty["content"] == "(no answer)"
    call = {"function": {"name": "f", "arguments": '{"a": '}}
    cut = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert list(relays.mend_message(cut)) == ["bad_arguments"] and call["function"]["arguments"] == "{}"
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    whole = {"role": "assistant", "content": "", "tool_calls": [call]}
    before = json.loads(json.dumps(whole))
    assert list(relays.mend_message(whole)) == [] and whole == before


def test_tau2_relay_counts_a_request_once_and_names_a_dead_endpoint(relays, tmp_path):
    class Options:
        base_url, user_base_url, model, user_model = "http://127.0.0.1:1/v1/", None, "m", "u"
        request, patience, output_dir = {"max_tokens": 9}, 0, tmp_path

    relay = relays.Relay(Options)
    try:
        url, _, changes = relay.routes["/agent"]
        assert url == "http://127.0.0.1:1/v1/chat/completions" and changes == {"model": "m", "max_tokens": 9}
        full = "This model's maximum context length is 10 tokens"
        for _ in range(2):
            status, text = relay.mend("/agent", {"messages": []}, 400, full)
            assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == "(no answer)"
        assert len(relay.mended["context_full"]) == 1 and relay.dead is None
        status, text = relay.ask("/agent", {})
        assert status == 502
        assert relay.mend("/agent", {}, status, text) == (502, text)
        assert relay.dead.startswith("http://127.0.0.1:1/v1/chat/completions: HTTP 502: ConnectError")
    finally:
        relay.shutdown()
        relay.server_close()


def test_tau2_asks_nothing_of_a_clone_that_was_changed_or_an_environment_without_it(
    tmp_path, make_venv, one_line_error
):
    clone = tmp_path / "clone"
    (clone / "src/tau2").mkdir(parents=True)
    (clone / "src/tau2/run.py").write_text("")
    tasks = clone / "data/tau2/domains/airline/tasks.json"
    tasks.parent.mkdir(parents=True)
    tasks.write_text("[]")
    head = commit_all(clone)
    shutil.copy(FOLDER / "tau2_relay.py", tmp_path)
    changes = {"fc0055dc4e0a316c3f83133267fbd6faaa770992": head}
    script = pinned_copy("tau2.py", tmp_path, changes=changes)
    venv = make_venv({"tau2": "1.0.1"}, {})
    flags = ["--venv", venv, "--domain", "airline", "--base_url", "http://127.0.0.1:1/v1", "--model", "m"]
    flags += ["--user_model", "u", "--output_dir", tmp_path / "out"]
    one_line_error(run(script, clone, *flags), f"{venv}: litellm==1.82.6 is not installed there")
    [site] = venv.glob("lib/python3*/site-packages")
    (site / "litellm-1.82.6.dist-info").mkdir()
    for flag, value, said in (
        ("--request", "[1]", "--request: [1] is no JSON object"),
        ("--request", "{", "--request: { is no JSON object"),
        ("--trials", "0", "--trials: 0 is no number above 0"),
        ("--limit", "x", "--limit: x is no number above 0"),
        ("--user_base_url", "localhost:1", "--user_base_url: localhost:1 is no http address"),
        ("--nonsense", "1", "unrecognized arguments: --nonsense 1"),
    ):
        one_line_error(run(script, clone, *flags, flag, value), said)
    tasks.write_text("[{}]")
    one_line_error(run(script, clone, *flags), "src and data/tau2/domains/airline are not as in its commit")
    one_line_error(run(script, tmp_path, *flags), f"{tmp_path}: no clone of tau2-bench")
    assert not (tmp_path / "out").exists()
    tasks.write_text("[]")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text('{"domain": ')
    one_line_error(run(script, clone, *flags), "out/settings.json: ", "another --output_dir")
    (tmp_path / "out/settings.json").write_text("{}")
    one_line_error(run(script, clone, *flags), "settings.json: domain was None, is 'airline'")
    (tmp_path / "file").write_text("")
    one_line_error(run(script, clone, *flags[:-1], tmp_path / "file"), "--output_dir: ", "file")


# ---- The paper's numbers ----


def test_table_2_adds_up_and_the_claim_of_table_3_does_not():
    tables = yaml.safe_load((FOLDER / "paper_tables.yaml").read_text())
    ours = tables["Table 2"]["benchmarks"]["agencybench-v1"]
    for model, average in ours["average"].items():
        mean = sum(ours[metric][model] for metric in ("FTFC", "RC@3", "SR@3")) / 3
        assert abs(mean - average) < 0.06, model
    means = (("Table 3", "LIMI", 45.6), ("Table 3", "GLM-4.5", 42.1), ("Table 4", "LIMI", 49.7))
    for name, model, mean in means:
        columns = []
        for benchmark, metrics in tables[name]["benchmarks"].items():
            if not benchmark.startswith("printed average"):
                columns += [models[model] for models in metrics.values()]
        assert len(columns) == 7 and round(sum(columns) / 7, 1) == mean
    assert [tables[f"Table {n}"]["with_tools"] for n in (2, 3, 4)] == [True, True, False]


# ---- Real data, where it is ----


@needs_sandbox
@pytest.mark.skipif("HUMANEVAL_PLUS" not in os.environ, reason="HUMANEVAL_PLUS=FILE EVALPLUS_VENV=FOLDER")
def test_human_eval_plus_solutions(tmp_path):
    flags = [os.environ["HUMANEVAL_PLUS"], "--venv", os.environ["EVALPLUS_VENV"]]
    flags += ["--output", tmp_path / "out"]
    assert run(FOLDER / "evalplus.py", *flags).returncode == 0
    found, faults = scores(tmp_path / "out/tasks.jsonl", "solution", tmp_path)
    failed = [task for task, given in found.items() if given != [1.0]]
    assert len(found) == 164 and failed == ["HumanEval-32"] and not faults
