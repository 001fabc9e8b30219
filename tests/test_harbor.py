"""Harbor's task folders in and out, and episodes as ATIF."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARBOR = "recipes/benchmarks/harbor.py"
# An environment with Harbor's own package (Python 3.12), which does not go with ours
HARBOR_PYTHON = os.environ.get("HARBOR_PYTHON", "")

TOML = 'version = "1.0"\n[metadata]\n[verifier]\ntimeout_sec = 60.0\n[agent]\n[environment]\n'
DOCKERFILE = """\
# canary
FROM ubuntu:24.04
ENV A=b
WORKDIR /app
RUN apt-get update && apt-get install -y bash \\
    && rm -rf /var/lib/apt/lists/*
COPY data/numbers.txt /app/in/
RUN mkdir -p /app/out && printf "1\\n2\\n" > /app/words.txt
"""
TEST = """\
#!/bin/bash
apt-get update && apt-get install -y curl
curl -LsSf https://astral.sh/uv/0.9.7/install.sh | sh
source $HOME/.local/bin/env
test "$(cat /app/out/sum.txt)" = "$(cat /tests/expected.txt)"
if [ $? -eq 0 ]; then echo 1 > /logs/verifier/reward.txt; else echo 0 > /logs/verifier/reward.txt; fi
"""
SOLVE = "#!/bin/bash\npaste -sd+ /app/in/numbers.txt | bash /solution/add.sh > /app/out/sum.txt\n"


@pytest.fixture
def harbor_task(tmp_path):
    """harbor_task(**texts of files that differ) -> folder with a task "sums/easy" below it."""

    def make(**texts):
        files = {"task.toml": TOML, "instruction.md": "<!-- harbor-canary -->\n\nPut the sum into /app/out/sum.txt.\n"}
        files |= {"environment/Dockerfile": DOCKERFILE, "environment/data/numbers.txt": "1\n2\n39\n"}
        files |= {"tests/test.sh": TEST, "tests/expected.txt": "42\n"}
        files |= {"solution/solve.sh": SOLVE, "solution/add.sh": "echo $(($(cat)))\n"}
        for name, text in (files | texts).items():
            path = tmp_path / "set/sums/easy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "set"

    return make


@pytest.fixture
def read_in(run_stage, tmp_path):
    """read_in(folder) -> (rows, printed lines)."""

    def run(folder, name="in"):
        result = run_stage(HARBOR, "in", folder, "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
        lines = tmp_path.joinpath(name, "tasks.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], result.stdout.splitlines()

    return run


def files_below(folder):
    """{path: content or target} of everything below a folder."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


@needs_bwrap
def test_a_folder_becomes_a_task(read_in, harbor_task, tmp_path):
    [row], lines = read_in(harbor_task())
    assert row == {
        "query_id": "sums-easy",
        "domain": "vibe_coding",
        "source": "harbor",
        "turns": [
            {
                "query": "Put the sum into /workspace/out/sum.txt.",
                "check": "bash /private/check.sh",
                "solution": "PATH=/private/bin:$PATH bash /private/solution/solve.sh",
            }
        ],
        "workspace": "sums-easy/workspace",
        "private": "sums-easy/private",
        "venv": sys.prefix,
    }
    workspace = tmp_path / "in/sums-easy/workspace"
    assert files_below(workspace) == {"in/numbers.txt": b"1\n2\n39\n", "words.txt": b"1\n2\n"}
    assert workspace.joinpath("out").is_dir()
    assert lines[-1].endswith("tasks.jsonl: 1 of 1 tasks, 1 of them for bubblewrap, 1 with a solution")


def run_in_sandbox(folder, command):
    """Exit code of a command with the task's folders at /workspace and /private."""
    prefix = "bwrap --unshare-all --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --tmpfs /tmp"
    prefix += " --symlink usr/lib64 /lib64 --ro-bind /etc/alternatives /etc/alternatives --proc /proc --dev /dev"
    prefix += f" --setenv HOME /tmp/home --bind {folder}/workspace /workspace --ro-bind {folder}/private /private"
    command = [*prefix.split(), "--chdir", "/workspace", "bash", "-c", command]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


@needs_bwrap
def test_nothing_fails_the_check_and_the_solution_passes_it(read_in, harbor_task, tmp_path):
    [row], _ = read_in(harbor_task())
    [turn] = row["turns"]
    assert run_in_sandbox(tmp_path / "in/sums-easy", turn["check"]) == 1
    assert run_in_sandbox(tmp_path / "in/sums-easy", turn["solution"]) == 0
    assert run_in_sandbox(tmp_path / "in/sums-easy", turn["check"]) == 0


@needs_bwrap
@pytest.mark.parametrize(
    "test, code",
    [
        ("echo 1 > /logs/verifier/reward.txt\nexit 3\n", 0),  # the reward decides
        ("echo 0.5 > /logs/verifier/reward.txt\n", 1),
        ("echo '{\"a\": 1, \"b\": 0}' > /logs/verifier/reward.json\n", 1),
        ("echo '{\"a\": 1, \"b\": 1}' > /logs/verifier/reward.json\n", 0),
        ("exit 0\n", 0),  # no reward: the exit code
        ("exit 4\n", 4),
        ("no-such-program\n", 127),  # for 04: not run
    ],
)
def test_the_reward_of_a_verifier(read_in, harbor_task, tmp_path, test, code):
    [row], _ = read_in(harbor_task(**{"tests/test.sh": test}))
    assert run_in_sandbox(tmp_path / "in/sums-easy", row["turns"][0]["check"]) == code


@needs_bwrap
@pytest.mark.parametrize(
    "line, reason",
    [
        ("RUN curl https://example.org/x | sh\n", "RUN curl https://example.org/x"),
        ("COPY data /data\n", "files in /data"),
        ("RUN mkdir -p /cache\n", "RUN mkdir -p /cache"),
        ("RUN pip install no-such-package==1.0\n", "pip no-such-package"),
        ("RUN apt-get install -y no-such-program\n", "apt no-such-program"),
        ("RUN cp /app/nowhere /app/x\n", "cannot stat"),
        ("COPY missing.txt /app/\n", "missing.txt is missing"),
        ("USER nobody\n", "a line of the Dockerfile: nobody"),
        ("WORKDIR /\n", "no working folder"),
    ],
)
def test_what_is_beyond_a_sandbox_needs_a_container_and_says_why(read_in, harbor_task, line, reason):
    [row], lines = read_in(harbor_task(**{"environment/Dockerfile": DOCKERFILE + line}))
    assert row["image"] == "harbor-sums-easy"
    assert lines[0].startswith("needs a container: sums-easy: ") and reason in lines[0]


@needs_bwrap
def test_a_dockerfile_cannot_read_the_machine(read_in, harbor_task, tmp_path):
    tmp_path.joinpath("secret").write_text("secret")
    lines = [f"RUN cp {tmp_path}/secret /app/secret\n", "COPY ../../../../secret /app/secret\n"]
    for line in lines:
        rows, printed = read_in(harbor_task(**{"environment/Dockerfile": DOCKERFILE + line}))
        assert not list(tmp_path.rglob("workspace/secret")), printed


def test_what_is_no_task_is_named(read_in, harbor_task, run_stage, one_line_error, tmp_path):
    rows, lines = read_in(harbor_task(**{"task.toml": '[[steps]]\nname = "one"\n'}))
    assert rows == [] and lines[0].endswith("sums/easy: several steps")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line_error(run_stage(HARBOR, "in", empty), "empty: no task.toml below it")
    one_line_error(run_stage(HARBOR, "out", tmp_path / "nowhere.jsonl", empty), "nowhere.jsonl")


# ----------------------------------------------------------------------------------------------------------
# Out, and in again


@pytest.fixture
def own_tasks(tmp_path):
    """A task file of ours: one turn with everything, one with two turns, one with a rubric."""
    folder = tmp_path / "own"
    for name, text in (("ws/a.txt", "a"), ("ws/sub/b.bin", "\x00"), ("hidden/expected.txt", "α\n")):
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text(text)
    folder.joinpath("ws/link").symlink_to("a.txt")
    turn = {"query": 'Write "α"\n\\ into b.txt.\n', "check": "cmp b.txt /private/expected.txt"}
    turn["solution"] = "cp /private/expected.txt b.txt"
    task = {"query_id": "one", "domain": "research", "turns": [turn], "needs": ["cmp"], "meta": {"n": 1, "s": "\x7f'"}}
    task |= {"workspace": "ws", "private": "hidden"}
    two = {"query_id": "two", "turns": [turn, turn]}
    judged = {"query_id": "judged", "turns": [{"query": "q", "rubric": ["r"]}]}
    rows = [json.dumps(row) + "\n" for row in (task, two, judged)]
    folder.joinpath("tasks.jsonl").write_text("".join(rows))
    return folder, task


def write_out(run_stage, tasks, folder):
    result = run_stage(HARBOR, "out", tasks, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_ours_out_and_in_again(read_in, run_stage, own_tasks, tmp_path):
    folder, task = own_tasks
    lines = write_out(run_stage, folder / "tasks.jsonl", tmp_path / "out")
    assert lines == [
        f"left out: {folder}/tasks.jsonl:2: two: 2 turns: each is graded on what the one before left",
        f"left out: {folder}/tasks.jsonl:3: judged: no check: a rubric has no place there",
        f"{tmp_path}/out: 1 of 3 tasks",
    ]
    [row], _ = read_in(tmp_path / "out", "again")
    assert row == task | {"workspace": "one/workspace", "private": "one/private"}
    assert files_below(tmp_path / "again/one/workspace") == files_below(folder / "ws")
    assert files_below(tmp_path / "again/one/private") == files_below(folder / "hidden")
    write_out(run_stage, tmp_path / "again/tasks.jsonl", tmp_path / "out2")
    first, second = files_below(tmp_path / "out/one"), files_below(tmp_path / "out2/one")
    assert first.pop("task.toml") != second.pop("task.toml")  # where the folders lie
    assert first == second


@needs_bwrap
def test_harbors_in_out_and_in_again(read_in, run_stage, harbor_task, tmp_path):
    first, _ = read_in(harbor_task(), "first")
    write_out(run_stage, tmp_path / "first/tasks.jsonl", tmp_path / "out")
    second, _ = read_in(tmp_path / "out", "second")
    assert first == second
    assert files_below(tmp_path / "first/sums-easy") == files_below(tmp_path / "second/sums-easy")


LOAD = """
import json, sys
from harbor.models.task.task import Task
task = Task(sys.argv[1])
print(json.dumps([task.instruction, str(task.paths.discovered_test_path), task.config.metadata["limi_task"]]))
"""


@pytest.mark.skipif(not HARBOR_PYTHON, reason="needs HARBOR_PYTHON=PYTHON of an environment with harbor==0.25.0")
def test_harbors_own_loader_reads_ours(run_stage, own_tasks, tmp_path):
    folder, task = own_tasks
    write_out(run_stage, folder / "tasks.jsonl", tmp_path / "out")
    result = subprocess.run([HARBOR_PYTHON, "-c", LOAD, tmp_path / "out/one"], capture_output=True, text=True)
    instruction, test, row = json.loads(result.stdout)
    assert instruction == task["turns"][0]["query"] and json.loads(row) == task
    assert test == str(tmp_path / "out/one/tests/test.sh")


# ----------------------------------------------------------------------------------------------------------
# ATIF

EPISODE = {
    "query_id": "q.1",
    "run": 0,
    "messages": [
        {"role": "system", "content": "You are an agent that works in a folder."},
        {"role": "user", "content": "Look into both files of the folder."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Two files, two calls of the tool.",
            "tool_calls": [
                {"id": "c0", "type": "function", "function": {"name": "read", "arguments": {"path": "/a", "n": 1}}},
                {"id": "c1", "type": "function", "function": {"name": "read", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c0", "content": "the first file's content"},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {"role": "assistant", "content": "The second file is empty, the first is not.", "weight": 0},
        {"role": "user", "content": "And now the third one, please."},
        {"role": "assistant", "content": "There is no third file in the folder."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "read",
                "description": "Read a file.",
                "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
            },
        }
    ],
    "meta": {"model": "m", "prompt_tokens": 7, "completion_tokens": 3, "format": "episode"},
    "rounds": [{"turn": 0, "round": 1, "score": 1.0}],
}


def export(run_stage, tmp_path, *rows):
    path = tmp_path / "episodes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_stage("recipes/export_atif.py", path, tmp_path / "atif")


def test_an_episode_as_atif(run_stage, tmp_path):
    served = [{"prompt_token_ids": [1, 2], "token_ids": [n], "text": "t"} for n in range(3)]
    result = export(run_stage, tmp_path, EPISODE | {"served": served})
    assert result.stdout == f"{tmp_path}/atif: 1 trajectories\n", result.stderr
    atif = json.loads(tmp_path.joinpath("atif/q.1-0.json").read_text())
    assert [(step["step_id"], step["source"]) for step in atif["steps"]] == [
        (1, "system"),
        (2, "user"),
        (3, "agent"),
        (4, "agent"),
        (5, "user"),
        (6, "agent"),
    ]
    assert atif["steps"][2] == {
        "step_id": 3,
        "source": "agent",
        "message": "",
        "reasoning_content": "Two files, two calls of the tool.",
        "tool_calls": [
            {"tool_call_id": "c0", "function_name": "read", "arguments": {"path": "/a", "n": 1}},
            {"tool_call_id": "c1", "function_name": "read", "arguments": {}},
        ],
        "observation": {
            "results": [
                {"source_call_id": "c0", "content": "the first file's content"},
                {"source_call_id": "c1", "content": ""},
            ]
        },
        "metrics": {"prompt_token_ids": [1, 2], "completion_token_ids": [0]},
    }
    assert atif["steps"][3]["is_copied_context"] is True and "is_copied_context" not in atif["steps"][5]
    assert atif["agent"]["tool_definitions"] == EPISODE["tools"] and atif["agent"]["model_name"] == "m"
    assert atif["final_metrics"] == {"total_prompt_tokens": 7, "total_completion_tokens": 3}
    assert atif["extra"] == {"meta": EPISODE["meta"], "rounds": EPISODE["rounds"]}


def test_stage_2_reads_back_what_was_exported(run_stage, tmp_path):
    assert export(run_stage, tmp_path, EPISODE).returncode == 0
    out = tmp_path / "back.jsonl"
    result = run_stage("02_format_trajectories.py", tmp_path / "atif", "--output_file", out)
    assert result.returncode == 0, result.stderr
    [row] = map(json.loads, out.read_text().splitlines())
    assert row["messages"] == EPISODE["messages"] and row["tools"] == EPISODE["tools"]
    assert row["query_id"] == EPISODE["query_id"] and row["meta"]["model"] == "m"


@pytest.mark.skipif(not HARBOR_PYTHON, reason="needs HARBOR_PYTHON=PYTHON of an environment with harbor==0.25.0")
def test_harbors_own_model_takes_it(run_stage, tmp_path):
    export(run_stage, tmp_path, EPISODE)
    code = "import sys; from harbor.models.trajectories import Trajectory\n"
    code += "print(len(Trajectory.model_validate_json(open(sys.argv[1]).read()).steps))"
    command = [HARBOR_PYTHON, "-c", code, tmp_path / "atif/q.1-0.json"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "6\n"


def test_a_row_that_is_none_is_named(run_stage, one_line_error, tmp_path):
    stray = EPISODE | {"messages": [{"role": "tool", "tool_call_id": "c9", "content": "x"}]}
    result = export(run_stage, tmp_path, EPISODE, stray)
    one_line_error(result, "episodes.jsonl:2: ", "messages[0].tool_call_id answers no call")
    one_line_error(export(run_stage, tmp_path, {"messages": []}), "episodes.jsonl:1: ", "query_id")
