"""Harbor's task folders in and out, and episodes as ATIF."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARBOR = "recipes/benchmarks/harbor.py"
# An environment with Harbor's own package (Python 3.12), which does not go with ours
HARBOR_PYTHON = os.environ.get("HARBOR_PYTHON", "")

TOML = 'version = "1.0"\n[metadata]\n[verifier]\ntimeout_sec = 60.0\n[agent]\n[environment]\n'
DOCKERFILE = """\
# canary
FROM --platform=linux/amd64 ubuntu:24.04
WORKDIR /app
RUN apt-get update && apt-get install -y bash \\
    && ln -s /usr/bin/python3 /usr/bin/python && rm -rf /var/lib/apt/lists/*
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
        query = "<!-- harbor-canary -->\n\nPut the sum into /app/out/sum.txt.\n"
        files = {"task.toml": TOML, "instruction.md": query}
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
    """{path: (mode, content or target, None for a folder)} of everything below a folder."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        content = os.readlink(path) if path.is_symlink() else content
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def texts_below(folder):
    return {name: content for name, (_, content) in files_below(folder).items() if content is not None}


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
                "check": "bash /private/check.sh /private",
                "solution": "PATH=/private/bin:$PATH bash /private/solution/solve.sh",
            }
        ],
        "workspace": "sums-easy/workspace",
        "private": "sums-easy/private",
        "venv": sys.prefix,
        "needs": ["bash"],
        "meta": {"verifier_seconds": 60.0},
    }
    workspace = tmp_path / "in/sums-easy/workspace"
    assert texts_below(workspace) == {"in/numbers.txt": b"1\n2\n39\n", "words.txt": b"1\n2\n"}
    assert workspace.joinpath("out").is_dir()
    assert lines[-2].endswith("tasks.jsonl: 1 of 1 tasks, 1 of them for bubblewrap, 1 with a solution")
    assert lines[-1] == "the longest verifier may take 60 s: 04_eval.py --check_seconds 60"


def run_in_sandbox(folder, command):
    """Exit code of a command with the task's folders at /workspace and /private."""
    prefix = "bwrap --unshare-all --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib"
    prefix += " --symlink usr/lib64 /lib64 --ro-bind /etc/alternatives /etc/alternatives --proc /proc"
    prefix += f" --dev /dev --tmpfs /tmp --setenv HOME /tmp/home --bind {folder}/workspace /workspace"
    prefix += f" --ro-bind {folder}/private /private"
    command = [*prefix.split(), "--chdir", "/workspace", "bash", "-c", command]
    return subprocess.run(command).returncode


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
        ('echo \'{"a": 1, "b": 0}\' > /logs/verifier/reward.json\n', 1),
        ("cd /logs/verifier; echo 1 > reward.json; echo 0 > reward.txt\n", 0),
        ('echo \'{"a": 1, "b": 1}\' > /logs/verifier/reward.json\n', 0),
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
    "name, reward",
    [("txt", "pass"), ("txt", ""), ("txt", "nan"), ("json", '["1"]'), ("json", "{"), ("json", "[" * 9999)],
)
def test_a_reward_that_is_no_number_is_no_verdict(read_in, harbor_task, tmp_path, name, reward, capfd):
    test = f"echo '{reward}' > /logs/verifier/reward.{name}\n"
    [row], _ = read_in(harbor_task(**{"tests/test.sh": test}))
    capfd.readouterr()
    run_in_sandbox(tmp_path / "in/sums-easy", row["turns"][0]["check"])
    assert capfd.readouterr().out.startswith("Bail out! the verifier's reward is no number: ")


STEPS = TOML + '[[steps]]\nname = "first"\n[[steps]]\nname = "second.b"\n'
STEP_FILES = {
    "task.toml": STEPS,
    "steps/first/instruction.md": "Make /app/a.\n",
    "steps/first/tests/test.sh": "source /tests/shared.sh; is_there /app/a\n",
    "steps/first/solution/solve.sh": "touch /app/a\n",
    "steps/second.b/instruction.md": "Move it to /app/b.\n",
    "steps/second.b/tests/test.sh": "source /tests/shared.sh; is_there /app/b && ! is_there /app/a\n",
    "steps/second.b/solution/solve.sh": "mv /app/a /app/b; cat /solution/note.txt\n",
    "steps/second.b/solution/note.txt": "moved",
    "tests/shared.sh": "is_there() { test -e $1; }\n",
}


@needs_bwrap
def test_steps_become_turns(read_in, harbor_task, tmp_path):
    [row], _ = read_in(harbor_task(**STEP_FILES))
    folder = tmp_path / "in/sums-easy"
    assert [turn["query"] for turn in row["turns"]] == ["Make /workspace/a.", "Move it to /workspace/b."]
    codes = []
    for turn in row["turns"]:
        for command in (turn["check"], turn["solution"], turn["check"]):
            codes.append(run_in_sandbox(folder, command))
    assert codes == [1, 0, 0, 1, 0, 0]


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
        ("COPY data/*.csv /app/\n", "*.csv is missing"),
        ("COPY /data/*.csv /app/\n", "*.csv is missing"),
        ("USER nobody\n", "a line of the Dockerfile: nobody"),
        ("WORKDIR /\n", "no working folder"),
        ("FROM\n", "image "),
        ("COPY data\n", "COPY data"),
        ("COPY --from=other /x /app/\n", "COPY --from=other"),
        ("RUN <<EOF\nmake\nEOF\n", "RUN <<EOF"),
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
    for name, line in zip("ab", lines):
        rows, printed = read_in(harbor_task(**{"environment/Dockerfile": DOCKERFILE + line}), name)
        assert not list(tmp_path.rglob("workspace/secret")), printed


STEP = TOML + '[[steps]]\nname = "a"\n'


@needs_bwrap
@pytest.mark.parametrize(
    "line, toml",
    [
        ("COPY two/file /app/../../outside/file\n", TOML),
        ("COPY one two /app/\n", TOML),  # one/outside is a link, two/outside a folder with a file
        ("COPY one /app/\nCOPY two/file /app/outside/\n", TOML),
        ("", STEP),  # so are tests/outside and steps/a/tests/outside
    ],
)
def test_no_copy_leads_out_of_a_tasks_folder(read_in, harbor_task, tmp_path, line, toml):
    files = {"task.toml": toml, "environment/Dockerfile": "FROM ubuntu\nWORKDIR /app\n" + line}
    files |= {"environment/two/file": "", "environment/two/outside/file": "", "environment/one/a": ""}
    files |= {"steps/a/tests/outside/file": "", "steps/a/instruction.md": "Do it."}
    folder = harbor_task(**files)
    (tmp_path / "outside").mkdir()
    for place in ("environment/one/outside", "tests/outside"):
        folder.joinpath("sums/easy", place).symlink_to(tmp_path / "outside")
    rows, lines = read_in(folder)
    assert rows == [] and lines[0].endswith(" leads out of its folder")
    assert not list(tmp_path.glob("outside/*")) + list(tmp_path.glob("in/outside"))


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("task.toml", TOML + "gpus = 1\n", "a GPU"),
        ("task.toml", TOML + '[[environment.mcp_servers]]\nname = "a"\n', "MCP servers"),
        (
            "task.toml",
            TOML + '[verifier.environment]\ndocker_image = "x"\n',
            "a container for its verifier",
        ),
        ("environment/docker-compose.yaml", "services: {main: {}, db: {}}\n", "several containers"),
    ],
)
def test_what_a_task_asks_for_beyond_a_sandbox(read_in, harbor_task, name, text, reason):
    [row], lines = read_in(harbor_task(**{name: text}))
    assert row["image"] == "harbor-sums-easy" and lines[0].endswith(f": {reason}")


@needs_bwrap
def test_variables_reach_check_and_solution_each_its_own(read_in, harbor_task, tmp_path):
    """Of the Dockerfile, the environment and the verifier or the solution; places as the sandbox has them."""
    toml = TOML + 'env = {B = "it is"}\n[verifier.env]\nC = "3"\n[solution.env]\nD = "4"\n'
    toml = toml.replace("[verifier]\ntimeout_sec = 60.0\n", "")
    lines = "ENV ROOT=/app/in PATH=/app/bin:$PATH\nENV OLD form\n"
    show = 'echo "$ROOT $OLD $B $C $D" > %s; test -n "$PATH"\n'
    files = {"task.toml": toml, "environment/Dockerfile": DOCKERFILE + lines}
    files |= {"solution/solve.sh": show % "/app/solved.txt", "tests/test.sh": show % "/app/checked.txt"}
    [row], _ = read_in(harbor_task(**files))
    folder = tmp_path / "in/sums-easy"
    for command in (row["turns"][0]["solution"], row["turns"][0]["check"]):
        assert run_in_sandbox(folder, command) == 0
    assert folder.joinpath("workspace/solved.txt").read_text() == "/workspace/in form it is  4\n"
    assert folder.joinpath("workspace/checked.txt").read_text() == "/workspace/in form it is 3 \n"


@needs_bwrap
def test_copies_with_flags_and_stars(read_in, harbor_task, tmp_path):
    lines = "COPY --chown=1:1 --chmod=755 data/*.txt ./all/\nWORKDIR sub\n"
    read_in(harbor_task(**{"environment/Dockerfile": "FROM ubuntu\nENV H=/app\nWORKDIR $H\n" + lines}))
    assert not list(tmp_path.glob("in/*/workspace/*"))  # the working folder is /app/sub
    lines = lines.replace("WORKDIR sub\n", "")
    folder = harbor_task(**{"environment/Dockerfile": "FROM ubuntu\nWORKDIR /app\n" + lines})
    read_in(folder, "again")
    assert texts_below(tmp_path / "again/sums-easy/workspace") == {"all/numbers.txt": b"1\n2\n39\n"}


@needs_bwrap
def test_a_source_with_a_slash_before_it_is_one_of_the_build_folder(read_in, harbor_task, tmp_path):
    lines = "COPY /data/numbers.txt /app/one/\nCOPY /data/*.txt /app/all/\nCOPY / /app/whole/\n"
    folder = harbor_task(**{"environment/Dockerfile": "FROM ubuntu\nWORKDIR /app\n" + lines})
    [row], _ = read_in(folder)
    found = texts_below(tmp_path / "in/sums-easy/workspace")
    assert "image" not in row and found.pop("whole/Dockerfile")
    assert sorted(found) == ["all/numbers.txt", "one/numbers.txt", "whole/data/numbers.txt"]


@needs_bwrap
def test_arguments_and_variables_stand_for_others_and_in_commands(read_in, harbor_task, tmp_path):
    lines = "ARG VERSION=3\nARG EMPTY\nENV HOME_PATH=/app\nWORKDIR ${HOME_PATH}/\n"
    lines += 'ENV NAME="v$VERSION" TOP=$HOME_PATH/top\nENV BOTH=$NAME-${NAME}\n'
    lines += 'RUN echo "$BOTH" > /app/made.txt\n'
    [row], _ = read_in(harbor_task(**{"environment/Dockerfile": "FROM ubuntu\n" + lines}))
    assert tmp_path.joinpath("in/sums-easy/workspace/made.txt").read_text() == "v3-v3\n"
    check = "env NAME=v3 TOP=/workspace/top BOTH=v3-v3 bash /private/check.sh /private"
    assert row["turns"][0]["check"] == check and "image" not in row


@pytest.mark.parametrize(
    "docker, toml", [("", ""), ("", 'workdir = "/app/"\n'), ("WORKDIR '/app'\nCOPY data \"/app/in\"\n", "")]
)
def test_a_working_folder_of_any_form_is_renamed_and_the_root_is_not(read_in, harbor_task, docker, toml):
    query = "Put 1 / 2 into /app/half.txt.\n"
    files = {"instruction.md": query, "environment/Dockerfile": "FROM ubuntu\n" + docker}
    [row], _ = read_in(harbor_task(**files | {"task.toml": TOML + toml}))
    assert ("image" in row) is (not docker and not toml)
    renamed = query.replace("/app/", "/workspace/") if docker or toml else query
    assert row["turns"][0]["query"] == renamed.strip()


def test_a_name_that_04_would_refuse_leaves_one_task_out_and_not_all(read_in, harbor_task):
    folder = harbor_task()
    place = folder / ("a" * 120) / ("b" * 120)
    shutil.copytree(folder / "sums/easy", place)
    rows, lines = read_in(folder)
    assert [row["query_id"] for row in rows] == ["sums-easy"] and lines[0].startswith(f"left out: {place}: ")


@needs_bwrap
def test_one_task_alone_and_what_looks_like_one_in_a_task(read_in, harbor_task):
    folder = harbor_task(**{"environment/data/task.toml": TOML, "environment/data/tests/test.sh": "true"})
    for place, name in ((folder, "sums-easy"), (folder / "sums/easy", "easy")):
        rows, lines = read_in(place, name)
        assert [row["query_id"] for row in rows] == [name] and "1 of 1 tasks" in lines[-2]


@pytest.mark.parametrize("name", ["instruction.md", "environment/Dockerfile", "tests", "steps/a/solution"])
def test_a_link_out_of_the_set_is_not_read(read_in, harbor_task, tmp_path, name):
    """The tasks are a stranger's: what a link leads to would be asked, or shown to the agent."""
    folder = harbor_task(**{"task.toml": STEP, "steps/a/instruction.md": "Do it."})
    (tmp_path / "secret").mkdir()
    for place in ("test.sh", "solve.sh"):
        (tmp_path / "secret" / place).write_text("secret")
    place = folder / "sums/easy" / name
    subprocess.run(["rm", "-rf", place])
    place.symlink_to(tmp_path / "secret" / ("test.sh" if "." in name else ""))
    rows, lines = read_in(folder)
    assert rows == [] and f"{name} leads out of " in lines[0] and "secret" not in lines[0]
    assert not [path for path in tmp_path.glob("in/**/*.sh") if path.read_text() == "secret"]


@pytest.mark.parametrize(
    "name, text, why",
    [
        ("task.toml", '[[steps]]\nname = "one"\n', "No such file or directory"),
        ("task.toml", '[[steps]]\nname = "../.."\n', "the step steps/../.. names no folder"),
        ("task.toml", "[[steps]]\n", "task.toml: steps[0]: 'name' is a required property"),
        ("task.toml", "steps = 'one'\n", "task.toml: steps: 'one' is not of type 'array'"),
        ("task.toml", '[environment]\nos = "windows"\n', "not for Linux"),
        ("task.toml", "metadata = []\n", "task.toml: metadata: [] is not of type 'object'"),
        ("task.toml", '[agent]\ntimeout_sec = "5"\n', "agent.timeout_sec: '5' is not of type 'number'"),
        ("task.toml", "[verifier]\nenv = ['A=1']\n", "verifier.env: ['A=1'] is not of type 'object'"),
        ("task.toml", "[environment.env.A]\nb = 1\n", "environment.env.A: {'b': 1} is not of type 'string'"),
        ("task.toml", "[environment]\nworkdir = 5\n", "environment.workdir: 5 is not of type 'string'"),
        ("instruction.md", "<!-- canary -->\n", "instruction.md is empty"),
        ("task.toml", '[verifier.env]\nKEY = "${KEY}"\n', "needs a variable of your machine: KEY=${KEY}"),
        ("task.toml", "[metadata]\nlimi_task = 3\n", "no task: $: 3 is not of type 'object'"),
        ("task.toml", "[metadata]\nlimi_task = '[]'\n", "no task: $: [] is not of type 'object'"),
        ("task.toml", "a = " + "[" * 9999 + "\n", "recursion depth"),
        ("task.toml", "[[[", "Invalid "),
        ("tests/test.sh", None, "no tests/test.sh"),
        ("instruction.md", None, "No such file or directory"),
    ],
)
def test_a_folder_that_is_no_task_here_is_left_out(read_in, harbor_task, name, text, why):
    folder = harbor_task(**{name: text or ""})
    if text is None:
        folder.joinpath("sums/easy", name).unlink()
    rows, lines = read_in(folder)
    assert rows == [] and lines[0].startswith(f"left out: {folder}/sums/easy: ") and why in lines[0]


def test_where_no_task_is(run_stage, one_line_error, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line_error(run_stage(HARBOR, "in", empty), "empty: no task.toml below it")
    one_line_error(run_stage(HARBOR, "out", tmp_path / "nowhere.jsonl", empty), "nowhere.jsonl")


# ----------------------------------------------------------------------------------------------------------
# Out, and in again

TURN = {"query": 'Write "α"\n\\ into b.txt.\n', "check": "cmp b.txt /private/expected.txt"}
TURN |= {"solution": "cp /private/expected.txt b.txt"}
ALL = {"query_id": "one", "domain": "research", "subdomain": "s", "source": "ours", "turns": [TURN]}
ALL |= {"workspace": "ws", "private": "hidden", "needs": ["cmp", "network"], "system": "Be brief.\u2028"}
ALL |= {"meta": {"n": 1, "s": '\x7f\'"""', "deep": [None, {"α": 0.5}]}}
# The second turn finds what the agent left in the first one, and no trace of its check
FIRST = {"query": "Say 1.", "check": 'echo checked > left.txt; test "$(cat /answer.md)" = 1'}
FIRST |= {"solution": "echo 1; mkdir -p made; echo a > made/a.txt"}
SECOND = {"query": "Say 2.", "solution": "echo 2"}
FOUND = "cat /answers/1.md /answers/2.md /answer.md made/a.txt | xargs"
SECOND |= {"check": f'test "$({FOUND})" = "1 2 2 a" -a ! -e left.txt'}
TWO = {"query_id": "two.β#1@x", "domain": "vibe_coding", "turns": [FIRST, SECOND]}
CHECKED = {"query_id": "checked", "domain": "vibe_coding", "venv": "env", "turns": [TURN]}
CHECKED |= {"workspace": None, "image": None}
CHECKED |= {"private": "hidden"}
JUDGED = {"query_id": "judged", "domain": "research", "turns": [TURN, {"query": "q", "rubric": ["r"]}]}


@pytest.fixture
def own_tasks(tmp_path):
    """A folder with a task file of ours."""
    folder = tmp_path / "own"
    for name in ("ws/a.txt", "ws/sub/ä ö.bin", "ws/run.sh", "hidden/expected.txt", "hidden/.dot"):
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text(f"α\x00{name}")
    folder.joinpath("ws/run.sh").chmod(0o755)
    folder.joinpath("ws/empty/below").mkdir(parents=True)
    folder.joinpath("ws/link").symlink_to("a.txt")
    folder.joinpath("ws/gone").symlink_to("/nowhere")
    for name in ("attrs-23.1.0", "python_dateutil-2.9.0.post0"):
        folder.joinpath(f"env/lib/python3.11/site-packages/{name}.dist-info").mkdir(parents=True)
    folder.joinpath("env/bin").mkdir()
    folder.joinpath("env/bin/python").symlink_to(sys.executable)
    rows = [json.dumps(row) + "\n" for row in (ALL, TWO, CHECKED, JUDGED)]
    folder.joinpath("tasks.jsonl").write_text("".join(rows))
    return folder


def write_out(run_stage, tasks, folder):
    result = run_stage(HARBOR, "out", tasks, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_ours_out_and_in_again(read_in, run_stage, own_tasks, tmp_path):
    lines = write_out(run_stage, own_tasks / "tasks.jsonl", tmp_path / "out")
    assert lines == [
        f"left out: {own_tasks}/tasks.jsonl:4: judged: turn 2 has no check, a rubric has no place there",
        f"{tmp_path}/out: 3 of 4 tasks",
    ]
    rows, _ = read_in(tmp_path / "out", "again")
    checked = CHECKED | {"private": "checked/private", "venv": str(own_tasks / "env")}
    assert rows == [checked, ALL | {"workspace": "one/workspace", "private": "one/private"}, TWO]
    assert files_below(tmp_path / "again/one/workspace") == files_below(own_tasks / "ws")
    assert files_below(tmp_path / "again/one/private") == files_below(own_tasks / "hidden")
    write_out(run_stage, tmp_path / "again/tasks.jsonl", tmp_path / "out2")
    first, second = files_below(tmp_path / "out"), files_below(tmp_path / "out2")
    for name in ("one/task.toml", "checked/task.toml"):
        assert first.pop(name) != second.pop(name)  # where the folders lie
    assert first == second


def test_a_workspace_that_is_an_archive(run_stage, own_tasks, tmp_path):
    subprocess.run(["tar", "-C", own_tasks / "ws", "-czf", own_tasks / "ws.tgz", "."], check=True)
    own_tasks.joinpath("tasks.jsonl").write_text(json.dumps(ALL | {"workspace": "ws.tgz"}) + "\n")
    write_out(run_stage, own_tasks / "tasks.jsonl", tmp_path / "out")
    assert files_below(tmp_path / "out/one/environment/workspace") == files_below(own_tasks / "ws")


def test_an_archive_that_is_cut_is_named(run_stage, one_line_error, own_tasks, tmp_path):
    own_tasks.joinpath("ws/big.bin").write_bytes(os.urandom(100_000))
    subprocess.run(["tar", "-C", own_tasks / "ws", "-cf", own_tasks / "ws.tar", "."], check=True)
    os.truncate(own_tasks / "ws.tar", 50_000)
    path = own_tasks / "tasks.jsonl"
    path.write_text(json.dumps(ALL | {"workspace": "ws.tar"}) + "\n")
    one_line_error(run_stage(HARBOR, "out", path, tmp_path / "out"), f"{path}:1: unexpected end of data")


def test_what_a_task_of_ours_needs_is_in_its_dockerfile(run_stage, own_tasks, tmp_path):
    write_out(run_stage, own_tasks / "tasks.jsonl", tmp_path / "out")
    files = {name: tmp_path / "out" / name / "environment/Dockerfile" for name in ("one", "checked")}
    assert files["one"].read_text().splitlines() == [
        "FROM python:3.12-bookworm",
        "RUN command -v cmp",
        "WORKDIR /workspace",
        "COPY workspace/ /workspace/",
    ]
    packages = "/opt/venv/bin/pip install --no-deps attrs==23.1.0 python_dateutil==2.9.0.post0"
    assert files["checked"].read_text().splitlines()[:3] == [
        "FROM python:3.11-bookworm",
        f"RUN python3 -m venv /opt/venv && {packages}",
        "ENV PATH=/opt/venv/bin:$PATH",
    ]


@needs_bwrap
def test_harbors_in_out_and_in_again(read_in, run_stage, harbor_task, tmp_path):
    folder = harbor_task(**{"environment/Dockerfile": DOCKERFILE + "COPY data /app/\n"})
    folder.joinpath("sums/easy/environment/data/crlf.txt").write_bytes(b"1\r\n/app/2\r\n")
    folder.joinpath("sums/easy/environment/data/numbers.txt").chmod(0o755)
    folder.joinpath("sums/easy/environment/data/link").symlink_to("numbers.txt")
    first, _ = read_in(folder, "first")
    write_out(run_stage, tmp_path / "first/tasks.jsonl", tmp_path / "out")
    second, _ = read_in(tmp_path / "out", "second")
    assert first == second
    assert tmp_path.joinpath("first/sums-easy/workspace/crlf.txt").read_bytes() == b"1\r\n/workspace/2\r\n"
    assert files_below(tmp_path / "first/sums-easy") == files_below(tmp_path / "second/sums-easy")
    config = tomllib.loads(tmp_path.joinpath("out/sums-easy/task.toml").read_text())
    limits = [config[part]["timeout_sec"] for part in ("agent", "verifier")]
    assert limits == [3600.0, 60.0]


@pytest.mark.parametrize(
    "line, said",
    [
        ({"turns": [TURN]}, "'query_id' is a required property"),
        ({"query_id": "..", "turns": [TURN]}, "query_id names no folder"),
        ({"query_id": "a/../../b", "turns": [TURN]}, "query_id: 'a/../../b' does not match"),
        ({"query_id": "a", "turns": [{"check": "true"}]}, "turns[0]: 'query' is a required property"),
        ({"query_id": "a", "turns": [TURN | {"check": None}]}, "turns[0].check: None is not of type"),
        ({"query_id": "a", "turns": [TURN], "needs": 5}, "needs: 5 is not of type 'array'"),
        ({"query_id": "a", "turns": [TURN], "meta": {"agent_seconds": None}}, "meta.agent_seconds: None"),
    ],
)
def test_a_line_that_is_no_task_is_named(run_stage, one_line_error, tmp_path, line, said):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TWO) + f"\n{json.dumps(line)}\n")
    one_line_error(run_stage(HARBOR, "out", path, tmp_path / "out"), f"{path}:2: no task: ", said)
    shutil.rmtree(tmp_path / "out")
    path.write_text(json.dumps(TWO) + "\n{\n")
    one_line_error(run_stage(HARBOR, "out", path, tmp_path / "out"), f"{path}:2: not valid JSON")


@pytest.mark.parametrize(
    "field, place, said",
    [
        ("venv", "nowhere", "b: venv: {folder}/nowhere does not exist"),
        ("venv", "bare", "venv: {folder}/bare is no Python environment"),
        ("workspace", "nowhere", "b: workspace: {folder}/nowhere does not exist"),
        ("workspace", "tasks.jsonl", "b: workspace: {folder}/tasks.jsonl does not exist, or is no folder"),
        ("private", "tasks.jsonl", "b: private: {folder}/tasks.jsonl does not exist"),
        ("workspace", ".", "holds the folder that it is to be copied into"),
    ],
)
def test_a_folder_that_is_missing_is_named(run_stage, one_line_error, tmp_path, field, place, said):
    path = tmp_path / "tasks.jsonl"
    (tmp_path / "bare/bin").mkdir(parents=True)
    (tmp_path / "bare/bin/python").write_text("")
    path.write_text(json.dumps(TWO) + "\n" + json.dumps(TWO | {"query_id": "b", field: place}) + "\n")
    result = run_stage(HARBOR, "out", path, tmp_path / "out")
    one_line_error(result, f"{path}:2: ", said.format(folder=tmp_path))


def test_nothing_is_mixed_with_what_is_there(run_stage, one_line_error, own_tasks, harbor_task, tmp_path):
    tasks = own_tasks / "tasks.jsonl"
    write_out(run_stage, tasks, tmp_path / "out")
    one_line_error(run_stage(HARBOR, "out", tasks, tmp_path / "out"), "out: is not empty")
    folder = harbor_task()
    one_line_error(run_stage(HARBOR, "in", folder, "--output_dir", tmp_path / "out"), "out: is not empty")


def test_two_tasks_of_one_name(read_in, run_stage, own_tasks, tmp_path):
    write_out(run_stage, own_tasks / "tasks.jsonl", tmp_path / "out/a")
    shutil.copytree(tmp_path / "out/a", tmp_path / "out/b", symlinks=True)
    rows, lines = read_in(tmp_path / "out")
    assert [row["query_id"] for row in rows] == ["checked", "one", TWO["query_id"]]
    assert lines[:3] == [
        f"left out: {tmp_path}/out/b/{name}: another task has the query_id {name}"
        for name in ("checked", "one", TWO["query_id"])
    ]


needs_harbor = pytest.mark.skipif(
    not HARBOR_PYTHON, reason="needs HARBOR_PYTHON=PYTHON of an environment with harbor==0.25.0"
)
LOAD = """
import json, sys
from harbor.models.task.task import Task
task = Task(sys.argv[1])
print(json.dumps([task.instruction, str(task.paths.discovered_test_path), task.config.metadata["limi_task"]]))
"""


@needs_harbor
def test_harbors_own_loader_reads_ours(run_stage, own_tasks, tmp_path):
    write_out(run_stage, own_tasks / "tasks.jsonl", tmp_path / "out")
    result = subprocess.run(
        [HARBOR_PYTHON, "-c", LOAD, tmp_path / "out/one"], capture_output=True, text=True
    )
    instruction, test, row = json.loads(result.stdout)
    assert instruction == f"{ALL['system']}\n\n{TURN['query']}" and json.loads(row) == ALL
    assert test == str(tmp_path / "out/one/tests/test.sh")


@needs_bwrap
@needs_harbor
@pytest.mark.parametrize("agent, reward", [("oracle", 1.0), ("nop", 0.0)])
def test_harbors_own_agents_and_verifier_run_ours(run_stage, own_tasks, tmp_path, agent, reward):
    """All of it but Docker, in whose place bubblewrap stands. A check that bails out gives no reward."""
    turn = {"query": "q", "check": "echo Bail out! no compiler", "solution": "true"}
    bails = {"query_id": "bails", "domain": "research", "turns": [turn]}
    own_tasks.joinpath("tasks.jsonl").open("a").write(json.dumps(bails) + "\n")
    write_out(run_stage, own_tasks / "tasks.jsonl", tmp_path / "out")
    command = [Path(HARBOR_PYTHON).with_name("harbor"), "run", "-p", tmp_path / "out", "-a", agent]
    command += ["--env", "harbor_bubblewrap:Bubblewrap", "-o", tmp_path / "jobs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    subprocess.run(command, env=environment, capture_output=True, timeout=300)
    rewards = {}
    for file in tmp_path.glob("jobs/*/*/result.json"):
        result = json.loads(file.read_text())
        found = result["verifier_result"]
        fault = (result["exception_info"] or {}).get("exception_type")
        rewards[result["task_name"]] = (found["rewards"]["reward"] if found else None, fault)
    expected = dict.fromkeys(("one", "checked", TWO["query_id"]), (reward, None))
    assert rewards == expected | {"bails": (None, "RewardFileNotFoundError")}


# ----------------------------------------------------------------------------------------------------------
# ATIF


def called(id, **arguments):
    return {"id": id, "type": "function", "function": {"name": "read", "arguments": arguments}}


def answered(id, text):
    return {"role": "tool", "tool_call_id": id, "content": text}


def says(text, *calls, **more):
    message = {"role": "assistant", "content": text}
    return message | ({"tool_calls": list(calls)} if calls else {}) | more


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
                called("c0", path="/a", n=1),
                called("c1"),
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
    served[1]["prompt_token_ids"] = 5  # the next one's begin with them
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
    assert atif["steps"][3]["metrics"] == {"prompt_tokens": 5, "completion_token_ids": [1]}
    assert atif["steps"][3]["is_copied_context"] is True and "is_copied_context" not in atif["steps"][5]
    assert atif["agent"]["tool_definitions"] == EPISODE["tools"] and atif["agent"]["model_name"] == "m"
    assert atif["final_metrics"] == {"total_prompt_tokens": 7, "total_completion_tokens": 3}
    assert atif["extra"] == {"meta": EPISODE["meta"], "rounds": EPISODE["rounds"]}


USER = {"role": "user", "content": "Look into both files of the folder."}
BOTH = says("", called("c0", path="ü €"), called("c1", n=[{"b": None}, 2.5]), reasoning_content="both")
RESULTS = [answered("c0", "the first result"), answered("c1", "\u2028\x1b[0m")]
END = says("That is the end of it.")
CONVERSATIONS = {
    "parallel calls": [USER, BOTH, *RESULTS, END],
    "results in another order": [USER, BOTH, *RESULTS[::-1], END],
    "a result is missing": [USER, BOTH, RESULTS[0], END],
    "all results are missing": [USER, BOTH],
    "weight 0 with a call": [USER, says("I look.", called("c0"), weight=0), RESULTS[0], END],
    "bad JSON": [USER, says("", called("c0", invalid_json='{"path": '), weight=0), RESULTS[0], END],
    "reasoning at the end": [USER, says("It is done.", reasoning_content="\n done \n")],
    "rounds": [USER, says("No.", weight=0), USER | {"content": "Try\r\n it. "}, BOTH, *RESULTS, END],
    "an id again": [USER, BOTH, *RESULTS, BOTH, *RESULTS, END],
    "nothing said": [USER, says("", weight=0), USER, END],
}


def test_stage_2_reads_back_what_was_exported(run_stage, tmp_path):
    """The same rows as from the episodes themselves, and the same ones refused."""
    episodes = [EPISODE]
    for name, messages in CONVERSATIONS.items():
        asked = {"role": "system", "content": f"This one is about: {name}."}
        episodes.append(EPISODE | {"query_id": f"a/{name}", "messages": [asked, *messages]})
    assert export(run_stage, tmp_path, *episodes).returncode == 0
    rows = {}
    refused = {}
    for name in ("episodes.jsonl", "atif"):
        out = tmp_path / f"{name}.out.jsonl"
        flags = ["--output_file", out, "--near_duplicate", 2]
        result = run_stage("02_format_trajectories.py", tmp_path / name, *flags)
        assert result.returncode == 0, result.stderr
        found = map(json.loads, out.read_text().splitlines())
        rows[name] = {row["query_id"]: (row["messages"], row["tools"]) for row in found}
        found = map(json.loads, out.with_name(f"{name}.out.rejected.jsonl").read_text().splitlines())
        refused[name] = sorted(row["reasons"] for row in found)
    assert refused["atif"] == [["call_without_result: read"], ["empty_assistant_message"]]
    assert refused["atif"] == refused["episodes.jsonl"]
    assert rows["atif"] == rows["episodes.jsonl"] and len(rows["atif"]) == len(episodes) - 2
    assert rows["atif"]["q.1"] == (EPISODE["messages"], EPISODE["tools"])


@needs_harbor
def test_harbors_own_model_takes_it(run_stage, tmp_path):
    served = [{"prompt_token_ids": ids, "token_ids": [3], "text": "t"} for ids in (2, 5, [1, 2])]
    episodes = [EPISODE | {"served": served}]
    for name, messages in CONVERSATIONS.items():
        episodes.append(EPISODE | {"query_id": name, "messages": messages})
    export(run_stage, tmp_path, *episodes)
    code = "import sys; from harbor.models.trajectories import Trajectory\n"
    code += "for name in sys.argv[1:]: Trajectory.model_validate_json(open(name).read())\n"
    code += "print(len(sys.argv) - 1)"
    command = [HARBOR_PYTHON, "-c", code, *tmp_path.glob("atif/*.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == f"{len(episodes)}\n", result.stderr


def test_a_row_that_is_none_is_named(run_stage, one_line_error, tmp_path):
    stray = EPISODE | {"messages": [{"role": "tool", "tool_call_id": "c9", "content": "x"}]}
    result = export(run_stage, tmp_path, EPISODE, stray)
    one_line_error(result, "episodes.jsonl:2: ", "messages[0].tool_call_id answers no call")
    one_line_error(export(run_stage, tmp_path, {"messages": []}), "episodes.jsonl:1: ", "query_id")
