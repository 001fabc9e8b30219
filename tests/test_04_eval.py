"""Stage 4: a scripted endpoint replays canned turns through the real loop, the real sandbox and the real check."""

import asyncio
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from scripted import call, calls, last_line, raw, render, say, tool_outputs, verdicts, write_tasks

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


@pytest.fixture(scope="module")
def m(stage):
    return stage("04_eval")


# --------------------------------------------------------------------------------------------------------------------
# The loop, the check, the feedback, the metrics


def test_an_episode_of_two_turns_with_feedback(m, endpoint, evaluate):
    check = "test -e a.txt && echo 'ok - a.txt is there' || echo 'not ok - a.txt is there'; grep -q hi a.txt"
    endpoint.script["make a"] = [
        call("write_file", file_path="/workspace/a.txt", content="no\n") | {"reasoning": "easy"},
        say("done"),
        call("run_shell_command", command="echo hi > a.txt"),
        say("now"),
        say("b is not needed"),
        say("still not"),
        say("no"),
    ]
    turns = [("make a", check), ("make b", "echo 'b is missing'; exit 3")]
    episodes, summary = evaluate(("two", turns))
    episode = episodes["two", 0]
    feedback = "The task is not done yet. This is what the check of your work says:\n\n"
    shell = (
        "Command: echo hi > a.txt\nDirectory: (root)\nStdout: (empty)\nStderr: (empty)\nError: (none)\nExit Code: 0\n"
    )
    write = {"id": "c0", "type": "function", "function": {
        "name": "write_file", "arguments": {"file_path": "/workspace/a.txt", "content": "no\n"}}}  # fmt: skip
    command = {"id": "call_1", "type": "function", "function": {  # "c0" stands there already
        "name": "run_shell_command", "arguments": {"command": "echo hi > a.txt"}}}  # fmt: skip
    wrote = "Successfully created and wrote to new file: /workspace/a.txt."
    assert episode["messages"] == [
        {"role": "system", "content": m.SYSTEM_PROMPT},
        {"role": "user", "content": "make a"},
        {"role": "assistant", "content": "", "reasoning_content": "easy", "tool_calls": [write]},
        {"role": "tool", "tool_call_id": "c0", "content": wrote},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": feedback + "ok - a.txt is there"},
        {"role": "assistant", "content": "", "tool_calls": [command]},
        {"role": "tool", "tool_call_id": "call_1", "content": shell + "Signal: (none)"},
        {"role": "assistant", "content": "now"},
        {"role": "user", "content": "make b"},
        {"role": "assistant", "content": "b is not needed"},
        {"role": "user", "content": feedback + "b is missing"},
        {"role": "assistant", "content": "still not"},
        {"role": "user", "content": feedback + "b is missing"},
        {"role": "assistant", "content": "no"},
    ]
    there, exits = ({"requirement": text, "passed": True} for text in ("a.txt is there", "the check exits with 0"))
    failed, says = exits | {"passed": False}, feedback + "b is missing"
    rounds = [(r["turn"], r["round"], r["stop"], r["checks"], r["score"], r["feedback"]) for r in episode["rounds"]]
    assert rounds == [
        (0, 1, "answer", [there, failed], 0.5, feedback + "ok - a.txt is there"),
        (0, 2, "answer", [there], 1, ""),
        (1, 1, "answer", [failed], 0, says),
        (1, 2, "answer", [failed], 0, says),
        (1, 3, "answer", [failed], 0, says),
    ]
    # by hand: FTFC (1/2 + 0) / 2; SR (1 + 0) / 2; RC (2/3 + 0) / 2
    assert summary["by_task"]["two"] == pytest.approx({"FTFC": 0.25, "SR@3": 0.5, "RC@3": 1 / 3})
    assert summary["metrics"]["RC@3"] == 0.3333 and summary["metrics"]["RC@3_ci"] is None  # one task
    assert (summary["metrics"]["steps"], summary["metrics"]["prompt_tokens"]) == (7, 70)
    assert episode["meta"]["solved"] is False and summary["rounds_ended_by"] == {"answer": 5}
    # what the server is sent: arguments as a JSON string, the reasoning under vLLM's name, sampling as in the recipe
    body = endpoint.requests[-1]
    sent = body["messages"][2]
    assert (
        sent["reasoning"] == "easy" and json.loads(sent["tool_calls"][0]["function"]["arguments"])["content"] == "no\n"
    )
    assert (body["temperature"], body["top_p"], body["seed"], body["tools"]) == (0.6, 0.95, 0, m.TOOLS)
    # over turns: (1/2 + 0) / 2
    assert summary["metrics"]["FTFC over turns"] == 0.25


def test_several_runs_and_tasks(endpoint, evaluate, tmp_path):
    def easy(body):
        if len(body["messages"]) == 2:
            return call("run_shell_command", command="touch x")
        while '"b"' not in (tmp_path / "out/episodes.jsonl").read_text():
            time.sleep(0.01)
        return say("done")

    endpoint.script["easy"] = easy
    endpoint.script["odd"] = lambda body: (
        call("run_shell_command", command="touch x")
        if body["seed"] == 8 and len(body["messages"]) == 2
        else say("done")
    )
    check = "test -e x"
    tasks = ("a", [("easy", check)]), ("b", [("odd", check)])
    episodes, summary = evaluate(*tasks, n_runs=3, seed=7, rounds=1)
    assert list(episodes)[0][0] == "b" and list(summary["by_task"]) == ["a", "b"]  # in the order of the tasks
    assert {key: row["meta"]["solved"] for key, row in episodes.items()} == {
        ("a", 0): True, ("a", 1): True, ("a", 2): True, ("b", 0): False, ("b", 1): True, ("b", 2): False,
    }  # fmt: skip
    metrics = summary["metrics"]
    # b: 1 of 3 runs. pass^k: 1/3, 0, 0; pass@k: 1/3, 1 - C(2,2)/C(3,2) = 2/3, 1; a is 1 throughout
    assert [metrics[f"pass^{k}"] for k in (1, 2, 3)] == [0.6667, 0.5, 0.5]
    assert [metrics[f"pass@{k}"] for k in (1, 2, 3)] == [0.6667, 0.8333, 1]
    assert metrics["SR@1"] == 0.6667 and metrics["SR@1_ci"] is None  # two tasks are too few to resample
    assert summary["tasks"] == 2 and summary["episodes"] == 6


def test_a_run_without_a_result_limits_k(m):
    def episode(task, run, solved):
        rounds = [{"turn": 0, "round": 1, "stop": "answer", "checks": [], "score": int(solved)}]
        stats = dict.fromkeys(m.STATS, 0)
        return {"query_id": task, "run": run, "rounds": rounds, "meta": stats | {"seconds": 1, "solved": solved}}

    episodes = [episode("a", 0, True), episode("a", 1, False), episode("b", 1, True)]  # b's first came to nothing
    metrics = m.summarize(episodes, m.Settings(model="x", n_runs=2))["metrics"]
    assert metrics["pass^1"] == metrics["pass@1"] == 0.75 and "pass^2" not in metrics


def test_turn_scores_and_bootstrap_by_hand(m):
    def rounds(*triples):
        return [{"turn": turn, "round": number, "score": score} for turn, number, score in triples]

    scores = m.turn_scores(
        rounds((0, 1, 0.5), (0, 2, 0.75), (0, 3, 1), (1, 1, 1), (2, 1, 0), (2, 2, 0), (2, 3, 0.9)), 3
    )
    assert scores == pytest.approx({"FTFC": 1.5 / 3, "SR@3": 2 / 3, "RC@3": (1 / 3 + 1 + 0) / 3})
    assert m.turn_scores(rounds((0, 1, 1)), 3) == {"FTFC": 1, "SR@3": 1, "RC@3": 1}
    assert m.turn_scores(rounds((0, 1, 0), (0, 2, 1)), 2) == {"FTFC": 0, "SR@2": 1, "RC@2": 0.5}
    assert m.bootstrap([0.25] * 5) == [0.25, 0.25] and m.bootstrap([0.0, 1.0, 1.0, 1.0]) is None
    # 100 coin flips: the binomial's own 2.5 and 97.5 % points are 0.40 and 0.60
    assert m.bootstrap([0.0] * 50 + [1.0] * 50) == pytest.approx([0.40, 0.60], abs=0.011)


def test_permutation_p_by_hand(m):
    assert m.permutation_p([1, 1, 1, 1]) == pytest.approx(2 / 16, abs=0.01)  # all heads or all tails
    assert m.permutation_p([1, -1]) == 1 and m.permutation_p([0, 0, 0]) == 1
    assert m.permutation_p([0.5, 0.25]) == pytest.approx(0.5, abs=0.02)  # |mean| as large for 2 of 4 signs


def test_read_check(m):
    def passed(code, output):
        return [(check["requirement"], check["passed"]) for check in m.read_check(code, output)]

    assert passed(0, "hello") == [("the check exits with 0", True)]
    assert passed(1, "") == [("the check exits with 0", False)]
    assert passed(0, "ok 1 - a\nnot okay\nok - b") == [("a", True), ("b", True)]
    assert passed(1, "ok - a\nnot ok 2 - b") == [("a", True), ("b", False)]
    assert passed(1, "ok - a") == [("a", True), ("the check exits with 0", False)]  # it died after a


def test_what_the_model_does_wrong_is_fed_back_and_counted(endpoint, evaluate):
    endpoint.script["q"] = [
        calls(
            ("read_file", '{"absolute_path": '), ("read_file", "[1]"), ("run_shell_command", '{"command": "echo 1"}')
        ),
        calls(
            ("make_coffee", {}), ("check", {"command": "true"}), ("read_file", {}), ("read_file", {"absolute_path": 5})
        ),
        say("", finish_reason="length"),
    ]
    episodes, summary = evaluate(("t", [("q", "true")]))
    episode = episodes["t", 0]
    outputs = tool_outputs(episode)
    assert [output.split("\n")[0][:59] for output in outputs] == [
        "Error: the arguments are not a JSON object: Expecting value",
        "Error: the arguments are not a JSON object: expected an obj",
        "Command: echo 1",
        "Error: there is no tool 'make_coffee'; the tools are list_d",
        "Error: there is no tool 'check'; the tools are list_directo",
        "Error: invalid arguments: 'absolute_path' is a required pro",
        "Error: invalid arguments: 5 is not of type 'string'",
    ]
    assert summary["metrics"]["parse_errors"] == 2 and summary["metrics"]["tool_calls"] == 7
    assert summary["rounds_ended_by"] == {"length": 1}


def test_limits_of_a_round(endpoint, evaluate):
    endpoint.script["long"] = lambda body: call("list_directory", path="/workspace")
    episodes, _ = evaluate(("a", [("long", "false")]), max_steps=4, rounds=2)
    assert [(r["round"], r["stop"]) for r in episodes["a", 0]["rounds"]] == [(1, "max_steps"), (2, "max_steps")]
    assert episodes["a", 0]["meta"]["steps"] == 8


def test_a_full_conversation_ends_the_turn_and_the_next_one_is_tried(endpoint, evaluate):
    too_long = "This model's maximum context length is 8 tokens. However, you requested 9."
    full = (400, {}, json.dumps({"error": {"message": too_long}}))
    endpoint.script["full"] = lambda body: full if len(body["messages"]) > 2 else call("glob", pattern="*")
    episodes, _ = evaluate(("b", [("full", "false"), ("more", "true")]), rounds=2)
    rounds = [(r["turn"], r["stop"], r["score"]) for r in episodes["b", 0]["rounds"]]
    assert rounds == [(0, "context_full", 0), (1, "context_full", 1)]


def test_limits_of_time(endpoint, evaluate):
    endpoint.script["slow"] = lambda body: time.sleep(30) or say("too late")
    sleep = call("run_shell_command", command="touch started; sleep 60; touch never")
    endpoint.script["hang"] = lambda body: sleep if len(body["messages"]) == 2 else say("too late")
    checks = {"slow": "true", "hang": "test -e started && ! test -e never"}
    tasks = [(query, [(query, check)]) for query, check in checks.items()]
    episodes, summary = evaluate(*tasks, max_seconds=4, rounds=1)
    rounds = [record for query in checks for record in episodes[query, 0]["rounds"]]
    assert [(r["stop"], r["score"]) for r in rounds] == [("max_seconds", 1)] * 2
    assert re.search("timed out after [1-4] seconds", tool_outputs(episodes["hang", 0])[0])
    assert summary["rounds_ended_by"] == {"max_seconds": 2}


def test_what_a_vllm_was_asked_and_wrote_is_kept_to_the_token(endpoint, evaluate, tmp_path, run_stage):
    endpoint.script["q"] = [
        call("run_shell_command", command="echo 1") | {"reasoning": "hm", "content": "I look."},
        say("done", reasoning="all of it"),
        call("run_shell_command", command="touch x") | {"reasoning": "again", "content": ""},
        say("ready"),
    ]
    task = ("t", [("q", "test -e x")])
    evaluate(task, output_dir=tmp_path / "other")  # which may refuse a field that it does not know
    assert not any("return_token_ids" in body for body in endpoint.requests)
    assert "served" not in tmp_path.joinpath("other/episodes.jsonl").read_text()
    endpoint.is_vllm = True
    endpoint.requests.clear()
    episodes, _ = evaluate(task)
    served, bodies = episodes["t", 0]["served"], endpoint.requests[1:]  # the first one is the probe
    prompts = [[ord(c) for c in render(body["messages"])] for body in bodies]
    # within a round a prompt is the beginning of the next one; the new round leaves the reasoning out
    assert [step["prompt_token_ids"] for step in served] == [len(prompts[0]), prompts[1], len(prompts[2]), prompts[3]]
    assert prompts[1][: len(prompts[0])] == prompts[0] and prompts[3][: len(prompts[2])] == prompts[2]
    texts = [raw({"role": "assistant"} | message) for message in endpoint.script["q"]]
    assert [step["text"] for step in served] == texts and "hm</think>I look." in texts[0]
    assert [step["token_ids"] for step in served] == [[ord(c) for c in text] for text in texts]


def test_several_servers(endpoint, make_endpoint, m, evaluate, tmp_path):
    """Episodes are spread over them, each stays on its own."""
    other = make_endpoint()
    tasks = []
    for n in range(8):
        endpoint.script[f"q{n}"] = other.script[f"q{n}"] = [call("list_directory", path="/workspace"), say("done")]
        tasks.append((f"t{n}", [(f"q{n}", "true")]))
    endpoint.delay = other.delay = 0.05
    _, summary = evaluate(*tasks, base_url=[endpoint.url, other.url], concurrency=4)
    assert summary["metrics"]["SR@3"] == 1
    seen = []
    for server in (endpoint, other):
        asked = {body["messages"][1]["content"] for body in server.requests}
        seen.append({query for query in asked if "probe" not in query})
    assert len(seen[0]) > 1 and len(seen[1]) > 1 and not seen[0] & seen[1] and len(seen[0] | seen[1]) == 8
    other.script["Read /workspace/probe.txt with the tool read_file."] = lambda body: (401, {}, "no key")
    with pytest.raises(m.InputError, match=f"{other.url}.*no key"):  # each is asked before anything is paid for
        evaluate(*tasks, base_url=[endpoint.url, other.url], output_dir=tmp_path / "second")


def test_without_tools_the_answer_is_what_the_check_sees(endpoint, evaluate):
    """The paper's arm without tools: one completion a round, on a workspace that stays as it was."""
    endpoint.script["q"] = [say("41"), say("42"), say("more")]
    task = {"query_id": "t", "turns": [{"query": "q", "check": "grep -qx 42 /answer.md"}]}
    task["turns"].append({"query": "and?", "check": "grep -qx 42 /answers/1.md && grep -qx more /answers/2.md"})
    episodes, _ = evaluate(task, no_tools=True)
    assert all("tools" not in body for body in endpoint.requests) and episodes["t", 0]["tools"] == []
    rounds = [(r["turn"], r["round"], r["score"]) for r in episodes["t", 0]["rounds"]]
    assert rounds == [(0, 1, 0), (0, 2, 1), (1, 1, 1)]


def test_workspaces_are_copied(m, endpoint, evaluate, tmp_path, one_line_error, run_stage):
    folder = tmp_path / "given"
    folder.mkdir()
    folder.joinpath("data.txt").write_text("given\n")
    folder.joinpath("link").symlink_to("/etc/hostname")
    subprocess.run(["tar", "-cf", tmp_path / "given.tar", "-C", folder, "."], check=True)
    endpoint.script["q"] = [
        call("run_shell_command", command="cat data.txt; echo mine > data.txt; cat link"),
        say("x"),
    ]
    turns = [{"query": "q", "check": "grep mine data.txt"}]
    tasks = [{"query_id": name, "turns": turns, "workspace": name} for name in ("given", "given.tar")]
    episodes, _ = evaluate(*tasks)
    for episode in episodes.values():
        assert (
            episode["meta"]["solved"] and "Stdout: given\nStderr: cat: link: No such file" in tool_outputs(episode)[0]
        )
    assert folder.joinpath("data.txt").read_text() == "given\n"  # the task's own stays as it was
    tmp_path.joinpath("broken.tar").write_text("no tar")
    path = write_tasks(tmp_path, tasks[0] | {"workspace": "broken.tar"})
    result = run_stage(
        "04_eval.py", "--base_url", endpoint.url, "--model", "x", "--tasks", path, "--output_dir", tmp_path / "o2"
    )
    one_line_error(last_line(result), "broken.tar", "tar")


def test_a_workspace_may_hold_more_than_files(evaluate, tmp_path, monkeypatch):
    """As git's fsmonitor leaves one."""
    folder = tmp_path / "given"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # the path of a socket has 107 characters
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("socket")
    turn = {"query": "q", "check": "test -p pipe && test -S socket", "solution": "true"}
    _, summary = evaluate({"query_id": "t", "workspace": "given", "turns": [turn]}, agent="solution")
    assert summary["by_task"]["t"]["SR@1"] == 1


def test_episodes_are_rows_that_02_reads(stage, endpoint, evaluate, tmp_path, run_stage):
    endpoint.script["write hello to x"] = [call("run_shell_command", command="echo hello > x"), say("done")]
    evaluate(("t", [("write hello to x", "grep hello x")]))
    rows = tmp_path / "train.jsonl"
    result = run_stage("02_format_trajectories.py", tmp_path / "out/episodes.jsonl", "--output_file", rows)
    assert result.returncode == 0, result.stderr
    row = json.loads(rows.read_text())
    episode = json.loads(tmp_path.joinpath("out/episodes.jsonl").read_text())
    assert (row["query_id"], row["messages"], row["tools"]) == ("t", episode["messages"], episode["tools"])


def test_human_feedback(endpoint, tmp_path, run_stage):
    first = call("run_shell_command", command="echo fine > note")
    endpoint.script["q"] = [first, say("first"), say("second"), say("third"), say("fourth")]
    endpoint.script["later"] = [say("not yet seen\x1b]0;a title\x07")]
    turns = [{"query": "q"}, {"query": "and then?"}]
    path = write_tasks(tmp_path, {"query_id": "t", "turns": turns}, {"query_id": "u", "turns": [{"query": "later"}]})
    flags = [
        "--base_url",
        endpoint.url,
        "--model",
        "x",
        "--feedback",
        "human",
        "--output_dir",
        tmp_path / "out",
        "--tasks",
        path,
    ]
    result = run_stage("04_eval.py", *flags, input="\nthe title\n\n  is missing\n.\naccept\ngive up\n")
    # ... then the end of the input: leave
    assert result.returncode == 130 and "Traceback" not in result.stderr and "stopped" in result.stderr
    assert "echo fine > note" in result.stdout and "--- assistant\nfirst" in result.stdout and "+fine" in result.stdout
    (episode,) = map(json.loads, tmp_path.joinpath("out/episodes.jsonl").read_text().splitlines())
    said = [message["content"] for message in episode["messages"] if message["role"] in ("user", "assistant")]
    assert said == ["q", "", "first", "the title\n\n  is missing", "second", "and then?", "third"]
    assert [r["score"] for r in episode["rounds"]] == [0, 1, 0]
    endpoint.requests.clear()
    result = run_stage("04_eval.py", *flags, input="accept\n")  # goes on where the second task waits for an answer
    assert result.returncode == 0 and "1 of 2 episodes done" in result.stdout, result.stderr
    assert len(endpoint.requests) == 1 and "--- assistant\nnot yet seen?]0;a title?" in result.stdout  # the probe
    _, episode = map(json.loads, tmp_path.joinpath("out/episodes.jsonl").read_text().splitlines())
    assert [r["score"] for r in episode["rounds"]] == [1] and episode["meta"]["steps"] == 1
    assert sorted(os.listdir(tmp_path / "out/workspaces")) == ["t-0", "u-0"]


@pytest.fixture
def two_runs(endpoint, evaluate, tmp_path):
    """base and tuned on six tasks, of which the tuned one solves five."""
    works = call("run_shell_command", command="touch x")
    endpoint.script["q"] = lambda body: (
        works if body["model"] == "tuned" and len(body["messages"]) == 2 else say("d")
    )
    tasks = [(name, [("q", "test -e x")]) for name in "abcde"] + [("f", [("q", "false")])]
    for model in ("base", "tuned"):
        evaluate(*tasks, model=model, output_dir=tmp_path / model)
    return tmp_path / "base", tmp_path / "tuned"


def compared(run_stage, *folders):
    result = run_stage("04_eval.py", "--compare", *folders)
    assert result.returncode == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_two_runs_are_compared_task_by_task(two_runs, run_stage, one_line_error, tmp_path):
    lines = compared(run_stage, *two_runs)
    assert "a 0.0% -> 100.0% 0.0% -> 100.0% 0.0% -> 100.0%" in lines
    assert "f 0.0% -> 0.0% 0.0% -> 0.0% 0.0% -> 0.0%" in lines
    assert "SR@3: 0.0% [0.0%, 0.0%] -> 83.3% [50.0%, 100.0%]" in lines
    # 5 of 6 differences are 1: under random signs 2 of 32 draws are as large
    at = lines.index("SR@3: 0.0% [0.0%, 0.0%] -> 83.3% [50.0%, 100.0%]")
    told = re.fullmatch(r"against \S+: \+83.3% \[\+50.0%, \+100.0%\], p = (0.06\d)", lines[at + 1])
    assert told and float(told[1]) == pytest.approx(2 / 32, abs=0.008)
    one_line_error(run_stage("04_eval.py", "--compare", two_runs[0], tmp_path / "none"), "none", "summary.json")
    alone = compared(run_stage, two_runs[1])
    assert "a 100.0% 100.0% 100.0%" in alone and not any("against" in line for line in alone)


def test_what_cannot_be_compared_is_refused_and_what_differs_is_said(
    endpoint, evaluate, two_runs, run_stage, one_line_error, tmp_path
):
    tasks = [(name, [("q", "true")]) for name in "abcdef"]
    evaluate(*tasks, output_dir=tmp_path / "easier")
    one_line_error(run_stage("04_eval.py", "--compare", two_runs[0], tmp_path / "easier"), "task a is not the same")
    tasks = [(name, [("q", "test -e x")]) for name in "abcde"] + [("f", [("q", "false")])]
    evaluate(*tasks, output_dir=tmp_path / "hot", temperature=1.0, rounds=1)
    lines = compared(run_stage, two_runs[0], tmp_path / "hot")
    assert any(line.startswith("beware: temperature differs: ") and "0.6" in line for line in lines)
    assert any(line.startswith("SR@1: 0.0% ") for line in lines) and not any("SR@3" in line for line in lines)
    told = [line for line in lines if line.startswith(str(tmp_path))]
    assert told[0].endswith("base: base, 6 of 6 tasks; rounds ended by: answer 18; not run: none")
    assert [line[0] for line in lines if line[:2] in ("a ", "b ", "c ", "d ", "e ", "f ")] == list("abcdef")


SUMMARY = {"model": "x", "settings": {"rounds": 3}, "fingerprints": {}, "tasks": 1, "not_run": {}}
SUMMARY |= {"task_sha256": {"a": "0"}, "by_task": {"a": {"FTFC": 0.5, "SR@3": 1}}}
DAMAGED = {
    "half": '{"model": ',
    "null": "null",
    "a list": [SUMMARY],
    "no model": {key: value for key, value in SUMMARY.items() if key != "model"},
    "no rounds": SUMMARY | {"settings": {}},
    "rounds that are a word": SUMMARY | {"settings": {"rounds": "3"}},
    "no number": SUMMARY | {"by_task": {"a": {"FTFC": float("nan")}}},
    "more than all": SUMMARY | {"by_task": {"a": {"FTFC": 7.5}}},
    "less than nothing": SUMMARY | {"by_task": {"a": {"FTFC": -1}}},
    "a score in words": SUMMARY | {"by_task": {"a": {"FTFC": "0.5"}}},
    "no task": SUMMARY | {"by_task": {}},
    "no metric": SUMMARY | {"by_task": {"a": {}}},
    "another metric": SUMMARY | {"by_task": {"a": {"FTFC": 1}, "b": {"SR@3": 1}}},
    "counts in words": SUMMARY | {"not_run": {"killed": "two"}},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_summary_is_one_line(m, tmp_path, what):
    damaged = DAMAGED[what]
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(SUMMARY))
    m.compare([str(tmp_path)], None)
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(m.InputError, match="summary.json: ") as error:
        m.compare([str(tmp_path)], None)
    assert "\n" not in str(error.value)


def test_other_metrics_are_not_compared(m, tmp_path):
    for name, metric in (("old", "RC@3"), ("new", "SR@3")):
        tmp_path.joinpath(name).mkdir()
        summary = SUMMARY | {"by_task": {"a": {"FTFC": 0.5, metric: 1}}}
        tmp_path.joinpath(name, "summary.json").write_text(json.dumps(summary))
    with pytest.raises(m.InputError, match="the task a is not the same .*metrics"):
        m.compare([str(tmp_path / "old"), str(tmp_path / "new")], None)


def test_rows_that_are_no_episodes_are_told(m, tmp_path):
    """Another stage's rows in the folder of a run."""
    path = tmp_path / "episodes.jsonl"
    path.write_text('{"query_id": "t", "messages": [], "tools": [], "meta": {}}\n')
    with pytest.raises(m.InputError, match="episodes.jsonl:1: rounds is missing"):
        m.episodes_in(path)


PAPER = """
tasks: {birds: 6}
Table 2:
  with_tools: true
  benchmarks:
    birds: {SR@3: {GLM-4.5: 47.4, LIMI: 74.6}}
    fish: {SR@3: {LIMI: 1}}
Table 4:
  with_tools: false
  benchmarks:
    birds: {SR@3: {LIMI: 2}}
"""


def test_published_numbers_stand_beside_the_same_arm_of_the_whole_benchmark(
    endpoint, evaluate, run_stage, tmp_path, one_line_error
):
    turns = [{"query": "q", "check": "true"}]
    tasks = [{"query_id": name, "turns": turns, "source": "birds"} for name in "abcdef"]
    evaluate(*tasks, output_dir=tmp_path / "run")
    paper = tmp_path / "paper.yaml"
    paper.write_text(PAPER)
    lines = compared(run_stage, tmp_path / "run", "--paper", paper)
    shown = [line for line in lines if line.startswith("published")]
    assert shown == ["published: Table 2, birds: GLM-4.5 47.4, LIMI 74.6"]
    paper.write_text(PAPER.replace("birds: 6", "birds: 7"))
    lines = compared(run_stage, tmp_path / "run", "--paper", paper)
    assert "published: Table 2, birds: not shown: over 7 tasks, these are 6" in lines
    paper.write_text("Table 2: 5")
    one_line_error(run_stage("04_eval.py", "--compare", tmp_path / "run", "--paper", paper), "--paper")


# --------------------------------------------------------------------------------------------------------------------
# Task files that prove themselves, grading once more


PROOF = {
    "query_id": "proof",
    "workspace": "given",
    "private": "secret",
    "turns": [
        {
            "query": "copy the word",
            "check": "cmp word.txt /private/word && test -e data.txt && test ! -e gone.txt",
            "solution": "cp /private/word word.txt; rm gone.txt",
        },
        {"query": "say it", "check": "grep -qx heron /answer.md && test -e word.txt", "solution": "cat /private/word"},
    ],
}


@pytest.fixture
def proof(tmp_path):
    """A task of two turns, with a workspace and a private folder."""
    for name, files in {"given": {"data.txt": "1", "gone.txt": "2"}, "secret": {"word": "heron\n"}}.items():
        tmp_path.joinpath(name).mkdir()
        for file, text in files.items():
            tmp_path.joinpath(name, file).write_text(text)
    return PROOF


def test_a_task_file_proves_itself(evaluate, proof, tmp_path, endpoint):
    _, solved = evaluate(proof, agent="solution", output_dir=tmp_path / "solution")
    _, idle = evaluate(proof, agent="nothing", output_dir=tmp_path / "nothing")
    assert solved["by_task"]["proof"] == {"FTFC": 1, "SR@1": 1, "RC@1": 1} and solved["model"] == "solution"
    assert idle["by_task"]["proof"] == {"FTFC": 0, "SR@1": 0, "RC@1": 0} and not endpoint.requests


def test_a_task_file_that_does_not_prove_itself_is_named(run_stage, tmp_path):
    easy = {"query_id": "easy", "turns": [{"query": "q", "check": "true", "solution": "true"}]}
    hard = {"query_id": "hard", "turns": [{"query": "q", "check": "false", "solution": "true"}]}
    none = {"query_id": "none", "turns": [{"query": "q", "check": "true"}]}
    path = write_tasks(tmp_path, easy, hard, none)
    told = {"solution": "hard", "nothing": "easy"}
    for agent, name in told.items():
        out = tmp_path / agent
        result = run_stage("04_eval.py", "--tasks", path, "--agent", agent, "--output_dir", out)
        assert result.returncode == 1
        assert f"beware: --agent {agent} does not score {int(agent == 'solution'):.0%} on {name}\n" in result.stdout
    lacks = [json.loads(line) for line in tmp_path.joinpath("solution/not_run.jsonl").read_text().splitlines()]
    assert lacks == [{"query_id": "none", "run": 0, "reason": "missing_need", "detail": "a solution of every turn"}]


def test_the_private_folder_is_never_the_agents(endpoint, evaluate, proof):
    endpoint.script["copy the word"] = [
        call("run_shell_command", command="ls / /private /answers; find / -name word 2> /dev/null"),
        *[say("heron")] * 6,
    ]
    episodes, _ = evaluate(proof)
    output = tool_outputs(episodes["proof", 0])[0]
    listed = output.partition("Stdout: /:\n")[2].partition("Stderr")[0].split()
    assert listed == ["bin", "dev", "etc", "home", "lib", "lib64", "opt", "proc", "sbin", "tmp", "usr", "workspace"]
    assert "cannot access '/private'" in output and "cannot access '/answers'" in output


def test_grading_again_asks_nobody(endpoint, evaluate, proof, tmp_path):
    endpoint.script["copy the word"] = [
        call("run_shell_command", command="echo crane > word.txt; rm gone.txt"),
        say("done"),
        call("run_shell_command", command="echo heron > word.txt; mkdir new; touch new/file"),
        say("done again"),
        say("heron"),
    ]
    episodes, summary = evaluate(proof)
    assert [r["score"] for r in episodes["proof", 0]["rounds"]] == [0, 1, 1]
    asked = len(endpoint.requests)
    again, same = evaluate(proof, regrade=str(tmp_path / "out"), output_dir=tmp_path / "same")
    assert same["metrics"]["FTFC"] == summary["metrics"]["FTFC"] == 0.5 and same["by_task"] == summary["by_task"]
    easier = json.loads(json.dumps(proof))
    easier["turns"][0]["check"] = "test -e word.txt && test -e data.txt && test ! -e gone.txt"
    _, changed = evaluate(easier, regrade=str(tmp_path / "out"), output_dir=tmp_path / "changed")
    assert changed["metrics"]["FTFC"] == 1 and len(endpoint.requests) == asked
    assert again["proof", 0]["messages"] == episodes["proof", 0]["messages"]
    state = tmp_path / "out/states/proof-0/turn1-round2.tar.gz"
    state.write_bytes(state.read_bytes()[:40])  # half a state is none, and no score
    _, damaged = evaluate(easier, regrade=str(tmp_path / "out"), output_dir=tmp_path / "damaged")
    assert damaged["not_run"] == {"missing_need": 1} and damaged["by_task"] == {}


def test_grading_again_is_over_the_same_episodes(endpoint, evaluate, tmp_path, m):
    """With whoever was not run, what was asked, the rounds and the tools that there were; the run stays as it is."""
    endpoint.script |= {"a": [call("bash", command="touch x"), say("done")], "b": lambda body: (400, {}, "no")}
    tasks = [(name, [(name, "test -e x; grep done /answer.md")]) for name in "abc"]
    given = {"tools": str(ROOT / "recipes/tools/bash.py"), "model": "first", "rounds": 1}
    episodes, summary = evaluate(*tasks[:2], **given, patience=3)
    assert summary["not_run"] == {"endpoint_error": 1}
    run = {"regrade": str(tmp_path / "out"), "model": None}
    tmp_path.joinpath("out/states/a-0/answer.md").write_text("another regrade is at work here")
    again, same = evaluate(*tasks, **run, output_dir=tmp_path / "again")
    assert same["not_run"] == {"endpoint_error": 1, "missing_need": 1} and same["model"] == "first"
    assert same["by_task"] == summary["by_task"] == {"a": {"FTFC": 1, "SR@1": 1, "RC@1": 1}}
    assert again["a", 0]["meta"].pop("source") == f"{tmp_path}/again/a-0" and episodes["a", 0]["meta"].pop("source")
    assert again == episodes
    assert tmp_path.joinpath("out/states/a-0/answer.md").read_text() == "another regrade is at work here"
    _, twice = evaluate(*tasks, **run | {"regrade": str(tmp_path / "again")}, output_dir=tmp_path / "twice")
    assert twice["by_task"] == summary["by_task"]
    for n, turns in enumerate(([("a!", "true")], [("a", "true"), ("more", "true")])):
        _, other = evaluate(("a", turns), **run, output_dir=tmp_path / f"other{n}")
        assert other["not_run"] == {"missing_need": 1}


def test_modes_are_work_too(endpoint, evaluate, tmp_path):
    """What may not be read or changed any more is in the check's copy and in the states as the agent left it."""
    lock = "echo key > a; mkdir -p d/e; echo x > d/x; chmod 000 a d/e; chmod 555 d; truncate -s 900M hole"
    endpoint.script["q"] = [call("run_shell_command", command=lock), say("done"), say("done")]
    check = "test $(stat -c %a a d d/e | paste -sd,) = 0,555,0 && ! cat a && chmod u+r a && grep key a && cat d/x"
    task = ("t", [("q", check + "; test -e second"), ("more", check)])
    episodes, _ = evaluate(task, rounds=1)
    assert [record["score"] for record in episodes["t", 0]["rounds"]] == [0, 1]
    assert episodes["t", 0]["meta"]["states_not_kept"] == 0
    _, again = evaluate(task, rounds=1, regrade=str(tmp_path / "out"), output_dir=tmp_path / "again")
    assert again["by_task"]["t"]["SR@1"] == 0.5


@pytest.mark.parametrize("lock", ["chmod 000 /workspace", "rm -rf /workspace/* /workspace/.[a-z]*; chmod 0 ."])
def test_an_agent_that_locks_its_folder_is_graded(endpoint, evaluate, lock):
    """Not one that takes its failure out of the mean."""
    endpoint.script["q"] = [call("run_shell_command", command=lock), say("done"), call("glob", pattern="*"), say("x")]
    _, summary = evaluate(("t", [("q", "test -e a")]), rounds=2)
    assert summary["not_run"] == {} and summary["by_task"]["t"]["SR@2"] == 0


def test_half_an_emoji_in_a_task_harms_nobody(endpoint, evaluate):
    endpoint.script["a\ufffd"] = [say("done")]
    _, summary = evaluate({"query_id": "t", "system": "\udc80", "turns": [{"query": "a\ud83d", "check": "true"}]})
    assert summary["by_task"]["t"]["SR@3"] == 1


def test_without_a_sandbox_the_states_are_those_of_their_episode(evaluate, tmp_path):
    """Whatever the folders are called, and though /tmp is everybody's."""
    tasks = []
    for name in "abcdef":
        turn = {"query": "q", "check": f"grep {name} x && ls | grep -c . | grep -x 1", "solution": f"echo {name} > x"}
        tasks.append({"query_id": name, "turns": [turn]})
    folder = tmp_path / "my workspace/state"
    given = {"sandbox": "none", "agent": "solution"}
    evaluate(*tasks, **given, output_dir=folder / "out")
    _, again = evaluate(*tasks, **given, regrade=str(folder / "out"), output_dir=folder / "again")
    assert again["metrics"]["SR@1"] == 1 and again["metrics"]["states_not_kept"] == 0


def test_without_a_sandbox_an_agent_may_take_its_folder_away(endpoint, evaluate):
    """It has nothing to show then; its neighbours go on, and so does the run that is started again."""
    endpoint.script["q"] = [call("run_shell_command", command='rm -r "$PWD"'), say("done")]
    _, summary = evaluate(("t", [("q", "test -e x")]), sandbox="none", rounds=1)
    assert summary["by_task"]["t"]["SR@1"] == 0


def test_what_a_machine_lacks_is_named(endpoint, evaluate):
    turns = [{"query": "q", "check": "true"}]
    tasks = [
        {"query_id": "web", "turns": turns, "needs": ["network"]},
        {"query_id": "tool", "turns": turns, "needs": ["bash", "no-such-program"]},
        {"query_id": "image", "turns": turns, "image": "docker.io/some/image"},
        {"query_id": "fine", "turns": turns, "needs": ["bash"]},
    ]
    _, summary = evaluate(*tasks)
    rows = [json.loads(line) for line in (endpoint.folder / "out/not_run.jsonl").read_text().splitlines()]
    told = {row["query_id"]: row["detail"] for row in rows}
    assert told == {
        "web": "--network",
        "tool": "no-such-program",
        "image": "a container (--config recipes/sandbox/docker.yaml)",
    }
    assert summary["not_run"] == {"missing_need": 3} and list(summary["by_task"]) == ["fine"]


@pytest.mark.parametrize(
    "check, reason",
    [
        ("echo 'Bail out! no compiler'; exit 1", "bailed_out"),
        ("echo fine; echo 'Bail out!'", "bailed_out"),
        ("no-such-program", "check_not_started"),
        ("/usr/bin/no-such-program", "check_not_started"),
        ("timeout 5 no-such-program", "check_not_started"),
        ("no-such-program 2> /dev/null", "check_not_started"),
        ("printf '#!/no/such/interpreter\\n' > /tmp/x; chmod +x /tmp/x; /tmp/x", "check_not_started"),
    ],
)
def test_a_check_that_cannot_decide_is_no_score(endpoint, evaluate, check, reason):
    endpoint.script["q"] = [say("done")] * 3
    _, summary = evaluate(("t", [("q", check)]))
    assert summary["not_run"] == {reason: 1} and summary["by_task"] == {}


@pytest.mark.parametrize("line, told", {
    "ok 1 - it compiles # SKIP no compiler": "no compiler",
    "ok - it compiles # skipped: no compiler": "no compiler",
    "not ok 1 # skip": "not ok 1 # skip",
    "1..0 # SKIP no compiler": "# SKIP no compiler",
    "1..0": "1..0",
    "bail out! no compiler": "no compiler",
}.items())  # fmt: skip
def test_what_a_check_leaves_out_is_no_pass(m, tmp_path, line, told):
    """Wherever it stands in the output: a plan at its end, too."""
    for output in (line, f"ok - one\n{line}", f"{line}\nok - two"):
        with pytest.raises(m.NotRun, match=told) as fault:
            m.refuse_to_decide(0, output, tmp_path)
        assert fault.value.reason == "bailed_out"
    flood = m.without_middle("\n".join(["x" * 30_000, line, "y" * 30_000]).encode(), 40_000).decode()
    with pytest.raises(m.NotRun):
        m.refuse_to_decide(0, flood, tmp_path)
    m.refuse_to_decide(0, "1..4\nok - a\nok - we skip nothing\n# SKIP\nok - 2 # 1\nok - a # skip-list", tmp_path)


@pytest.mark.parametrize("size", range(15_998, 16_003))
def test_a_line_that_decides_is_found_where_the_end_of_an_output_begins(m, size):
    """The last 16,000 characters are kept as they are."""
    line = "not ok - two\n"
    text = m.without_middle(("x" * 30_000 + "\n" + line).encode() + b"y" * (size - len(line)), 40_000).decode()
    assert [check["passed"] for check in m.read_check(0, text)] == [False]


OUTPUTS = ("printf 'no line end'", "printf 'ok - all\\n'", "printf '\\r'", "printf 'Bail out!'", "true")


@pytest.mark.parametrize("program", OUTPUTS)
def test_a_program_that_is_run_apart_as_the_readme_says_decides_nothing(m, tmp_path, program):
    line = next(line for line in (ROOT / "recipes/sandbox/README.md").read_text().splitlines() if "sed" in line)
    tmp_path.joinpath("program").write_text(f"#!/bin/bash\n{program}")
    tmp_path.joinpath("program").chmod(0o755)
    tmp_path.joinpath("input").touch()
    command = f"{line.partition('#')[0]}\necho 'not ok - two'"
    output = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True).stdout
    m.refuse_to_decide(0, output, tmp_path)
    assert m.read_check(0, output) == [{"requirement": "two", "passed": False}]


@pytest.mark.parametrize("copy", ["echo 'cp: error writing a: Disk quota exceeded'; exit 1", "sleep 9"])
def test_half_a_copy_is_not_graded(m, evaluate, monkeypatch, copy):
    monkeypatch.setattr(m, "COPY", copy)
    turn = {"query": "q", "check": "false", "solution": "true"}
    _, summary = evaluate({"query_id": "t", "turns": [turn]}, agent="solution", check_seconds=2)
    assert summary["not_run"] == {"killed": 1}


@pytest.mark.parametrize("check", ["./folder", "./loop", "./file/run", "bash none.sh", "sh none.sh", "bash folder",
                                   "env ./folder", "timeout 5 ./loop", "exec ./folder"])  # fmt: skip
def test_what_an_agent_puts_in_the_place_of_a_program_is_its_failure(m, tmp_path, check):
    """Nor may it get away with having made none."""
    tmp_path.joinpath("folder").mkdir()
    tmp_path.joinpath("loop").symlink_to("loop")
    tmp_path.joinpath("file").touch()
    result = subprocess.run(["bash", "-c", f"exec 2>&1; {check}"], cwd=tmp_path, capture_output=True, text=True)
    m.refuse_to_decide(result.returncode, result.stdout.replace(str(tmp_path), "/workspace"), tmp_path)
    assert m.read_check(result.returncode, result.stdout) == [{"requirement": "the check exits with 0", "passed": False}]


@pytest.mark.parametrize(
    "check",
    [
        "./solution",
        "/workspace/bin/run",
        "timeout 5 ./solution",
        "env bin/run",
        "bash run.sh",  # the agent's script calls what is not there
        "sh run.sh",
        "chmod +x run.sh; ./run.sh",
    ],
)
def test_a_program_that_the_agent_did_not_make_is_a_failure(endpoint, evaluate, check):
    script = "printf '#!/bin/bash\\nno-such-program\\n' > run.sh"
    endpoint.script["q"] = [call("run_shell_command", command=script), say("done")]
    _, summary = evaluate(("t", [("q", check)]), rounds=1)
    assert summary["by_task"]["t"]["SR@1"] == 0 and not summary["not_run"]


FLOOD = "seq 200000; echo 'ok - one'; seq 200000; echo 'not ok - two'; seq 200000; echo 'ok - three'"
REPLAY = "import os; os.truncate('/proc/self/fd/1', 0)"


@pytest.mark.parametrize(
    "check, passed",
    [
        (FLOOD, {"one": True, "two": False, "three": True}),  # however much a program prints in between
        ("echo 'not ok - two'; head -c 3M /dev/zero | tr '\\0' a; echo; echo 'ok - one'", {"one": True, "two": False}),
        (f'echo "not ok - two"; python3 -c "{REPLAY}"; echo "ok - one"', {"one": True, "two": False}),
        ("fallocate -l 1G /tmp/x; echo 'not ok - two'; echo 'ok - one'", {"one": True, "two": False}),
        ("setsid sleep 99 & echo 'ok - one'", {"one": True}),  # it holds the pipe open
        ("echo 'ok - one'; exec >&- 2>&-; sleep 1", {"one": True}),
    ],
)
def test_a_line_that_decides_is_never_lost(endpoint, evaluate, check, passed):
    """Neither in a long output, nor by what the check runs: it cannot take back a line, or leave no room for it."""
    endpoint.script["q"] = [say("done")]
    episodes, _ = evaluate(("t", [("q", check + "; exit 0")]), rounds=1)
    checks = episodes["t", 0]["rounds"][0]["checks"]
    assert {check["requirement"]: check["passed"] for check in checks} == passed


# --------------------------------------------------------------------------------------------------------------------
# Another tool set

SHOUT = '''
TOOLS = [{"type": "function", "function": {"name": "shout", "description": "Shout.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}]


def shout(word):
    code, output, _ = run_command(f"printf %s {word} | tr a-z A-Z", ROOT)
    return clip(output) if code == 0 else f"exit code {code}"
'''


def test_another_tool_set_is_one_file(endpoint, evaluate, tmp_path, m):
    tools = tmp_path / "shout.py"
    tools.write_text(SHOUT)
    endpoint.script["q"] = [call("shout", word="hello"), call("read_file", absolute_path="/x"), say("done")]
    episodes, _ = evaluate(("t", [("q", "true")]), tools=str(tools))
    assert tool_outputs(episodes["t", 0]) == ["HELLO", "Error: there is no tool 'read_file'; the tools are shout."]
    assert [schema["function"]["name"] for schema in episodes["t", 0]["tools"]] == ["shout"]
    tools.write_text(SHOUT.replace("tr a-z", "tr  a-z"))
    with pytest.raises(m.InputError, match="tools_sha256"):  # other tools, another agent
        evaluate(("t", [("q", "true")]), tools=str(tools), n_runs=2)


FAULTY = {  # what a tool returns, what the model reads
    "None": "None",
    "{1}": "{1}",
    "re.nothing": "Error: AttributeError: module 're' has no attribute 'nothing'",
    "nothing": "Error: NameError: name 'nothing' is not defined",
    "next(generator)": "Error: RuntimeError: generator raised StopIteration",
    "1 / 0": "Error: ZeroDivisionError: division by zero",
}


def test_a_tool_with_a_fault_ends_neither_its_server_nor_the_run(endpoint, evaluate, tmp_path):
    tools = tmp_path / "shout.py"
    lines = ["def shout(word):", "    generator = (next(iter(())) for _ in range(1))"]
    for word in FAULTY:
        lines += [f"    if word == {word!r}:", f"        return {word}"]
    tools.write_text(SHOUT.partition("def shout")[0] + "\n".join(lines))
    endpoint.script["q"] = [call("shout", word=word) for word in FAULTY] + [say("done")]
    episodes, _ = evaluate(("t", [("q", "true")]), tools=str(tools))
    assert tool_outputs(episodes["t", 0]) == list(FAULTY.values())


@pytest.mark.parametrize(
    "text, told",
    [
        (SHOUT.replace("def shout", "def whisper"), "no function shout"),
        ("TOOLS = []", "missing or empty"),
        ("x = 1", "missing or empty"),
        ("def", "cannot be loaded"),
        ("import no_such_module", "cannot be loaded"),
        ("1 / 0", "cannot be loaded: division by zero"),
        ("int('x')", "cannot be loaded"),
        ("TOOLS = 5", "TOOLS: 5 is not of type 'array'"),
        ("TOOLS = ['shout']", "TOOLS.0.: 'shout' is not of type 'object'"),
        ("TOOLS = [{'function': {}}]", "TOOLS.0..function: 'name' is a required property"),
        (SHOUT.replace('"parameters"', '"arguments"'), "'parameters' is a required property"),
        (SHOUT.replace('"type": "object"', '"type": "thing"'), "'thing' is not valid"),
        (SHOUT.replace('{"type": "string"}', '{"type": "string", "pattern": "("}'), "'[(]' is not a 'regex'"),
        (SHOUT.replace("shout", "check"), "check: the server itself has one of that name"),
    ],
)
def test_a_tool_without_its_function_fails_at_the_start(m, tmp_path, text, told):
    path = tmp_path / "tools.py"
    path.write_text(text)
    with pytest.raises(m.InputError, match=told):
        m.load_tools(str(path))


# --------------------------------------------------------------------------------------------------------------------
# The tools


TOOL_OUTPUTS = [
    ("list_directory", {"path": "/workspace"}, "Directory /workspace is empty."),
    ("write_file", {"file_path": "/workspace/src/a.py", "content": "x = 1\ny = 2\n"},
     "Successfully created and wrote to new file: /workspace/src/a.py."),
    ("write_file", {"file_path": "/workspace/src/a.py", "content": "x = 1\ny = 2\nx = 3\n"},
     "Successfully overwrote file: /workspace/src/a.py."),
    ("write_file", {"file_path": "b.md", "content": ""}, "Error: ValueError: Path must be absolute: b.md"),
    ("write_file", {"file_path": "/usr/x", "content": ""},
     "Error: OSError: [Errno 30] Read-only file system: '/usr/x'"),
    ("read_file", {"absolute_path": "/workspace/src/a.py"}, "x = 1\ny = 2\nx = 3\n"),
    ("read_file", {"absolute_path": "/workspace/src/a.py", "offset": 1, "limit": 1},
     "[File content truncated: lines 2-2 of 3; use offset and limit.]\ny = 2\n"),
    ("read_file", {"absolute_path": "/none"},
     "Error: FileNotFoundError: [Errno 2] No such file or directory: '/none'"),
    ("replace", {"file_path": "/workspace/src/a.py", "old_string": "x", "new_string": "z"},
     "Error: ValueError: Failed to edit, expected 1 occurrence(s) but found 2."),
    ("replace", {"file_path": "/workspace/src/a.py", "old_string": "x", "new_string": "z", "expected_replacements": 2},
     "Successfully modified file: /workspace/src/a.py (2 replacements)."),
    ("replace", {"file_path": "/workspace/src/a.py", "old_string": "q", "new_string": ""},
     "Error: ValueError: Failed to edit, could not find the string to replace."),
    ("replace", {"file_path": "/workspace/src/a.py", "old_string": "", "new_string": "q"},
     "Error: ValueError: Failed to edit, the file already exists: /workspace/src/a.py"),
    ("replace", {"file_path": "/workspace/b.md", "old_string": "", "new_string": "# z\r\n"},
     "Successfully created and wrote to new file: /workspace/b.md."),
    ("read_file", {"absolute_path": "/workspace/b.md"}, "# z\r\n"),
    ("list_directory", {"path": "/workspace"}, "Directory listing for /workspace:\n[DIR] src\nb.md"),
    ("list_directory", {"path": "/workspace", "ignore": ["*.md"]}, "Directory listing for /workspace:\n[DIR] src"),
    ("glob", {"pattern": "**/*.PY"}, "Found 1 file(s) matching '**/*.PY'\n/workspace/src/a.py"),
    ("glob", {"pattern": "**/*.PY", "case_sensitive": True}, "Found 0 file(s) matching '**/*.PY'"),
    ("glob", {"pattern": "*.py"}, "Found 0 file(s) matching '*.py'"),
    ("glob", {"pattern": "[a-c].py", "path": "/workspace/src"},
     "Found 1 file(s) matching '[a-c].py'\n/workspace/src/a.py"),
    ("glob", {"pattern": "*", "depth": 3},
     "Error: the arguments do not fit the tool: glob() got an unexpected keyword argument 'depth'"),
    ("search_file_content", {"pattern": "^z"},
     "Found 2 match(es) for '^z'\nFile: src/a.py\nL1: z = 1\nL3: z = 3"),
    ("search_file_content", {"pattern": "z", "include": "*.md"}, "Found 1 match(es) for 'z'\nFile: b.md\nL1: # z"),
    ("search_file_content", {"pattern": "("},
     "Error: error: missing ), unterminated subpattern at position 0"),
    ("read_many_files", {"paths": ["**/*.py", "/workspace/b.md"]},
     "--- /workspace/src/a.py ---\n\nz = 1\ny = 2\nz = 3\n\n\n"
     "--- /workspace/b.md ---\n\n# z\r\n\n\n--- End of content ---"),
    ("read_many_files", {"paths": ["*"], "exclude": ["*.md"]}, "No files matched."),
    ("run_shell_command", {"command": "pwd; echo oh >&2; exit 3", "directory": "src", "description": "where"},
     "Command: pwd; echo oh >&2; exit 3\nDirectory: src\nStdout: /workspace/src\nStderr: oh\nError: (none)\n"
     "Exit Code: 3\nSignal: (none)"),
    ("run_shell_command", {"command": "kill -9 $$"},
     "Command: kill -9 $$\nDirectory: (root)\nStdout: (empty)\nStderr: (empty)\nError: (none)\n"
     "Exit Code: (none)\nSignal: 9"),
    ("run_shell_command", {"command": "echo start; sleep 60"},
     "Command: echo start; sleep 60\nDirectory: (root)\nStdout: start\nStderr: (empty)\n"
     "Error: Command timed out after 2 seconds and was killed.\nExit Code: (none)\nSignal: 9"),
    ("run_shell_command", {"command": "printf 'a%.0s' {1..20000}; printf 'b%.0s' {1..20000}"},
     "Command: printf 'a%.0s' {1..20000}; printf 'b%.0s' {1..20000}\nDirectory: (root)\n"
     "Stdout: " + "a" * 8000 + "\n[... 24000 characters left out ...]\n" + "b" * 8000 +
     "\nStderr: (empty)\nError: (none)\nExit Code: 0\nSignal: (none)"),
]  # fmt: skip


def test_tool_outputs_to_the_letter(m, endpoint, evaluate):
    endpoint.script["q"] = [*(calls((name, arguments)) for name, arguments, _ in TOOL_OUTPUTS), say("done")]
    episodes, _ = evaluate(("t", [("q", "true")]), command_seconds=2)
    for output, (name, arguments, expected) in zip(tool_outputs(episodes["t", 0]), TOOL_OUTPUTS, strict=True):
        assert output == expected, (name, arguments)


# --------------------------------------------------------------------------------------------------------------------
# Killed, stopped, resumed


@pytest.fixture
def start(endpoint, tmp_path):
    """Start a run of 8 small tasks as a process, episodes slow enough to be killed in the middle."""
    endpoint.delay = 0.05
    tasks = []
    for n in range(8):
        endpoint.script[f"q{n}"] = [call("run_shell_command", command=f"echo {n} > x"), say("done")]
        tasks.append((f"t{n}", [(f"q{n}", f"grep -x {n} x")]))
    path, out = write_tasks(tmp_path, *tasks), tmp_path / "out"
    command = [sys.executable, ROOT / "04_eval.py", "--base_url", endpoint.url, "--model", "x", "--tasks", path]
    command += ["--output_dir", out, "--concurrency", "3", "--patience", "1"]

    def run(lines=None, number=signal.SIGKILL):
        """Run to the end, or send the signal once `lines` episodes are there."""
        quiet = ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]  # as a shell's background job
        command_line = [*quiet, *map(str, command)]
        process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while lines is not None and process.poll() is None:
            if (
                out.joinpath("episodes.jsonl").exists()
                and len(out.joinpath("episodes.jsonl").read_text().splitlines()) >= lines
            ):
                process.send_signal(number)
                break
            time.sleep(0.01)
        output, error = process.communicate(timeout=60)
        return process.returncode, output, error

    run.out = out
    return run


def test_two_runs_do_not_share_a_folder(endpoint, tmp_path, run_stage, one_line_error):
    import fcntl

    tmp_path.joinpath("out").mkdir()
    lock = open(tmp_path / "out/lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    flags = ["--base_url", endpoint.url, "--model", "x", "--tasks", write_tasks(tmp_path, ("t", [("q", "true")]))]
    one_line_error(run_stage("04_eval.py", *flags, "--output_dir", tmp_path / "out"), "another run")
    lock.close()


def test_sigterm_leaves_finished_episodes(start):
    code, _, error = start(4, signal.SIGTERM)
    assert "Traceback" not in error, error
    assert code == 130 and "stopped; finished episodes are kept" in error
    assert len(start.out.joinpath("episodes.jsonl").read_text().splitlines()) >= 4
    assert subprocess.run(["pgrep", "-f", str(start.out)], capture_output=True).returncode == 1  # no process is left
    assert start()[0] == 0


def test_episodes_of_nobody_knows_which_settings_are_refused(evaluate, m, tmp_path):
    evaluate(("t", [("q", "true")]), agent="nothing")
    tmp_path.joinpath("out/settings.json").unlink()
    with pytest.raises(m.InputError, match="holds episodes, but no settings.json"):
        evaluate(("t", [("q", "true")]), agent="nothing")


def test_other_settings_are_refused(endpoint, evaluate, m):
    task = ("t", [("q", "true")])
    evaluate(task)
    asked = len(endpoint.requests)
    evaluate(task, concurrency=2)
    assert len(endpoint.requests) == asked
    evaluate(task, n_runs=2)  # more runs add to those that are there
    with pytest.raises(m.InputError, match="temperature 0.6 -> 0.0"):
        evaluate(task, temperature=0.0)
    with pytest.raises(m.InputError, match="tasks_sha256"):
        evaluate(("t", [("q", "false")]))


def test_a_model_trained_anew_is_another_model(m, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    first = m.fingerprint(str(tmp_path))
    weights.write_bytes(bytes((3 << 20) - 1) + b"1")
    second = m.fingerprint(str(tmp_path))
    tmp_path.joinpath("chat_template.jinja").write_text("{{ messages }}")
    assert len({first, second, m.fingerprint(str(tmp_path))}) == 3 and m.fingerprint("zai-org/GLM-4.5") is None


# --------------------------------------------------------------------------------------------------------------------
# Endpoints and inputs that are not what they should be


def test_one_line_errors(tmp_path, run_stage, one_line_error):
    def run(*flags):
        return run_stage("04_eval.py", "--output_dir", tmp_path / "out", *flags)

    tasks = write_tasks(tmp_path, ("t", [("q", "true")]))
    dead = ["--tasks", tasks, "--model", "x", "--base_url", "http://127.0.0.1:9/v1", "--patience", "0"]
    one_line_error(run(*dead), "127.0.0.1:9", "ConnectError", "--base_url")
    assert not tmp_path.joinpath("out/summary.json").exists()
    tmp_path.joinpath("config.json").write_text('{"model_type": "qwen3"}')
    one_line_error(run("--tasks", tasks, "--model", tmp_path), "tokenizer_config.json")
    one_line_error(run("--taskz", tasks), "taskz")


def test_bad_settings(m, tmp_path):
    def error(**settings):
        with pytest.raises(m.InputError) as caught:
            m.main(m.Settings(output_dir=str(tmp_path / "out"), **settings))
        assert not tmp_path.joinpath("out/episodes.jsonl").exists()
        return str(caught.value)

    known = {"tasks": [str(write_tasks(tmp_path, ("t", [("q", "true")])))], "model": "x", "base_url": ["http://x/v1"]}
    assert "01_build_queries.py" in error(**known | {"tasks": [str(tmp_path / "none.jsonl")]})
    assert "stands there twice" in error(**known | {"tasks": known["tasks"] * 2})
    assert "--model" in error(tasks=known["tasks"])
    assert "http://" in error(**known | {"base_url": ["localhost:8000"]})
    assert "--base_url x:1" in error(**known | {"base_url": ["http://x/v1", "x:1"]})
    for url in ("http://[::1/v1", "http://x\0/v1", "http://:80/v1", "ftp://x/v1", "http://x\u2028y..com/v1", "http://x:99999/v1"):
        assert f"--base_url {url}: expected" in error(**known | {"base_url": [url]})
    judge = {"feedback": "judge", "judge_model": "j"}
    assert "--judge_base_url x:1" in error(**known, **judge, judge_base_url="x:1")
    assert "--judge_base_url does nothing" in error(**known, judge_base_url="http://x/v1")
    assert "--image does nothing" in error(**known, image="x")
    assert "--concurrency 0" in error(**known, concurrency=0)
    assert "--limit 0" in error(**known, limit=0)
    assert "max_seconds 0" in error(**known, max_seconds=0)
    assert "--judge_model" in error(**known, feedback="judge")
    assert "--judge_model does nothing" in error(**known, judge_model="j")
    assert "--no_tools does nothing" in error(tasks=known["tasks"], agent="solution", no_tools=True)
    assert "--tools does nothing" in error(**known, no_tools=True, tools="x.py")
    assert "--paper does nothing" in error(**known, paper="x.yaml")
    assert "--price_in" in error(**known, max_usd=1.0)
    assert "sandbox_mount" in error(**known, sandbox_command=["docker"])
    assert "no episodes.jsonl" in error(**known, regrade=str(tmp_path))
    # what YAML may hold is of the right kind, and a word is one of those that there are
    assert "--feedback 'jugde'" in error(**known, feedback="jugde")
    assert "--sandbox 'nome'" in error(**known, sandbox="nome")
    assert "--request [1]" in error(**known, request=[1])
    assert "--headers None" in error(**known, headers=None)
    assert "--headers {5: 'x'}" in error(**known, headers={5: "x"})
    assert "--request {'x': datetime.date" in error(**known, request={"x": datetime.date(2026, 1, 1)})
    assert "--request {'x': nan}" in error(**known, request={"x": float("nan")})
    assert "--max_steps 2.5" in error(**known, max_steps=2.5)
    assert "--network 'no'" in error(**known, network="no")
    assert "--temperature nan" in error(**known, temperature=float("nan"))
    assert "--sandbox_command 'docker run'" in error(**known, sandbox_command="docker run")


@pytest.mark.parametrize(
    "wrong",
    [{"sandbox_mount": "{hots}"}, {"sandbox_command": ["bash", "{nme}"]}, {"sandbox_command": ["bash", "{"]}],
)
def test_a_placeholder_of_a_launcher_that_is_none_is_told(m, tmp_path, wrong):
    given = {"sandbox_command": ["bash", "{mounts}"], "sandbox_mount": "{host}", "output_dir": str(tmp_path)}
    with pytest.raises(m.InputError, match="the placeholders here are .*"):
        asyncio.run(m.try_sandbox(m.Settings(model="x", **given | wrong), ""))


def test_a_checkpoint_that_cannot_be_served_is_told_before_anything_starts(m, tmp_path):
    def error(**settings):
        with pytest.raises(m.InputError) as caught:
            m.vllm_command(m.Settings(model=str(tmp_path), **settings))
        return str(caught.value)

    assert "no config.json" in error()
    tmp_path.joinpath("config.json").write_text("{}")
    tmp_path.joinpath("tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: not valid JSON" in error()
    tmp_path.joinpath("tokenizer_config.json").write_text("{}")
    assert "name --tool_call_parser" in error()
    assert "--vllm_args '--a" in error(tool_call_parser="hermes", vllm_args="'--a")
    with pytest.raises(m.InputError, match="--port 70000"):
        settings = m.Settings(model=str(tmp_path), tool_call_parser="hermes", port=70_000)
        with m.vllm_server(settings, tmp_path / "log"):
            pass
    with pytest.raises(m.InputError, match="neither a folder nor a reachable Hub id"):
        m.vllm_command(m.Settings(model="nobody/nothing"))
    command = m.vllm_command(m.Settings(model=str(tmp_path), tool_call_parser="hermes", reasoning_parser="none"))
    assert command[command.index("--tool-call-parser") + 1] == "hermes" and "--reasoning-parser" not in command


@pytest.mark.parametrize(
    "template, parsers",
    [
        ("{{ '<tool_call>' }}<arg_key>reasoning_content", ("glm45", "glm45")),
        ('<tool_call>\n{"name": ...', ("hermes", None)),  # Qwen2.5, Qwen3 Instruct 2507: it never thinks
        ("<think><tool_call>", ("hermes", "qwen3")),
        ("<tool_call>\n<function=", ("qwen3_coder", None)),
        ("<|tool_calls_section_begin|>", ("kimi_k2", None)),
        ("[TOOL_CALLS]", ("mistral", None)),
        ("nothing of the kind", (None, None)),
    ],
)
def test_the_parsers_are_those_of_what_the_template_writes(m, tmp_path, template, parsers):
    tmp_path.joinpath("config.json").write_text('{"model_type": "whatever"}')
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert m.parsers_of(str(tmp_path)) == parsers


@pytest.mark.parametrize("fields, parsers", [({"thinking": {}}, ("hf", "hf")), ({"content": {}}, ("hf", None))])
def test_a_model_that_says_how_it_answers_is_read_by_that(m, tmp_path, fields, parsers):
    """As 03 exports it: vLLM's parsers by template."""
    tmp_path.joinpath("config.json").write_text("{}")
    described = {"chat_template": "<tool_call>", "response_template": {"fields": fields}}
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(described))
    assert m.parsers_of(str(tmp_path)) == parsers


TURN = {"query": "q", "check": "true"}
GOOD = {"query_id": "t", "turns": [TURN]}
GLOB = {"name": "glob"}
BAD_TASKS = [
    ('{"query_id": "t", "tur', ["queries.jsonl:1", "not valid JSON"]),
    ("[1]", ["queries.jsonl:1", "expected a JSON object"]),
    (
        json.dumps(GOOD | {"turns": [{"query": "q"}]}),
        ["queries.jsonl:1", "turns[0].check is missing", "--feedback judge"],
    ),
    (json.dumps(GOOD | {"turns": [{"query": "q", "check": 5}]}), ["turns[0].check", "5 is not of type 'string'"]),
    (json.dumps(GOOD | {"turns": []}), ["queries.jsonl:1", "turns"]),
    (json.dumps({"turns": GOOD["turns"]}), ["queries.jsonl:1", "'query_id' is a required property"]),
    (json.dumps(GOOD | {"query_id": "../../etc"}), ["queries.jsonl:1", "query_id"]),
    (json.dumps(GOOD | {"query_id": "x" * 250}), ["queries.jsonl:1", "query_id"]),
    (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ["queries.jsonl:2", "'t' stands there twice"]),
    (json.dumps(GOOD | {"workspace": "none"}), ["queries.jsonl:1", "workspace", "none does not exist"]),
    (json.dumps(GOOD | {"tools": [{"function": {"name": "web_fetch", "parameters": {}}}]}), ["queries.jsonl:1: tools: ", "web_fetch"]),
    ("", ["no tasks in it"]),
    (json.dumps(GOOD | {"privat": "hidden"}), ["queries.jsonl:1: privat: no such field; nearest: private"]),
    (json.dumps(GOOD | {"turns": [TURN | {"solutoin": "x"}]}), ["turns[0]: solutoin: ", "nearest: solution"]),
    (json.dumps(GOOD | {"turns": [{"query": " ", "check": "true"}]}), ["queries.jsonl:1: turns[0].query"]),
    (json.dumps(GOOD | {"turns": [{"query": "q", "check": None}]}), ["queries.jsonl:1: turns[0].check"]),
    (json.dumps(GOOD | {"turns": [{"query": "q", "check": "true", "rubric": "r"}]}), ["turns[0].rubric"]),
    (json.dumps(GOOD | {"turns": {"query": "q"}}), ["queries.jsonl:1: turns"]),
    (json.dumps(GOOD | {"needs": "bash"}), ["queries.jsonl:1: needs"]),
    (json.dumps(GOOD | {"system": None}), ["queries.jsonl:1: system"]),
    (json.dumps(GOOD | {"workspace": "queries.jsonl"}), ["workspace", "is no folder or .tar"]),
    (json.dumps(GOOD | {"private": "queries.jsonl"}), ["private", "is no folder"]),
    (json.dumps(GOOD | {"venv": "."}), ["queries.jsonl:1: venv: no bin/python"]),
    (json.dumps(GOOD | {"tools": [{"function": "glob"}]}), ["queries.jsonl:1: tools[0].function"]),
    (json.dumps(GOOD | {"tools": [{"function": GLOB}]}), ["'parameters' is a required property"]),
    (json.dumps(GOOD | {"tools": [{"function": GLOB | {"parameters": {"type": "strng"}}}]}), ["'strng'"]),
    (json.dumps(GOOD | {"turns": [TURN, TURN | {"check": "bash /private/a.sh; echo"}]}),
     ["queries.jsonl:1: turns[1].check: /private/a.sh is not in", "it has none"]),
    (json.dumps(GOOD | {"tools": [{"function": GLOB | {"parameters": {"properties": {"a": {"pattern": "["}}}}}]}),
     ["queries.jsonl:1: tools[0]", "'[' is not a 'regex'"]),
    (json.dumps(GOOD | {"query_id": "\u9df9" * 70}), ["queries.jsonl:1: query_id: more than 200 bytes"]),
    (json.dumps(GOOD | {"query_id": "t\ud83d"}), ["queries.jsonl:1: query_id"]),
    (json.dumps(GOOD | {"source": {"url": "x"}}), ["queries.jsonl:1: source", "is not of type 'string', 'null'"]),
    (json.dumps(GOOD | {"domain": ["research"]}), ["queries.jsonl:1: domain"]),
    (json.dumps([GOOD]), ["queries.jsonl:1", "expected a JSON object, found list"]),
    (json.dumps(GOOD, indent=1), ["queries.jsonl:1", "one JSON object a line"]),
    ("[" * 100_000, ["queries.jsonl:1", "not valid JSON"]),
]


@pytest.mark.parametrize("text, parts", BAD_TASKS)
def test_bad_tasks(m, tmp_path, text, parts):
    path = tmp_path / "queries.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(m.InputError) as error:
        m.read_tasks(m.Settings(tasks=[str(path)]), m.load_tools(None)[0])
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)


def test_a_folder_without_a_name_is_none(m, tmp_path):
    path = write_tasks(tmp_path, GOOD | {"workspace": "", "private": "", "venv": ""}, {"query_id": "u", "turns": [TURN]})
    first, second = m.read_tasks(m.Settings(tasks=[str(path)]), {})
    assert m.task_sha256(first)[:8] != m.task_sha256(second)[:8] and not first["workspace"]


@pytest.mark.parametrize("check, there", [
    ("python3 -I /private/tests/a.py", True), ("cp -r /private/tests/ . && cat /private/*.txt", True),
    ("for f in /private/tests/b_*.py; do python3 $f; done; cat /private/$NAME", True),
    ("[ -f /private/more.sh ] && bash ./x", True), ("diff -r /private /workspace", True),
    ("python3 -I /private/tests/c.py", False), ("diff out /private/expected.txt", False),
])  # fmt: skip
def test_a_check_names_files_that_are_in_the_private_folder(m, tmp_path, check, there):
    """A file that was not copied would be a 0 of every model."""
    tmp_path.joinpath("hidden/tests").mkdir(parents=True)
    tmp_path.joinpath("hidden/tests/a.py").touch()
    task = GOOD | {"private": "hidden", "turns": [TURN | {"check": check}]}
    settings = m.Settings(tasks=[str(write_tasks(tmp_path, task))])
    with nullcontext() if there else pytest.raises(m.InputError, match=r"turns\[0\].check: /private/"):
        m.read_tasks(settings, {})


@pytest.mark.skipif(os.getuid() != 0, reason="only as root a check has a user of its own")
@pytest.mark.parametrize("path, mode", [("hidden", 0o700), ("hidden/deep", 0o744), ("hidden/deep/word", 0o600)])
def test_a_private_folder_that_no_check_could_read_is_told(m, tmp_path, path, mode):
    """Every check would fail, and every score would be 0."""
    tmp_path.joinpath("hidden/deep").mkdir(parents=True)
    tmp_path.joinpath("hidden/deep/word").write_text("heron")
    settings = m.Settings(tasks=[str(write_tasks(tmp_path, GOOD | {"private": "hidden"}))])
    assert len(m.read_tasks(settings, {})) == 1
    tmp_path.joinpath(path).chmod(mode)
    with pytest.raises(m.InputError, match=f"queries.jsonl:1: private: .*{path}; chmod"):
        m.read_tasks(settings, {})


def test_bad_tasks_from_the_shell(tmp_path, run_stage, one_line_error):
    path = write_tasks(tmp_path, GOOD | {"workspace": "a\nb\x1b[2J"})
    one_line_error(run_stage("04_eval.py", "--model", "x", "--tasks", path), "a b[2J does not exist")
    path = tmp_path / "queries.jsonl"
    path.write_text('{"query_id": "t", "tur\n')
    flags = ["--model", "x", "--base_url", "http://127.0.0.1:9/v1", "--tasks", path, "--output_dir", tmp_path / "out"]
    one_line_error(run_stage("04_eval.py", *flags), "queries.jsonl:1", "not valid JSON")
    assert not tmp_path.joinpath("out").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small file system")
def test_a_disk_that_is_nearly_full_is_told_before_the_first_episode(endpoint, tmp_path, run_stage, one_line_error):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        flags = ["--base_url", endpoint.url, "--model", "x", "--tasks", write_tasks(tmp_path, ("t", [("q", "true")]))]
        result = run_stage("04_eval.py", *flags, "--output_dir", small)
        one_line_error(result, "small: 3", "MiB are free", "2 GiB are needed")
        assert not endpoint.requests and not small.joinpath("summary.json").exists()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("name", ["demo", "qwen3-4b", "qwen3-8b", "qwen3-32b", "glm-4.5-air", "glm-4.5"])
def test_recipes_are_settings(m, name):
    from trl import TrlParser

    (settings,) = TrlParser(m.Settings).parse_args_and_config(["--config", str(ROOT / f"recipes/{name}/eval.yaml")])
    assert settings.rounds == (1 if name == "demo" else 3)


def test_help_imports_nothing_heavy(run_stage):
    """Two seconds on a quiet machine."""
    result = run_stage("04_eval.py", "--help")
    assert result.returncode == 0 and "--base_url" in result.stdout and "default: 3" in result.stdout
    heavy = "{'torch', 'vllm', 'openai', 'transformers'} & set(sys.modules)"
    heavy = f"import importlib, sys; importlib.import_module('04_eval'); print({heavy})"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"
