"""Stage 1 on the demo's history, on small histories made here, and against a scripted endpoint."""
import importlib
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

stage = importlib.import_module("01_build_queries")
ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "demo"
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="verify needs bubblewrap")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)


def command(*args):
    return [sys.executable, str(ROOT / "01_build_queries.py"), *map(str, args)]


def run(*args):
    """What the stage prints with these flags, in this process, as starting one takes a second; raises InputError."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", command(*args)[1:]), contextlib.redirect_stdout(output):
        try:
            stage.main(*stage.parse_settings(stage.TrlParser(stage.Settings)))
        except SystemExit as end:
            assert not end.code
    return output.getvalue()


def refused(*args):
    """The message to a user whose flags or files are wrong."""
    with pytest.raises(stage.InputError) as error:
        run(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_mistake_is_told_in_one_line(tmp_path):
    (tmp_path / "answers").mkdir()
    for flags in (("--repos", tmp_path / "nowhere"), ("--real", tmp_path / "nowhere"), ("--reel", "x"), ()):
        done = subprocess.run(command(*flags, "--output_file", tmp_path / "out" / "queries.jsonl"),
                              capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("01_build_queries.py: ")
    assert not list(tmp_path.rglob("*.jsonl"))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def git(folder, *args, stdin=None):
    identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
                for what, value in (("NAME", "Ada"), ("EMAIL", "ada@example.invalid"))}
    return subprocess.run(["git", "-C", str(folder), *args], check=True, capture_output=True, text=True, stdin=stdin,
                          env=os.environ | identity | {"GIT_CONFIG_GLOBAL": os.devnull}).stdout


@pytest.fixture
def demo_clone(tmp_path):
    clone = tmp_path / "pr_repo.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(clone)], check=True)
    with open(DEMO / "pr_repo.fastexport") as file:
        git(clone, "fast-import", "--quiet", stdin=file)
    return clone


@pytest.fixture
def small_repo(tmp_path):
    """A repository with a licence, one module and its test; commit(files, message) adds to it."""
    repo = tmp_path / "small"
    repo.mkdir()
    git(repo, "init", "-q", "-b", "main")

    def commit(files, message):
        for name, text in files.items():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            (repo / name).write_text(text)
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", message)

    licence = "MIT\nPermission is hereby granted, free\nof charge"
    commit({"LICENSE": licence, "a.py": "x = 1\n", "test_a.py": "import a\n"}, "start")
    return repo, commit


# ---- the demo's history, end to end ----

DEMO_FLAGS = ("--model", "demo-writer", "--answers", DEMO / "answers.jsonl",
              "--test_command", "python3 -m unittest -q")


@needs_bwrap
def test_demo_selects_two_pull_requests_and_says_why_not_the_others(demo_clone, tmp_path):
    output = tmp_path / "data" / "queries.jsonl"
    run("--repos", demo_clone, "--output_file", output, *DEMO_FLAGS)
    assert {task["query_id"] for task in rows_of(output)} == {"pr_repo-3", "pr_repo-5"}
    reasons = {row["meta"]["number"]: row["reasons"] for row in rows_of(tmp_path / "data" / "rejected_queries.jsonl")}
    assert reasons == {
        1: ["code file added, deleted or renamed"], 2: ["no code file changed"], 4: ["made by a bot"],
        6: ["reverted later"], 7: ["a revert"], 8: ["only comments, docstrings or layout changed"],
        9: ["more than one code file changed"], 10: ["its tests pass without the change too"],
        11: ["the number of an issue: no such refs/pull"]}
    again = run("--repos", demo_clone, "--output_file", output, *DEMO_FLAGS)
    assert "0 answers asked for, 2 replayed" in again
    assert len(rows_of(tmp_path / "data" / "queries.work" / "verifications.jsonl")) == 3  # none verified twice


@needs_bwrap
def test_check_fails_before_and_passes_after_the_change_and_leaves_nothing_behind(demo_clone, tmp_path):
    output = tmp_path / "data" / "queries.jsonl"
    run("--repos", demo_clone, "--output_file", output, *DEMO_FLAGS)
    for task in rows_of(output):
        workspace = tmp_path / task["query_id"]
        with tarfile.open(output.parent / task["workspace"]) as tar:
            tar.extractall(workspace, filter="data")
        files = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
        assert not (workspace / ".git").exists()
        [turn], check = task["turns"], ["bash", "-c", task["turns"][0]["check"]]
        hidden = {"pr_repo-3": b"test_several_units", "pr_repo-5": b"test_own_marker"}[task["query_id"]]
        assert not any(hidden in text for text in files.values())
        assert subprocess.run(check, cwd=workspace, capture_output=True).returncode == 1
        assert {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()} == files
        patch = tmp_path / "patch"
        patch.write_text(task["meta"]["code_diff"])
        git(workspace, "apply", str(patch))
        assert subprocess.run(check, cwd=workspace, capture_output=True).returncode == 0
        assert set(task["meta"]["pass_to_pass"]) and set(task["meta"]["fail_to_pass"]) and turn["rubric"]


def test_mined_diff_equals_the_diff_of_the_pull_requests_own_branch(demo_clone):
    pulls = list(stage.pull_requests(str(demo_clone)))
    assert [(pull["number"], pull["shape"]) for pull in pulls] == [
        (11, "squash"), (10, "merge commit"), (9, "squash"), (8, "merge commit"), (7, "squash"), (6, "squash"),
        (5, "squash"), (4, "merge commit"), (3, "two parents"), (2, "squash"), (1, "merge commit")]
    assert pulls[8]["title"] == "Parse durations of several units"
    assert pulls[1]["title"] == "Compile the slug pattern once"
    for pull in pulls[1:]:
        own = git(demo_clone, "diff", "--full-index", f"{pull['base']}...refs/pull/{pull['number']}/head")
        assert "".join(pull["files"].values()).strip() == own.strip()


def test_the_users_git_settings_change_nothing(demo_clone, monkeypatch, tmp_path):
    plain = list(stage.pull_requests(str(demo_clone)))
    (tmp_path / ".gitconfig").write_text("[diff]\nsuppressBlankEmpty = true\nmnemonicPrefix = true\n"
                                         "interHunkContext = 9\n[core]\nabbrev = 4\n[log]\nshowSignature = true\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert list(stage.pull_requests(str(demo_clone))) == plain


# ---- mine ----

@pytest.mark.parametrize("files, message, reason", [
    ({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", None),
    ({"a.py": '"""Doc."""\nx = 1  # one\n', "test_a.py": "# 2\n"}, "Say (#7)",
     "only comments, docstrings or layout changed"),
    ({"a.py": "x = (\n", "test_a.py": "# 2\n"}, "Two (#7)", "code file is not Python 3"),
    ({"a.py": "x = 2\n" * 2000, "test_a.py": "# 2\n"}, "Two (#7)", "diff longer than 2000 tokens"),
    ({"b.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", "code file added, deleted or renamed"),
    ({"vendor/a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", "no code file changed"),
    ({"a.py": "x = 2\n"}, "Two (#7)", "no test file changed"),
    ({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Revert two (#7)", "a revert"),
])
def test_reasons_of_the_default_rule(small_repo, files, message, reason):
    repo, commit = small_repo
    commit(files, message)
    [row] = stage.mine(stage.Settings(repos=[str(repo)]), None, [])
    assert row["query_id"] == "small-7" and row["reasons"] == ([reason] if reason else [])


def test_the_licence_at_the_base_decides(small_repo):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 1\n", "LICENSE": "All rights reserved"}, "One (#1)")
    commit({"a.py": "x = 3\n", "test_a.py": "# 2\n"}, "Two (#2)")
    rows = stage.mine(stage.Settings(repos=[str(repo)]), None, [])
    assert [row["reasons"] for row in rows] == [["no permissive licence file at the base commit"], []]
    assert rows[1]["meta"]["licence"] == "MIT"


def test_what_was_reverted_later_is_left_out(small_repo):
    repo, commit = small_repo
    for number in (1, 2, 3):
        commit({"a.py": f"x = {number + 1}\n", "test_a.py": f"# {number}\n"}, f"Change {number} (#{number})")
    commit({"a.py": "x = 3\n", "test_a.py": "# 4\n"}, 'Revert "Change 3 (#3)" (#4)')
    commit({"a.py": "x = 1\n", "test_a.py": "# 5\n"}, "Revert the first (#5)\n\nThis reverts #1.")
    rows = stage.mine(stage.Settings(repos=[str(repo)]), None, [])
    assert [row["reasons"] for row in rows] == [["a revert"], ["a revert"], ["reverted later"], [], ["reverted later"]]


def test_rule_of_the_paper(small_repo):
    repo, commit = small_repo
    commit({"notes.md": "hello\n"}, "Notes (#1)")
    commit({"a.py": "x = 2\n", "b.py": "y = 1\n"}, "Code (#2)")
    commit({"a.py": "x = 3\n" * 1000}, "Long (#3)")
    rows = stage.mine(stage.Settings(repos=[str(repo)], rule="paper"), None, [])
    assert [row["reasons"] for row in rows] == [["not under 1,200 tokens"], [], ["only markdown"]]
    assert rows[1]["pr"]["code"] == ["a.py", "b.py"]


def test_newest_of_each_repository_first(small_repo, demo_clone):
    repo, commit = small_repo
    for number in range(1, 4):
        commit({"a.py": f"x = {number + 5}\n", "test_a.py": f"# {number}\n"}, f"Change (#{number})")
    rows = stage.mine(stage.Settings(repos=[str(repo), str(demo_clone)], max_candidates=3), None, [])
    assert [row["query_id"] for row in rows if not row["reasons"]] == ["small-3", "small-2", "pr_repo-10"]


def test_bad_repositories(tmp_path, small_repo, demo_clone):
    repo, commit = small_repo
    flags = "--output_file", tmp_path / "out" / "queries.jsonl", "--repos"
    (repo / "folder").mkdir()
    assert "not a git repository" in refused(*flags, repo / "folder")  # nor is the repository around it meant
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{demo_clone}", "shallow")
    assert "fetch --unshallow" in refused(*flags, tmp_path / "shallow")
    git(tmp_path, "init", "-q", "empty")
    assert "empty: git log" in refused(*flags, tmp_path / "empty")
    assert "both called pr_repo" in refused(*flags, demo_clone, demo_clone)
    assert "nothing to read" in refused()
    assert "must be 1 or more" in refused(*flags, demo_clone, "--concurrency", 0)
    assert "must end in .png" in refused(*flags, demo_clone, "--figure", "pool.xyz")
    commit({"a.py": "x = 2\n"}, "No tests (#1)")
    assert "no query is left" in refused(*flags, repo)
    assert not (tmp_path / "out" / "queries.jsonl").exists()
    assert rows_of(tmp_path / "out" / "rejected_queries.jsonl")[0]["reasons"] == ["no test file changed"]


def test_a_url_is_mirrored_once(demo_clone, tmp_path, capsys):
    settings = stage.Settings(repos=[f"file://{demo_clone}"])
    assert len(stage.mine(settings, tmp_path, [])) == len(stage.mine(settings, tmp_path, [])) == 11
    assert capsys.readouterr().out.count("cloning") == 1
    with pytest.raises(stage.InputError, match="cannot be cloned"):
        stage.mine(stage.Settings(repos=[f"file://{tmp_path}/nowhere"]), tmp_path, [])


def test_repository_of_a_benchmark_is_refused(demo_clone, tmp_path):
    flags = "--repos", demo_clone, "--output_file", tmp_path / "queries.jsonl", "--step", "mine"
    assert "pr_repo is part of a benchmark" in refused(*flags, "--deny", "other", "pr_repo")
    assert "11 pull requests" in run(*flags, "--deny", "other")


# ---- verify ----

@needs_bwrap
def test_sandbox_has_no_network_no_files_of_the_host_and_a_time_limit(tmp_path):
    (tmp_path / "secret").write_text("")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    assert stage.sandbox(str(workspace), f"ls {tmp_path}", 10)[0] != 0
    assert stage.sandbox(str(workspace), "touch /usr/x", 10)[0] != 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"]).returncode == 0
        assert stage.sandbox(str(workspace), f"exec 3<>/dev/tcp/127.0.0.1/{port}", 10)[0] != 0
    assert stage.sandbox(str(workspace), "env; touch made; pwd", 10)[1].count("OPENAI") == 0
    assert (workspace / "made").exists()
    assert stage.sandbox(str(workspace), "sleep 30", 1) is None


UNIT = "import unittest, a\nclass T(unittest.TestCase):\n    def test_old(self):\n        self.assertTrue(a.x)\n"


@needs_bwrap
@pytest.mark.parametrize("test, reason", [
    (UNIT + "    def test_new(self):\n        self.assertEqual(a.x, 2)\n", None),
    (UNIT + "    def test_new(self):\n        self.assertGreater(a.x, 0)\n", "its tests pass without the change too"),
    (UNIT + "    def test_new(self):\n        self.assertEqual(a.x, 3)\n", "its tests fail with the change too"),
    (UNIT.replace("a.x", "a.x == 2"), "no test passes both before and after"),
    ("import no_such_module\n", "its tests need the module no_such_module"),
    ("import time\ntime.sleep(60)\n", "its tests run longer than 2 s"),
])
def test_verify(small_repo, tmp_path, test, reason):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": test}, "Two (#7)")
    settings = stage.Settings(repos=[str(repo)], test_command="python3 -m unittest -q",
                              timeout=2 if "sleep" in test else 60)
    work = tmp_path / "work"
    work.mkdir()
    [row] = stage.verify(settings, work, stage.mine(settings, work, []))
    assert row["reasons"] == ([reason] if reason else [])
    if not reason:
        assert row["meta"]["fail_to_pass"] == ["test_new (test_a.T.test_new)"]
        assert row["meta"]["pass_to_pass"] == ["test_old (test_a.T.test_old)"]


def test_outcomes_of_both_runners():
    assert stage.outcomes("PASSED t.py::a[x]\nFAILED t.py::b - assert 1\nERROR t.py::c\n1 passed") == {
        "t.py::a[x]": True, "t.py::b": False, "t.py::c": False}
    assert stage.outcomes("test_a (t.T.test_a) ... ok\ntest_b (t.T.test_b)\nDoc ... FAIL\n") == {
        "test_a (t.T.test_a)": True}


# ---- write ----

DRAFT = {"reason": "r", "answerable": True, "query": "q", "interfaces": [], "rubric": ["works"],
         "subdomain": "backend", "difficulty": "medium"}


@pytest.fixture
def endpoint():
    """A server whose script(number of the call) gives (status, body, share of it to send); given: what it served."""
    given = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.calls += 1
            status, body, share = server.script(server.calls)
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: int(len(data) * share)])
            if status == 200 and share == 1:
                given.append(request["messages"][1]["content"] if "messages" in request else request["variables"])
            self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.given, server.url = 0, given, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def completion(content, finish_reason="stop"):
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


def candidates(folder, n):
    """n pull requests ready to be written, as verify leaves them."""
    pr = dict.fromkeys(("clone", "tests", "messages", "code_diff", "test_diff"), "") | {"code": [], "run": ["t.py"]}
    rows = [{"query_id": f"r-{i}", "source": "pull_request", "turns": [], "reasons": [],
             "meta": {"repo": "r", "title": f"title {i}", "base": "b", "commit": "c"}, "pr": pr} for i in range(n)]
    stage.write_jsonl(folder / "queries.work" / "2_verify.jsonl", rows)
    return "--step", "write", "--repos", "r", "--output_file", folder / "queries.jsonl"


def test_killed_and_failing_run_pays_every_answer_once(endpoint, tmp_path):
    def script(call):
        time.sleep(0.02)
        return (500, "busy", 1) if call % 5 == 0 else (200, completion(json.dumps(DRAFT)), 1)

    endpoint.script, answers = script, tmp_path / "queries.work" / "answers.jsonl"
    flags = [*map(str, candidates(tmp_path, 20)), "--base_url", endpoint.url, "--concurrency", "1"]
    process = subprocess.Popen(command(*flags), stderr=subprocess.DEVNULL)
    while not answers.exists() or len(answers.read_bytes().splitlines()) < 8:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(answers, "a") as file:
        file.write('{"key": "cut by the ki')
    before = len(set(endpoint.given))
    assert "replayed" in run(*flags)
    assert len({row["key"] for row in rows_of(answers)}) == len(rows_of(answers)) == 20
    assert len(endpoint.given) - len(set(endpoint.given)) <= 1  # only the call that was under way at the kill
    assert 8 <= before < 20
    calls = len(endpoint.given)
    assert "0 answers asked for, 20 replayed" in run(*flags) and len(endpoint.given) == calls


@pytest.mark.parametrize("script, message", [
    (lambda call: (200, "<html>hello</html>", 1), "not a chat completion but '<html>hello</html>'"),
    (lambda call: (200, {"error": "no"}, 1), "not a chat completion"),
    (lambda call: (500, "down", 1), "InternalServerError"),
    (lambda call: (401, {"error": {"message": "bad key"}}, 1), "AuthenticationError"),
    (lambda call: (200, completion("x" * 1000), 0.5), "APIConnectionError"),
])
def test_endpoint_that_gives_no_answer(endpoint, tmp_path, script, message):
    endpoint.script = lambda call: (200, completion("{}"), 1) if call == 1 else script(call)
    flags = candidates(tmp_path, 3)
    line = refused(*flags, "--base_url", endpoint.url, "--max_retries", 0, "--concurrency", 1)
    assert message in line and "1 of 3 answers are stored, run again" in line
    assert endpoint.calls == 2  # none starts after a failure
    assert len(rows_of(tmp_path / "queries.work" / "answers.jsonl")) == 1


def test_dry_run_shows_the_prompt_and_calls_nobody(tmp_path):
    output = run(*candidates(tmp_path, 2), "--dry_run")
    assert "Title: title 0" in output and "calls: 2\n" in output
    assert not (tmp_path / "queries.work" / "answers.jsonl").exists()


def test_max_usd_stops_and_a_second_run_counts_what_was_spent(endpoint, tmp_path):
    endpoint.script = lambda call: (200, completion(json.dumps(DRAFT)), 1)  # 10 tokens in and 5 out: $20 each
    flags = (*candidates(tmp_path, 9), "--base_url", endpoint.url, "--concurrency", 1, "--max_usd", 50)
    assert "needs the prices" in refused(*flags)
    flags += "--price_in", 1e6, "--price_out", 2e6
    assert "$60.00 spent, --max_usd is 50.0; 3 of 9" in refused(*flags)
    assert "$60.00 spent" in refused(*flags) and len(endpoint.given) == 3


def test_github_text_is_fetched_once_and_waits_for_the_rate_limit(endpoint, tmp_path, monkeypatch):
    issues = {"nodes": [{"title": "Broken", "body": "It breaks."}]}
    pull = {"body": "the description", "closingIssuesReferences": issues}
    found = {"data": {"repository": {"pullRequest": pull}}}
    none = {"data": {"repository": {"pullRequest": None}}, "errors": [{"type": "NOT_FOUND"}]}
    endpoint.script = lambda call: [(429, "slow down", 1), (200, found, 1), (200, none, 1)][call - 1]
    waits = []
    monkeypatch.setattr(stage, "patience", lambda headers: 7)
    monkeypatch.setattr(stage.time, "sleep", waits.append)
    monkeypatch.setenv("GITHUB_GRAPHQL_URL", endpoint.url)
    monkeypatch.setenv("GITHUB_TOKEN", "t")
    for _ in range(2):
        rows = [{"query_id": f"o__r-{n}", "meta": {"repo": "o/r", "number": n}, "pr": {"messages": "commit"},
                 "reasons": []} for n in (1, 2)]
        assert stage.describe(rows, tmp_path / "github.jsonl") == rows[:1]
        assert rows[0]["pr"]["messages"] == "commit\n\nthe description\n\nIssue: Broken\nIt breaks."
        assert rows[1]["reasons"] == ["GitHub knows no such pull request"]
    assert waits == [7] and [one["number"] for one in endpoint.given] == [1, 2]


def test_github_refusals(endpoint, tmp_path, monkeypatch):
    rows = [{"query_id": "o__r-1", "meta": {"repo": "o/r", "number": 1}, "pr": {"messages": "commit"}, "reasons": []}]
    with pytest.raises(stage.InputError, match="GITHUB_TOKEN"):
        stage.describe(rows, tmp_path / "github.jsonl")
    monkeypatch.setenv("GITHUB_GRAPHQL_URL", endpoint.url)
    monkeypatch.setenv("GITHUB_TOKEN", "t")
    endpoint.script = lambda call: (401, {"message": "Bad credentials"}, 1)
    with pytest.raises(stage.InputError, match="401.*Bad credentials"):
        stage.describe(rows, tmp_path / "github.jsonl")


def test_github_limits():
    assert stage.patience({"retry-after": "30"}) == 30
    assert 90 < stage.patience({"x-ratelimit-reset": str(time.time() + 100)}) <= 100
    assert stage.patience({}) == 0  # a bad token is not waited for


def test_no_endpoint_and_no_key(tmp_path):
    line = refused(*candidates(tmp_path, 2))
    assert "2 of 2 answers of gpt-5 are missing" in line and "OPENAI_API_KEY" in line


@pytest.mark.parametrize("content, reasons", [
    (json.dumps(DRAFT), []),
    ("```json\n" + json.dumps(DRAFT) + "\n```", []),
    (json.dumps(DRAFT | {"answerable": False}), ["not answerable, says the model"]),
    (json.dumps(DRAFT)[:40], ["the answer (length) does not have the form asked for"]),
    ("I cannot help with that.", ["the answer (length) does not have the form asked for"]),
    (json.dumps(DRAFT | {"subdomain": "magic"}), ["the answer (length) does not have the form asked for"]),
    (json.dumps(DRAFT | {"more": 1}), ["the answer (length) does not have the form asked for"]),
])
def test_answers_that_were_paid_but_are_no_draft(content, reasons):
    pr = {"run": ["test_a.py"], "tests": "", "code_diff": ""}
    row = {"answer": {"content": content, "finish_reason": "length", "usage": {}, "model": "m"}, "meta": {}, "pr": pr}
    assert stage.read_draft(row, "pytest") == reasons


# ---- check ----

CODE_DIFF = """diff --git a/a.py b/a.py
--- a/a.py
+++ b/a.py
@@ -1,2 +1,3 @@
 def load(path):
-    return old_reader(path)
+    raw_text = fast_reader(path, old_reader, public_name)
+    return [line.split("=", 1) for line in raw_text if line and not line.startswith("#")]
"""


@pytest.mark.parametrize("query, reasons", [
    ("load gives wrong pairs because old_reader is slow", []),
    ("load should call fast_reader", ["leaks a new name of the solution: fast_reader"]),
    ("keep the raw_text of it, as public_name does", ["leaks a new name of the solution: raw_text"]),
    ("Please return line split 1 for line in raw text", []),
    ("use line split 1 for line in raw_text if line",
     ["leaks a new name of the solution: raw_text",
      'repeats a line of the solution: return [line.split("=", 1) for line in raw_text if line and not '
      'line.startswith("#")]']),
])
def test_leaks(query, reasons):
    pr = {"code_diff": CODE_DIFF, "test_diff": "+    public_name(1)\n"}
    assert list(stage.leaks(query, "def load(path):\n    return old_reader(path)\n", pr)) == reasons


def test_hidden_messages(small_repo):
    repo, commit = small_repo
    commit({"b.py": "TEXT = 'no such file here'\n"}, "text")
    pr = {"clone": str(repo), "test_diff": '+    with pytest.raises(ValueError, match="too many open files"):\n'
                                           '+    assert str(e) == "no such file here"\n+    assert f("a b c") == 1\n'}
    assert list(stage.hidden("load fails", pr, "HEAD")) == [
        "the tests ask for a text it does not give: too many open files"]
    assert list(stage.hidden("load fails", pr, "HEAD^")) == [
        "the tests ask for a text it does not give: too many open files",
        "the tests ask for a text it does not give: no such file here"]
    assert list(stage.hidden('it says "too many open files"', pr, "HEAD")) == []


def test_text_rules_on_whole_tasks(small_repo, tmp_path):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    settings = stage.Settings(repos=[str(repo)])
    [row] = stage.mine(settings, tmp_path, [])
    query = "See https://x.org and #12, commit deadbee1; run pytest on shot.png"
    draft = DRAFT | {"query": query, "interfaces": ["new_name(x)"]}
    row["answer"] = {"content": json.dumps(draft), "finish_reason": "stop", "usage": {}, "model": "m", "key": "0"}
    stage.check(settings, tmp_path, [row])
    assert row["reasons"] == [f"mentions {what}" for what in (
        "a link", "an issue's number", "a commit", "an image", "the tests")] + ["shorter than 40 words"]
    assert row["turns"][0]["query"].endswith("\n\nNames to keep to: `new_name(x)`")


def test_notes_of_the_released_pipeline():
    for key, may in (("3", ""), ("4", "NOT ")):
        answer = {"content": json.dumps(DRAFT), "finish_reason": "stop", "usage": {}, "model": "m", "key": key}
        row = {"answer": answer, "meta": {}, "pr": {"run": [], "code": ["a.py"], "code_diff": ""}}
        stage.read_draft(row, "", suffixes=True)
        assert row["turns"][0]["query"] == ("q\n\nYou only need to modify a.py to complete the task. "
                                            f"You are {may}allowed to install any necessary environments.")


def test_benchmark_overlap_and_near_duplicates(shared, tmp_path):
    [file] = (shared / "agencybench" / "AgencyBench-v1" / "task3").glob("*.json")
    prompt = json.loads(file.read_text())["query"]
    real = tmp_path / "real.jsonl"
    texts = {"copied": prompt[200:600], "own": "Sort my photos by the day they were taken and name each folder",
             "again": "Sort my photos by the day they were taken and name every folder",
             "mail": "Write to ada@mail.org"}
    real.write_text("".join(json.dumps({"query_id": query_id, "domain": "vibe_coding", "turns": [
        {"query": text, "rubric": ["done"]}]}) + "\n" for query_id, text in texts.items()))
    flags = "--real", real, "--output_file", tmp_path / "queries.jsonl", "--benchmark"
    run(*flags, shared / "agencybench")
    assert {row["query_id"]: row["reasons"] for row in rows_of(tmp_path / "rejected_queries.jsonl")} == {
        "copied": ["shares 13 words in a row with a benchmark"], "mail": ["a secret or an e-mail address"],
        "again": ["nearly the same as another: own"]}
    assert "no such file" in refused(*flags, tmp_path / "nowhere")


# ---- real-world queries ----

REAL = """---
query_id: fit-1
domain: research
licence: CC0-1.0
workspace: data
check: test -f out.txt
---
Fit the curve in data.csv and write the slope to out.txt.
"""


def real_folder(tmp_path, **texts):
    folder = tmp_path / "real"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "data.csv").write_text("1,2\n")
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return folder


def test_real_queries_alone(tmp_path):
    turns = "---\nquery_id: two\ndomain: vibe_coding\nturns:\n- query: Draw a board\n  rubric: [a board shows]\n" \
            "- query: Let two people play\n  check: ./play\n---\n"
    folder, output = real_folder(tmp_path, one=REAL, two=turns), tmp_path / "out" / "queries.jsonl"
    assert "--n_real 60, but only 2 can be had" in run("--real", folder, "--output_file", output)
    assert rows_of(output) == [
        {"query_id": "fit-1", "domain": "research", "subdomain": "", "source": "real", "workspace": "workspaces/fit-1",
         "turns": [{"query": "Fit the curve in data.csv and write the slope to out.txt.", "check": "test -f out.txt"}],
         "meta": {"licence": "CC0-1.0"}},
        {"query_id": "two", "domain": "vibe_coding", "subdomain": "", "source": "real", "meta": {},
         "turns": [{"query": "Draw a board", "rubric": ["a board shows"]},
                   {"query": "Let two people play", "check": "./play"}]}]
    assert (output.parent / "workspaces" / "fit-1" / "data.csv").read_text() == "1,2\n"
    shutil.copy(output, folder / "again.jsonl")  # what was written can be read back
    shutil.copytree(output.parent / "workspaces", folder / "workspaces")
    assert "queries: 2\n" in run("--real", folder / "again.jsonl", "--output_file", output)


@pytest.mark.parametrize("change, message", [
    (("check: test -f out.txt\n", ""), "turn needs a check"),
    (("check:", "chek:"), "chek: Extra inputs"),
    (("domain: research", "domain: cooking"), "domain: Input should be 'vibe_coding' or 'research'"),
    (("query_id: fit-1", "query_id: .."), "query_id: String should match"),
    (("workspace: data", "workspace: other"), "other does not exist"),
    (("---\nquery", "query"), "front matter"),
    (("licence: CC0-1.0", "licence: ["), "one.md"),
])
def test_bad_real_queries(tmp_path, change, message):
    folder = real_folder(tmp_path, one=REAL.replace(*change))
    line = refused("--real", folder, "--output_file", tmp_path / "queries.jsonl")
    assert "one.md" in line and message in line
    assert not (tmp_path / "queries.jsonl").exists()


def test_a_query_id_counts_once(tmp_path):
    file, graded = tmp_path / "r.jsonl", {"query_id": "a", "domain": "research"}
    file.write_text("".join(json.dumps(graded | {"turns": [{"query": query, "check": "x"}]}) + "\n"
                            for query in ("sort the names", "draw a circle")))
    run("--real", file, "--output_file", tmp_path / "queries.jsonl")
    [row] = rows_of(tmp_path / "rejected_queries.jsonl")
    assert row["reasons"] == ["its query_id is taken"] and row["turns"][0]["query"] == "draw a circle"


def test_bad_jsonl_and_folders(tmp_path):
    flags = "--output_file", tmp_path / "queries.jsonl", "--real"
    good = {"query_id": "a", "domain": "research", "turns": [{"query": "q", "check": "x"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(good) + '\n{"a"')
    assert "r.jsonl:2: not valid JSON" in refused(*flags, tmp_path / "r.jsonl")
    assert "no query in it" in refused(*flags, tmp_path)


# ---- select ----

def task(query_id, query, domain="vibe_coding", **meta):
    return {"query_id": query_id, "domain": domain, "turns": [{"query": query}], "meta": meta}


def test_diverse_takes_unlike_queries_and_smaller_choices_are_beginnings():
    rows = [task("a", "sort the list of names"), task("b", "sort the list of words"), task("c", "draw a red circle"),
            task("d", "plot the decay", "research")]
    order = [row["query_id"] for row in stage.diverse(rows, 4, 4)]
    assert order == ["a", "d", "c", "b"]  # the other domain first, then the query that is least like a
    for n in range(4):
        assert [row["query_id"] for row in stage.diverse(rows, n, 4)] == order[:n]


def test_quota_of_a_repository_and_difficulty():
    rows = [task("a", "one", repo="x", difficulty="easy"), task("b", "two", repo="x", difficulty="hard"),
            task("c", "three", repo="x", difficulty="hard"), task("d", "four", repo="y", difficulty="easy")]
    assert [row["query_id"] for row in stage.diverse(rows, 9, 2)] == ["b", "c", "d"]


def test_every_beginning_of_the_output_has_the_same_mixture(tmp_path, monkeypatch):
    real = [task(f"real{i}", f"real {i}") | {"source": "real", "reasons": []} for i in range(6)]
    settings = stage.Settings(output_file=str(tmp_path / "queries.jsonl"), n_real=6, n_pr=3, max_per_repo=9)
    pr = dict.fromkeys(("messages", "code_diff", "test_diff"), "")
    pulls = [task(f"pr{i}", f"pull {i}", repo="x", title="") | {"source": "pull_request", "reasons": [], "pr": pr}
             for i in range(3)]
    monkeypatch.setattr(stage, "place_workspace", lambda row, folder: "w.tar")
    stage.select(settings, tmp_path, real + pulls)
    kinds = [row["source"][0] for row in rows_of(tmp_path / "queries.jsonl")]
    assert "".join(kinds) == "rprrprrpr"


# ---- review ----

def reviewed(tmp_path, *texts):
    """Checked real-world queries q0, q1 ... with these texts, and the flags that review them."""
    rows = [task(f"q{i}", text) | {"source": "real", "subdomain": "", "reasons": []} for i, text in enumerate(texts)]
    stage.write_jsonl(tmp_path / "queries.work" / "4_check.jsonl", rows)
    return rows, ["--real", "real", "--output_file", tmp_path / "queries.jsonl", "--step", "review", "--port", "0"]


@pytest.fixture
def page():
    """page(flags) starts the review and gives its address and the file handle of its output; stopped by Ctrl-C."""
    started = []

    def start(*flags):
        process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also under nohup
        started.append(process)
        return process, re.search(r"http://\S+", process.stdout.readline())[0]

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)
        process.wait(10)


def call(url, body=None, **headers):
    """(status, text) of a GET, or of a POST with a body."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_page_takes_reviews_of_its_own_origin_only(page, tmp_path):
    rows, flags = reviewed(tmp_path, "</script><b>first", "second")
    process, url = page(*flags, "--reviewer", "ada")
    address, token = url.split("/?token=")
    status, text = call(url)
    assert status == 200 and "</script><b>first" not in text and "src=" not in text and "href=" not in text
    review = {"key": stage.item_of(rows[0])["key"], "query_id": "q0", "decision": "accept", "reason": "",
              "domain": "research", "queries": ["edited"]}
    good = {"X-Token": token, "Origin": address}
    for wrong in ({"X-Token": "guess"}, {"Origin": "http://evil.example"},
                  {"Host": "evil.example", "Origin": "http://evil.example"}):
        assert call(address, review, **(good | wrong)) == (403, "this did not come from the page of this run")
    assert call(address)[0] == call(f"{address}/?token=guess")[0] == 403
    assert not (tmp_path / "queries.work" / "reviews.jsonl").exists()
    assert call(address, review, **good) == (200, "stored")
    [stored] = rows_of(tmp_path / "queries.work" / "reviews.jsonl")
    assert stored.items() >= (review | {"reviewer": "ada"}).items()
    assert '"decision": "accept"' in call(url)[1]  # a reloaded page goes on where it was


def test_reviews_count_edit_and_agree(tmp_path, capsys):
    rows, _ = reviewed(tmp_path, "one", "two", "three", "four")
    keys, path = [stage.item_of(row)["key"] for row in rows], tmp_path / "reviews.jsonl"
    given = {"ada": "aarr", "ben": "arrr"}
    lines = [{"key": key, "reviewer": who, "decision": {"a": "accept", "r": "reject"}[letter], "reason": "vague",
              "domain": "research", "queries": [f"{i} by {who}"]}
             for who, letters in given.items() for i, (key, letter) in enumerate(zip(keys, letters))]
    undone = {"key": keys[0], "reviewer": "eve", "decision": "", "reason": "", "domain": "research", "queries": ["x"]}
    stage.write_jsonl(path, [undone | {"decision": "reject"}, undone, *lines])
    stage.apply_reviews(rows, path)
    assert [bool(row["reasons"]) for row in rows] == [False, True, True, True]
    assert rows[0]["turns"] == [{"query": "0 by ben"}] and rows[0]["domain"] == "research"
    assert rows[1]["reasons"] == ["rejected by a reviewer: vague"]
    # by hand: they agree on 3 of 4; by chance on (2/4)(1/4) + (2/4)(3/4) = 1/2; (3/4 - 1/2) / (1 - 1/2) = 1/2
    assert capsys.readouterr().out == "review: ada and ben agree on 3 of 4, Cohen's kappa 0.50\n"


def test_trajectories_are_reviewed_too(page, tmp_path):
    rows = [{"query_id": "q", "meta": {}, "tools": [], "messages": [
        {"role": "user", "content": "do it"}, {"role": "assistant", "content": answer}]} for answer in ("yes", "no")]
    file = tmp_path / "train.jsonl"
    flags = "--output_file", tmp_path / "q.jsonl", "--step", "review", "--port", "0", "--review_file", file
    stage.write_jsonl(file, [{"query_id": "q"}])
    assert "train.jsonl:1: not a trajectory" in refused(*flags)
    stage.write_jsonl(file, rows)
    process, url = page(*flags)
    address, token = url.split("/?token=")
    for row, decision in zip(rows, ("reject", "accept")):
        review = stage.item_of(row) | {"decision": decision, "reason": ""}
        assert call(address, review, **{"X-Token": token})[0] == 200
    process.send_signal(signal.SIGINT)
    process.wait(10)
    assert rows_of(tmp_path / "train.accepted.jsonl") == rows[1:]
    assert len(rows_of(tmp_path / "train.reviews.jsonl")) == 2


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium and its driver")
def test_page_by_keyboard_in_chromium(page, tmp_path):
    _, flags = reviewed(tmp_path, "first", "second", "third")
    _, url = page(*flags)
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    port = next(re.search(r"on port (\d+)\.", line)[1] for line in driver.stdout if "successfully" in line)
    options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
    ask = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
    session = f"http://127.0.0.1:{port}/session"
    session += "/" + json.loads(call(session, ask)[1])["value"]["sessionId"]

    def state(end):
        """Wait until the line above the query ends so."""
        for _ in range(100):
            script = {"script": "return document.getElementById('head').textContent", "args": []}
            if (text := json.loads(call(f"{session}/execute/sync", script)[1])["value"]).endswith(end):
                return
            time.sleep(0.05)
        raise AssertionError(text)

    def press(keys, end):
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        call(f"{session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})
        state(end)

    try:
        call(f"{session}/url", {"url": url})
        state("1 of 3, 0 decided: q0 (vibe_coding)")
        press("a", "2 of 3, 1 decided: q1 (vibe_coding)")
        press("r2", "3 of 3, 2 decided: q2 (vibe_coding)")
        press("u", "2 of 3, 1 decided: q1 (vibe_coding)")
        press("d", "2 of 3, 1 decided: q1 (research)")
        press("ea ra\ue00c", "2 of 3, 1 decided: q1 (research)")
        press("a", "3 of 3, 2 decided: q2 (vibe_coding)")
        press("\ue012", "2 of 3, 2 decided: q1 (research)")
    finally:
        urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=10)
        driver.kill()
        driver.wait()
    stored = rows_of(tmp_path / "queries.work" / "reviews.jsonl")
    assert [(row["query_id"], row["decision"], row["reason"]) for row in stored] == [
        ("q0", "accept", ""), ("q1", "reject", "vague"), ("q1", "", ""), ("q1", "accept", "")]
    assert stored[-1]["domain"] == "research" and sorted(stored[-1]["queries"][0]) == sorted("seconda ra")


def test_figure(tmp_path):
    real = tmp_path / "real.jsonl"
    words = "apple river stone cloud table garden window".split()
    real.write_text("".join(json.dumps({"query_id": word, "domain": "research", "turns": [
        {"query": f"Study the {word} well", "rubric": ["done"]}]}) + "\n" for word in words))
    figure = tmp_path / "pool.png"
    run("--real", real, "--output_file", tmp_path / "queries.jsonl", "--n_real", 3, "--figure", figure)
    assert figure.read_bytes().startswith(b"\x89PNG") and len(rows_of(tmp_path / "queries.jsonl")) == 3
