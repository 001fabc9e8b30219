"""AgencyBench v1 as a task file: who grades each of its 49 turns, and that empty work scores nothing."""

import argparse
import hashlib
import http.server
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONVERTER = "recipes/benchmarks/agencybench_v1.py"
PRIVATE = ROOT / "recipes/benchmarks/agencybench_v1"

# P: a program decides all that the turn asks for; J: a judge; -: nobody, left out
BY_JUDGE = {1: "JJJJJ", 2: "JJJJJ", 3: "JJJJJ", 4: "JJJJJ", 5: "PPJJJJJJ", 6: "JJJJJ", 7: "JJJ", 8: "JPPPP"}
BY_JUDGE |= {9: "PPPP", 10: "PPPP"}


@pytest.fixture
def clone(shared, tmp_path):
    """A clone's tasks, without the data of tasks 6 and 8."""
    folder = shutil.copytree(shared / "agencybench", tmp_path / "clone")
    for task in (6, 8):
        folder.joinpath(f"AgencyBench-v1/task{task}/workspace").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def convert(run_stage, tmp_path):
    """convert(clone, *flags) -> (tasks by number, printed lines)."""

    def run(clone, *flags):
        result = run_stage(CONVERTER, clone, "--output_dir", tmp_path / "v1", *flags)
        assert result.returncode == 0, result.stderr
        rows = map(json.loads, tmp_path.joinpath("v1/tasks.jsonl").read_text().splitlines())
        return {int(row["query_id"].rpartition("-")[2]): row for row in rows}, result.stdout.splitlines()

    return run


def test_who_grades_the_49_turns(convert, clone):
    tasks, lines = convert(clone, "--judge", "--network")
    table = {int(line[5:7]): line[9:] for line in lines if line.startswith("task ")}
    assert table == BY_JUDGE and sum(map(len, table.values())) == 49
    tasks_of = {number: letters for number, letters in BY_JUDGE.items() if number in tasks}
    for number, letters in tasks_of.items():
        graded = ["P" if "check" in turn else "J" for turn in tasks[number]["turns"]]
        assert "".join(graded) == letters
        assert all(("check" in turn) != ("rubric" in turn) for turn in tasks[number]["turns"])
    assert sorted(tasks) == [1, 2, 3, 4, 5, 9, 10]  # 6 to 8 miss files of the clone
    assert tasks[1]["needs"] == ["make", "g++"] and tasks[10]["needs"] == ["network"]


def test_the_first_line_says_what_runs_here_and_what_the_rest_needs(convert, clone):
    _, lines = convert(clone)
    assert lines[0].startswith("AgencyBench v1: this machine can run 0 of 10 tasks and 0 of 49 turns; ")
    assert "; task 1 needs " in lines[0] and "; task 9 needs network;" in lines[0]
    assert "; task 8 needs file:equation.parquet, --judge;" in lines[0]
    _, lines = convert(clone, "--network")
    assert lines[0].startswith("AgencyBench v1: this machine can run 3 of 10 tasks and 10 of 49 turns; ")
    assert "task 9 needs" not in lines[0] and "; task 5 needs --judge;" in lines[0]
    assert "never the paper's number for a part" in lines[-1]


def test_a_turn_that_nobody_grades_is_left_out_and_its_text_stands_before_the_next(clone, tmp_path, stage):
    sys.path.insert(0, str(ROOT / "recipes/benchmarks"))
    converter = stage("agencybench_v1")
    [path] = clone.glob("AgencyBench-v1/task8/Task8*.json")
    turns, letters = converter.make_turns(8, path, judge=False)
    assert letters == "-PPPP" and len(turns) == 4
    assert turns[0]["query"].startswith("Subtask 1: \nYou are a helpful assistant")
    assert turns[0]["query"].endswith("Please modify the equation until the loss is smaller than 1e-3.")
    assert turns[3]["query"] == "Subtask 5: \nPlease modify the equation until the loss is smaller than 1e-7."
    turns, letters = converter.make_turns(8, path, judge=True)
    assert letters == "JPPPP" and len(turns[0]["rubric"]) == 1


def test_the_environment_is_named_so_that_the_task_file_may_lie_anywhere(clone, tmp_path, stage):
    sys.path.insert(0, str(ROOT / "recipes/benchmarks"))
    converter = stage("agencybench_v1")
    [path] = clone.glob("AgencyBench-v1/task8/Task8*.json")
    options = argparse.Namespace(judge=False, network=False, venv=Path("venvs/v1"), output_dir=tmp_path)
    task, lacks = converter.make_task(8, path, options)
    assert task["venv"] == str(Path.cwd() / "venvs/v1")
    assert "package:scipy" in lacks and "file:equation.parquet" in lacks


def test_ground_truths_stand_in_no_query(convert, clone):
    tasks, _ = convert(clone, "--judge")
    queries = ""
    for task in tasks.values():
        queries += "".join(turn["query"] for turn in task["turns"])
    names = ["Geogre", "James Harden", "Kevin Durant", "Klay Thompson", "UnitedHealth", "United Health"]
    names += ["Broadcom", "Citigroup", "XPeng", "ground truth:", "alpaca-QA", "TransEnV", "dkhate"]
    assert [name for name in names if name in queries] == []
    assert [turn["solution"] for turn in tasks[9]["turns"]] == [
        f"echo 'Answer: {name}'" for name in ("Paul George", "James Harden", "Kevin Durant", "Klay Thompson")
    ]
    assert all(turn["query"].endswith("one line: Answer: NAME") for turn in tasks[10]["turns"])


def test_a_rubric_has_the_commands_the_bullets_and_the_criteria(convert, clone):
    tasks, _ = convert(clone, "--judge")
    assert tasks[1]["turns"][1]["rubric"] == [
        "These commands work: cd workspace ; make task2 ; ./bin/chat_app",
        "Support adding/removing friends.",
        "Display the friend list (with status: online/offline).",
        "Select a friend to enter the chat interface (chat not yet implemented).",
        "Success Criteria: Able to add/remove friends, and the friend list persists across program restarts.",
    ]
    commands = tasks[4]["turns"][1]["rubric"][0]
    assert commands == "These commands work: python3 workspace/task2_kvstore.py --test-recovery"
    assert tasks[5]["turns"][7]["rubric"] == ["Clean up unnecessary or redundant scripts and test outputs."]


def test_a_file_that_only_a_check_reads_is_missed_before_anything_is_asked(tmp_path, monkeypatch):
    """The loss of task 8 beside the equation that was given: without it every answer would score 0."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes/benchmarks"))
    converter = importlib.import_module("agencybench_v1")
    blobs = ""
    tasks = [f"task{number}/Task{number}.json" for number in range(1, 11)]
    for name in (*tasks, "task8/workspace/equation.parquet"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_text(name)
        blobs += f"{converter.blob(tmp_path / 'clone' / name)}  {name}\n"
    (tmp_path / "BLOBS").write_text(blobs + f"{'0' * 40}  task8/workspace/equation.py\n")
    monkeypatch.setattr(converter, "HERE", tmp_path)
    with pytest.raises(ValueError, match="task8/workspace/equation.py: is missing; check out commit ec65324"):
        converter.find_tasks(tmp_path / "clone")
    (tmp_path / "clone/task8/workspace/equation.parquet").unlink()  # the task is left out, and named
    assert list(converter.find_tasks(tmp_path / "clone")) == list(range(1, 11))


def test_mistakes_are_one_line(run_stage, one_line_error, clone, tmp_path):
    [task] = clone.glob("AgencyBench-v1/task3/*.json")
    workspaces = [task.parents[1] / f"task{number}/workspace" for number in (6, 8)]
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    whole = task.read_text()
    damaged = {workspaces[0] / "gpt-4o.csv": pointer, workspaces[1] / "equation.parquet": ""}
    damaged[task] = whole + " "
    for path, text in damaged.items():
        path.write_text(text)
        result = run_stage(CONVERTER, clone, "--output_dir", tmp_path / "v1")
        one_line_error(result, str(path), "is not the file of commit ec65324; check it out again")
        path.unlink()
    result = run_stage(CONVERTER, clone, "--output_dir", tmp_path / "v1")
    one_line_error(result, "not a clone of GAIR-NLP/AgencyBench, whose version 1 has task1 to task10")
    assert not tmp_path.joinpath("v1").exists()
    one_line_error(run_stage(CONVERTER, tmp_path / "nowhere"), "nowhere: not a clone of GAIR-NLP/AgencyBench")


# ----------------------------------------------------------------------------------------------------------
# The checks


def run_check(script, *arguments, folder):
    """(exit code, output) of a check, run in the folder as 04 does."""
    command = [sys.executable, "-I", PRIVATE / script, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=120)
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    "name, answer, right",
    [
        ("Paul George", "Answer: Paul George", True),
        ("Paul George", "I think\n\n**Answer: Paul George**\n", True),
        ("Paul George", "Answer: Kevin Durant\nNo:\nanswer:  paul george.", True),
        ("Paul George", "Answer: Paul George\nAnswer: Kevin Durant", False),
        ("Paul George", "Answer: Paul George or James Harden", False),
        ("Paul George", "Paul George", False),
        ("Paul George", "", False),
        ("United Health Group", "Answer: UnitedHealth Group Inc.", True),
        ("XPeng Inc.", "Answer: Xpeng", True),
        ("Citigroup", "Answer: Citibank", False),
        ("Broadcom Inc.", "Answer: NAME", False),
    ],
)
def test_names(tmp_path, name, answer, right):
    tmp_path.joinpath("answer.md").write_text(answer)
    code, output = run_check("answer.py", name, tmp_path / "answer.md", folder=tmp_path)
    assert code == (not right) and output.startswith("ok - " if right else "not ok - ")
    assert name not in output  # the output of a failed check is the agent's feedback


def test_a_download_is_the_file_or_at_first_a_pointer_to_it(tmp_path):
    content = b"ten bytes."
    digest = hashlib.sha256(content).hexdigest()
    data = tmp_path / "workspace/data/DynToM"

    def solved(*flags):
        return run_check("dataset.py", digest, 10, *flags, folder=tmp_path)[0] == 0

    assert not solved() and not solved("--pointer")  # no folder at all
    data.mkdir(parents=True)
    data.joinpath("a.json").write_bytes(b"not bytes.")
    tmp_path.joinpath("elsewhere").write_bytes(content)
    data.joinpath("link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(data / "fifo")
    assert not solved() and not solved("--pointer")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 10\n"
    data.joinpath("b.json").write_text(pointer)
    assert not solved() and solved("--pointer")
    data.joinpath("b.json").write_bytes(content)
    assert solved() and solved("--pointer")


GIVEN = "def equation(t, A, params):\n    return params[0] * t + params[1]\n"
RIGHT = "import numpy as np\ndef equation(t, A, params):\n    return params[0] * np.sin(t) + params[1] * A\n"
LOOKUP = "import pandas\nrows = pandas.read_parquet({!r}).iloc[0]['training_set']\n"
LOOKUP += "def equation(t, A, params):\n    return [row[0] for row in rows]\n"


@pytest.fixture
def equation(tmp_path):
    """equation(source, limit) -> (exit code, output) on data of 3 sin(t) - 2 A."""
    pandas = pytest.importorskip("pandas")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("scipy")
    pytest.importorskip("pyarrow")
    t = numpy.linspace(0, 6, 50)
    A = numpy.cos(3 * t)
    rows = [row.tolist() for row in numpy.array([3 * numpy.sin(t) - 2 * A, t, A]).T]
    given = tmp_path / "private"
    given.mkdir()
    pandas.DataFrame({"training_set": [rows]}).to_parquet(given / "equation.parquet")
    given.joinpath("equation.py").write_text(GIVEN)
    tmp_path.joinpath("workspace").mkdir()

    def check(source, limit="1e-6"):
        tmp_path.joinpath("workspace/equation.py").write_text(source)
        return run_check("loss.py", limit, given, folder=tmp_path)

    return check


def test_the_loss_of_an_equation(equation):
    assert equation(RIGHT)[0] == 0
    code, output = equation(RIGHT, "1e-30")
    assert code == 1 and "\nnot ok - the loss of equation.py" in output
    linear = "def equation(t, A, params):\n    return params[0] * t + params[1] * A + params[2]\n"
    assert equation(linear)[0] == 1 and equation(linear, "10")[0] == 0


def test_the_equation_that_was_given_scores_nothing_whatever_its_loss(equation):
    code, output = equation(GIVEN, "1e9")
    assert code == 1 and "is the equation that was given" in output
    assert equation(GIVEN + "\n# considered its physical meaning\n", "1e9")[0] == 1


@pytest.mark.parametrize(
    "source",
    [
        "",
        "def equation(t, A, params):\n    pass\n",
        "print('ok - fine\\nBail out! nothing')\nimport os\nos._exit(0)\n",
        "table = " + repr(list(range(3000))) + "\n" + RIGHT,
        "while True:\n    chunk = [0] * 10 ** 9\n    kept = globals().setdefault('kept', []) + [chunk]\n",
    ],
)
def test_what_is_no_equation_scores_nothing_and_prints_nothing(equation, source):
    code, output = equation(source)
    assert code == 1 and "Bail out" not in output and "fine" not in output
    assert output.splitlines()[-1].startswith("not ok - ")


def test_an_equation_cannot_look_the_data_up(equation, tmp_path):
    assert equation(LOOKUP.format(str(tmp_path / "private/equation.parquet")), "10")[0] == 1


def test_data_that_cannot_be_read_are_no_score(equation, tmp_path):
    tmp_path.joinpath("private/equation.parquet").unlink()
    code, output = equation(RIGHT)
    assert code == 1 and output.startswith("Bail out! ")


def test_empty_programs_that_compile_score_nothing(convert, clone, tmp_path):
    """Every check that the converter writes, on a folder of empty programs."""
    tasks, _ = convert(clone)
    place = tmp_path / "empty/workspace"
    for name in ("task1", "data", "kv", "reports", "logs"):
        place.joinpath(name).mkdir(parents=True)
    place.joinpath("main.cpp").write_text("int main() {}\n")
    place.joinpath("task1/Main.java").write_text("class Main { public static void main(String[] a) {} }\n")
    for name in ("task1_generator.py", "task4_integration_test.py", "equation.py", "data/events.jsonl"):
        place.joinpath(name).write_text("")
    tmp_path.joinpath("answer.md").write_text("")
    checks = []
    for task in tasks.values():
        checks += [turn["check"] for turn in task["turns"]]
    assert len(checks) == 10  # and four of task 8: test_what_is_no_equation_scores_nothing_and_prints_nothing
    for check in checks:
        command = check.replace("/private", str(PRIVATE)) + f" {tmp_path}/answer.md" * ("answer.py" in check)
        assert subprocess.run(["bash", "-c", command], cwd=place.parent).returncode == 1, check


def test_the_solution_of_a_download(tmp_path):
    """The hub's two addresses, by a server of our own."""
    paths = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            files = [{"type": "directory", "path": "a"}, {"type": "file", "path": "a/b c.json"}]
            content = json.dumps(files).encode() if "/api/" in self.path else b"[]"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "no_proxy": "127.0.0.1"}
    subprocess.run([sys.executable, PRIVATE / "solutions/download.py"], cwd=tmp_path, env=env, check=True)
    server.shutdown()
    assert tmp_path.joinpath("workspace/data/a/b c.json").read_text() == "[]"
    name = "datasets/YangXiao-nlp/DynToM"
    assert paths == [f"/api/{name}/tree/main?recursive=true", f"/{name}/resolve/main/a/b%20c.json"]
