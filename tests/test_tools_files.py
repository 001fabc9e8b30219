"""recipes/tools: other agents' tool sets, run by 04's tool server in a folder of the test, no sandbox."""

import json
import re
import runpy
import subprocess
import sys
import time

import jsonschema
import pytest
from conftest import ROOT

FILES = sorted(ROOT.glob("recipes/tools/*.py"))


@pytest.fixture
def tools(stage, tmp_path):
    """tools("bash") starts the server with that file in tmp_path: call(name, **arguments) -> output or error."""
    started = []

    def start(name):
        _, program = stage("04_eval").load_tools(str(ROOT / f"recipes/tools/{name}.py"))
        code = f"{program}\nserve({str(tmp_path)!r}, None, TABLE)"
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)

        def call(name, seconds=20, **arguments):
            request = {"id": 1, "name": name, "arguments": arguments, "seconds": seconds}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            return reply["output"] if "output" in reply else f"Error: {reply['error']}"

        return call

    yield start
    for process in started:
        process.stdin.close()
        process.wait(10)


def schemas_of(path):
    return {tool["function"]["name"]: tool["function"] for tool in runpy.run_path(str(path))["TOOLS"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_loads_alone_and_each_schema_is_valid_and_has_its_function(stage, path):
    schemas, _ = stage("04_eval").load_tools(str(path))
    assert schemas.keys() == schemas_of(path).keys()
    for schema in schemas_of(path).values():
        jsonschema.Draft202012Validator.check_schema(schema["parameters"])
        assert schema["parameters"]["required"] == [*dict.fromkeys(schema["parameters"]["required"])]
        assert set(schema["parameters"]["required"]) <= schema["parameters"]["properties"].keys()
        assert schema["description"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_takes_nothing_from_the_server_but_what_the_contract_names(path):
    code = compile(path.read_text(), path, "exec")
    names = set()
    waiting = [code]
    while waiting:
        body = waiting.pop()
        waiting += [part for part in body.co_consts if hasattr(part, "co_names")]
        names |= {
            name
            for name in body.co_names
            if name in ("ROOT", "LONGEST", "clip", "run_command", "CALL", "tell")
        }
    assert names <= {"ROOT", "LONGEST", "clip", "run_command"}


def test_names_and_parameters_are_the_published_ones():
    claude = schemas_of(ROOT / "recipes/tools/claude_code.py")
    assert list(claude["Bash"]["parameters"]["properties"]) == [
        "command",
        "timeout",
        "description",
        "run_in_background",
        "dangerouslyDisableSandbox",
    ]
    assert {"-A", "-B", "-C", "-n", "-i", "multiline"} <= claude["Grep"]["parameters"]["properties"].keys()
    assert claude["Edit"]["parameters"]["required"] == ["file_path", "old_string", "new_string"]
    assert claude["Agent"]["parameters"]["required"] == ["description", "prompt"]
    codex = schemas_of(ROOT / "recipes/tools/codex.py")
    assert list(codex["exec_command"]["parameters"]["properties"]) == [
        "cmd",
        "workdir",
        "shell",
        "login",
        "tty",
        "yield_time_ms",
        "max_output_tokens",
        "sandbox_permissions",
        "justification",
        "prefix_rule",
    ]
    assert codex["apply_patch"]["parameters"]["required"] == ["input"]
    gemini = schemas_of(ROOT / "recipes/tools/gemini_cli.py")
    assert gemini["replace"]["parameters"]["required"] == [
        "file_path",
        "instruction",
        "old_string",
        "new_string",
    ]
    assert list(gemini["read_file"]["parameters"]["properties"]) == ["file_path", "start_line", "end_line"]
    bash = schemas_of(ROOT / "recipes/tools/bash.py")
    assert bash == {
        "bash": {
            "name": "bash",
            "description": "Execute a bash command",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string", "description": "The bash command to execute"}},
                "required": ["command"],
            },
        }
    }


def test_bash_tells_exit_code_and_both_streams(tools):
    call = tools("bash")
    assert call("bash", command="echo out; echo err >&2; exit 3") == (
        "<returncode>3</returncode>\n<output>\nout\nerr\n</output>"
    )
    assert "took too long" in call("bash", command="echo begun; sleep 30", seconds=1)


def test_claude_reads_before_it_writes_and_edits_what_occurs_once(tools, tmp_path):
    call = tools("claude_code")
    file = tmp_path / "a.py"
    file.write_text("one\ntwo\ntwo\n")
    path = str(file)
    assert call("Edit", file_path=path, old_string="one", new_string="1") == (
        "Error: ValueError: File has not been read yet. Read it first before writing to it."
    )
    assert call("Read", file_path=path) == "     1\tone\n     2\ttwo\n     3\ttwo"
    assert call("Read", file_path=path, offset=3, limit=1) == "     3\ttwo"
    assert call("Edit", file_path=path, old_string="one", new_string="1").startswith(
        f"The file {path} has been updated"
    )
    assert "Found 2 matches" in call("Edit", file_path=path, old_string="two", new_string="2")
    call("Edit", file_path=path, old_string="two", new_string="2", replace_all=True)
    assert file.read_text() == "1\n2\n2\n"
    assert "not found in file" in call("Edit", file_path=path, old_string="three", new_string="3")
    assert call("Write", file_path=str(tmp_path / "new/b.txt"), content="x") == (
        f"File created successfully at: {tmp_path}/new/b.txt".replace(" at:", ":")
    )
    assert (tmp_path / "new/b.txt").read_text() == "x"
    two = [{"old_string": "1", "new_string": "a"}, {"old_string": "missing", "new_string": "b"}]
    assert "not found" in call("MultiEdit", file_path=path, edits=two) and file.read_text() == "1\n2\n2\n"


def test_claude_keeps_the_folder_from_command_to_command_but_no_variables(tools, tmp_path):
    call = tools("claude_code")
    (tmp_path / "sub").mkdir()
    assert call("Bash", command="cd sub; X=1") == "(no output)"
    assert call("Bash", command='pwd; echo "[$X]"') == f"{tmp_path}/sub\n[]"
    assert call("Bash", command="echo no >&2; exit 2") == "Error: ValueError: Exit code 2\nno"
    assert call("Bash", command="sleep 5", timeout=200) == "Error: ValueError: Command timed out\n"
    assert call("Bash", command="rm -r ../sub") == "(no output)"  # the folder that it is in
    assert call("Bash", command="pwd") == str(tmp_path)


def test_claude_runs_a_command_in_the_background_reads_and_stops_it(tools):
    call = tools("claude_code")
    told = call("Bash", command="echo first; sleep 60; echo never", run_in_background=True)
    assert told == "Command running in background with ID: bash_1"
    for _ in range(100):
        seen = call("TaskOutput", task_id="bash_1", block=False, timeout=0)
        if "first" in seen:
            break
        time.sleep(0.05)
    assert seen == "<status>running</status>\n<output>\nfirst\n\n</output>"
    assert call("TaskStop", task_id="bash_1") == "Successfully stopped task: bash_1"
    assert "<status>completed</status>" in call("TaskOutput", task_id="bash_1", timeout=5000)
    assert call("TaskStop", task_id="bash_9") == "Error: ValueError: No task found with ID: bash_9"


def test_claude_finds_files_and_lines(tools, tmp_path):
    call = tools("claude_code")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("import os\nprint(1)\nprint(2)\n")
    (tmp_path / "src/b.js").write_text("print(3)\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/c.py").write_text("print(4)\n")
    assert call("Glob", pattern="**/*.py") == f"{tmp_path}/src/a.py"
    assert call("Glob", pattern="*.py") == "No files found"
    assert call("Grep", pattern=r"print\(\d\)", glob="*.js") == f"{tmp_path}/src/b.js"
    assert call("Grep", pattern="print", type="py", output_mode="count") == f"{tmp_path}/src/a.py:2"
    options = {"-B": 1, "head_limit": 2}
    assert call("Grep", pattern=r"PRINT\(1", output_mode="content", **options, **{"-i": True}) == (
        f"{tmp_path}/src/a.py-1-import os\n{tmp_path}/src/a.py:2:print(1)"
    )
    assert call("Grep", pattern="nowhere") == "No matches found"
    assert call("Grep", pattern="(").startswith("Error: ")


def test_claude_changes_a_notebook(tools, tmp_path):
    call = tools("claude_code")
    path = tmp_path / "n.ipynb"
    path.write_text(
        json.dumps({"cells": [{"id": "a1", "cell_type": "code", "source": "1", "metadata": {}}]})
    )
    call("NotebookEdit", notebook_path=str(path), new_source="2", cell_id="a1")
    call(
        "NotebookEdit", notebook_path=str(path), new_source="# T", cell_type="markdown", edit_mode="insert"
    )
    cells = json.loads(path.read_text())["cells"]
    assert [(cell["cell_type"], cell["source"]) for cell in cells] == [("markdown", "# T"), ("code", "2")]
    assert "Cell not found: zz" in call(
        "NotebookEdit", notebook_path=str(path), new_source="", cell_id="zz"
    )


PATCH = """*** Begin Patch
*** Add File: new.txt
+hello
*** Update File: old.py
@@ def second():
-    return 1
+    return 2
*** Update File: moved.txt
*** Move to: deep/there.txt
@@
 keep
-gone
*** Delete File: dead.txt
*** End Patch"""


def test_codex_applies_a_patch_whole_or_not_at_all(tools, tmp_path):
    call = tools("codex")
    (tmp_path / "old.py").write_text("def first():\n    return 1\n\ndef second():\n    return 1\n")
    (tmp_path / "moved.txt").write_text("keep\ngone\n")
    (tmp_path / "dead.txt").write_text("x")
    assert call("apply_patch", input=PATCH) == (
        "Success. Updated the following files:\nA new.txt\nM old.py\nM moved.txt\nD dead.txt"
    )
    assert (tmp_path / "new.txt").read_text() == "hello\n"
    assert (
        tmp_path / "old.py"
    ).read_text() == "def first():\n    return 1\n\ndef second():\n    return 2\n"
    assert (tmp_path / "deep/there.txt").read_text() == "keep\n"
    assert not (tmp_path / "moved.txt").exists() and not (tmp_path / "dead.txt").exists()
    wrong = "*** Begin Patch\n*** Add File: other.txt\n+x\n"
    wrong += "*** Update File: old.py\n@@\n-nowhere\n+y\n*** End Patch"
    assert call("apply_patch", input=wrong) == (
        "Error: ValueError: Failed to find expected lines in old.py:\nnowhere"
    )
    assert not (tmp_path / "other.txt").exists()
    assert "it must start with *** Begin Patch" in call("apply_patch", input="--- a\n+++ b\n")


def test_codex_gives_a_session_back_while_a_command_still_runs(tools):
    call = tools("codex")
    done = call("exec_command", cmd="echo hi; exit 4")
    assert re.fullmatch(r"Wall time: [\d.]+ seconds\nProcess exited with code 4\nOutput:\nhi\n", done)
    open_one = call("exec_command", cmd="read line; echo got $line", yield_time_ms=50)
    number = int(re.search(r"Process running with session ID (\d+)", open_one)[1])
    answer = call("write_stdin", session_id=number, chars="word\n", yield_time_ms=5000)
    assert "Process exited with code 0\nOutput:\ngot word" in answer
    assert call("write_stdin", session_id=7) == "Error: ValueError: Unknown session 7"
    assert re.fullmatch(
        r"Exit code: 0\nWall time: [\d.]+ seconds\nOutput:\na b", call("shell", command=["echo", "a b"])
    )
    assert "Exit code: 124" in call("shell_command", command="sleep 5", timeout_ms=200)
    assert call("update_plan", plan=[{"step": "a", "status": "pending"}]) == "Plan updated"


def test_gemini_reads_writes_replaces_and_searches(tools, tmp_path):
    call = tools("gemini_cli")
    assert call("write_file", file_path="d/a.txt", content="one\ntwo\nTwo\n") == (
        "Successfully created and wrote to new file: d/a.txt."
    )
    assert call("read_file", file_path="d/a.txt") == "one\ntwo\nTwo\n"
    assert call("read_file", file_path="d/a.txt", start_line=2, end_line=2) == (
        "[Lines 2-2 of 3; use start_line and end_line]\ntwo\n"
    )
    change = {"file_path": "d/a.txt", "instruction": "number it", "old_string": "one", "new_string": "1"}
    assert call("replace", **change) == "Successfully modified file: d/a.txt (1 replacement)."
    assert "0 occurrences found" in call("replace", **change)
    assert (
        call("grep_search", pattern="two") == "Found 2 match(es) for 'two'\nFile: d/a.txt\nL2: two\nL3: Two"
    )
    found = call("grep_search", pattern="two", case_sensitive=True, before=1)
    assert found == "Found 1 match(es) for 'two'\nFile: d/a.txt\nL1- 1\nL2: two"
    assert call("glob", pattern="**/*.TXT") == f"Found 1 file(s) matching '**/*.TXT'\n{tmp_path}/d/a.txt"
    assert call("list_directory", dir_path=".") == "Directory listing for .:\n[DIR] d"
    assert call("run_shell_command", command="echo hi; exit 1") == "Output: hi\nExit Code: 1"
    assert call("write_todos", todos=[{"description": "x", "status": "pending"}]).endswith("1. [pending] x")


@pytest.mark.parametrize(
    "file, name, arguments",
    [
        ("claude_code", "WebSearch", {"query": "x"}),
        ("claude_code", "Agent", {"description": "d", "prompt": "p"}),
        ("claude_code", "AskUserQuestion", {"questions": []}),
        ("codex", "request_user_input", {"questions": []}),
        ("codex", "view_image", {"path": "a.png"}),
        ("gemini_cli", "web_fetch", {"prompt": "x"}),
        ("gemini_cli", "invoke_agent", {"agent_name": "a", "prompt": "p"}),
    ],
)
def test_what_needs_a_network_a_person_or_another_agent_says_so_in_one_line(tools, file, name, arguments):
    answer = tools(file)(name, **arguments)
    assert answer.startswith("Error: ValueError: ") and "\n" not in answer
