"""AgencyBench v2: small graders of our own that speak the SDK's protocol."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from scripted import call, say

pytestmark = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
ROOT = Path(__file__).resolve().parents[1]
NAME = "agencybench-v2-MCP-scenario2"

# As the real ones: asks through `node $SII_BRIDGE_PATH` in JSON lines, follows links when it copies, retries
# once with feedback, gives up after a failed subtask. A subtask is solved when a.txt holds its number.
GRADER = r"""
import argparse, json, os, shutil, socket, subprocess, threading, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--env")
parser.add_argument("--description", default="/description.json")
args = parser.parse_args()
here = Path(__file__).resolve().parent
description = json.loads((here / args.description).read_text())
env = dict(line.split("=", 1) for line in (here / args.env).read_text().splitlines() if "=" in line)
model, mode = here / env["SII_TARGET_MODEL"], description["mode"]
if mode == "crash":
    raise SystemExit("no such grader")
if mode == "judge":
    import urllib.request
    url, body = env["EVAL_TEXT_API_BASE_URL"] + "/chat/completions", {"model": env["EVAL_TEXT_MODEL"]}
    body["messages"] = [{"role": "user", "content": "Answer in JSON: a score."}]
    def ask():
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=description["patience"]) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
        try:
            return json.loads(text)["score"]
        except ValueError:
            return 0  # as the real ones do
if mode == "page":
    import urllib.request
    from websockets.sync.client import connect

    def api(path, content=None, kind="application/json"):
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        request = urllib.request.Request("http://127.0.0.1:8088/v1/" + path, content, {"Content-Type": kind})
        return json.load(urllib.request.urlopen(request, timeout=60))

    def upload(file, path):
        part = 'X\r\nContent-Disposition: form-data; name="'
        form = "--" + part + 'path"\r\n\r\n' + path + "\r\n--" + part + 'file"\r\n\r\n' + file + "\r\n--X--"
        assert api("file/upload", form.encode(), "multipart/form-data; boundary=X")["data"]["success"]

    def show(page):
        "What the page says once its title is `done`; that a picture was taken."
        home = api("sandbox")["home_dir"]
        upload(page, home + "/index.html")
        serve = {"command": "exec python3 -m http.server 28123 --bind 127.0.0.1", "async_mode": True}
        session = api("shell/exec", serve)["data"]["session_id"]
        while api("shell/exec", {"command": "exec 3<> /dev/tcp/127.0.0.1/28123"})["data"]["exit_code"]:
            time.sleep(0.1)
        tabs = api("browser/info")["data"]["cdp_url"] + "/json/new?http://127.0.0.1:28123/index.html"
        with urllib.request.urlopen(urllib.request.Request(tabs, method="PUT")) as reply:
            address = json.load(reply)["webSocketDebuggerUrl"]
        with connect(address, max_size=None) as tab:
            def ask(method, **params):
                tab.send(json.dumps({"id": 1, "method": method, "params": params}))
                return json.loads(tab.recv())["result"]
            def value(script):
                return ask("Runtime.evaluate", expression=script)["result"]["value"]
            while value("document.title") != "done":
                time.sleep(0.1)
            said = json.loads(value("document.body.textContent"))
            picture = ask("Page.captureScreenshot", format="png")["data"]
        api("shell/kill", {"id": session})
        return {"said": said, "picture": picture[:11], "big": len(picture) > 1000}
if mode == "hasty":
    def leave():
        while not list(model.rglob("begun")):
            time.sleep(0.1)
        os._exit(3)
    threading.Thread(target=leave).start()
events, meta, session = [], {"subtasks": []}, {}

def send(prompt, cwd):
    bridge = subprocess.Popen(["node", os.environ["SII_BRIDGE_PATH"]], stdin=-1, stdout=-1, text=True)
    options = {"cwd": str(cwd), "system_prompt": "Be brief.", "max_turns": 4, "yolo": True}
    params = {"prompt": prompt, "options": options, "history": [{"role": "user", "content": "..."}]} | session
    bridge.stdin.write(json.dumps({"request_id": "r", "method": "query", "params": params}) + "\n")
    bridge.stdin.flush()
    for line in bridge.stdout:
        events.append(json.loads(line))
        if events[-1]["type"] in ("completed", "error"):
            break
    session.update(events[-1].get("metadata", {}))
    bridge.stdin.close()
    assert bridge.wait() == 0

previous = None
for n in range(1, description["subtask_count"] + 1):
    attempts, feedback = [], ""
    for k in range(1, 3):
        workspace = model / f"subtask{n}" / "workspace" / f"attempt_{k:02d}"
        workspace.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(previous, workspace) if previous else workspace.mkdir()
        places = {"outside": here, "dots": model / ".." / "subtask1", "link": model / "link"}
        cwd = places.get(mode, workspace)
        if mode == "link":
            (model / "link").symlink_to("/etc")
        if mode != "silent":
            send(description[f"subtask{n}"] + feedback, cwd)
        previous, answer = workspace, workspace / "a.txt"
        solved = mode == "silent" or answer.exists() and answer.read_text() == str(n)
        if mode == "copies":
            shutil.copytree(workspace, model / "evalspace" / f"{n}.{k}", symlinks=False)
        if mode == "runs":
            subprocess.run(["bash", "run.sh"], cwd=workspace)
        score = 10 if solved else 5
        if mode == "judge":
            try:
                score = ask()
            except OSError:
                score = 0  # as the real ones do
        if mode == "page":
            meta["page"] = show((workspace / "index.html").read_text())
            score = 10
            solved = True
        attempts.append({"attempt_index": k, "score": score, "feedback": "a.txt"})
        if solved:
            break
        feedback = " Focus on a.txt."
    meta["subtasks"].append({"name": f"subtask{n}", "attempts": attempts})
    if not solved:
        break
try:
    socket.create_connection(("127.0.0.1", description["port"]), 1)
    reached = True
except OSError:
    reached = False
keys = [key for key in os.environ if "KEY" in key]
(model / "meta_eval.json").write_text(json.dumps(meta | {"events": events, "reached": reached, "keys": keys}))
"""


@pytest.fixture
def v2(stage, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes/benchmarks")
    four = stage("04_eval")
    kept = four.Episode, four.turn_scores
    monkeypatch.setattr(importlib.import_module("common"), "installed", lambda venv, *packages: None)
    yield importlib.import_module("agencybench_v2")
    four.Episode, four.turn_scores = kept


@pytest.fixture
def run(v2, endpoint, tmp_path, monkeypatch):
    """run(mode) -> (episodes, summary, what the grader wrote, exit code) of our grader, in this process."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def run(mode="fair", subtasks=3, patience=60, **settings):
        folder = tmp_path / "clone" / "AgencyBench-v2" / "MCP" / "scenario2"
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("eval_task.py").write_text(GRADER)
        folder.joinpath(".env").write_text("SII_TARGET_MODEL=your_model\nSII_MAX_TURNS=1000\n")
        port = int(endpoint.url.split(":")[2].split("/")[0])
        tasks = {f"subtask{n}": f"write {n}" for n in range(1, subtasks + 1)}
        facts = {"subtask_count": subtasks, "mode": mode, "port": port, "patience": patience}
        text = json.dumps(tasks | facts)
        folder.joinpath("description.json").write_text(text)
        out = tmp_path / "out"
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        settings = {"model": "x", "base_url": [endpoint.url], "patience": 0} | settings
        settings |= {"output_dir": str(out)}
        settings |= {"clone": str(tmp_path / "clone"), "venv": sys.prefix, "scenarios": ["MCP/*"]}
        try:
            code = v2.main(v2.Settings(**settings))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        rows = [
            json.loads(line) for line in out.joinpath("episodes.jsonl").read_text().splitlines()
        ]
        meta = out / "workspaces" / f"{NAME}-0" / "meta_eval.json"
        made = json.loads(meta.read_text()) if meta.exists() else None
        return rows, json.loads(out.joinpath("summary.json").read_text()), made, code

    return run


def shell(command):
    return call("run_shell_command", command=command)


def test_a_grader_and_its_agent(v2, endpoint, run, capsys):
    pairs = [(1, 1), (1, 2), (2, 1)]
    places = [f"/workspace/scenario2/agent/subtask{n}/workspace/attempt_{k:02d}" for n, k in pairs]
    look = "cat ../../../../description.json ../../../../.env; ls -A /workspace /workspace/scenario2 .."
    look += "; ls /bridge"
    endpoint.script["write 1"] = [
        shell(look),
        say("done"),
        call("write_file", file_path=f"{places[1]}/a.txt", content="1"),
        shell("ls"),
        say("now it is"),
        *[shell("true")] * 4,  # max_turns
        say("I cannot"),
    ]
    rows, summary, meta, code = run(network=True)  # for the agent, never for the grader
    (episode,) = rows
    users = [message["content"] for message in episode["messages"] if message["role"] == "user"]
    assert users == [
        "write 1",
        f"You work in the directory {places[1]} now.\n\nwrite 1 Focus on a.txt.",
        f"You work in the directory {places[2]} now.\n\nwrite 2",
        "You work in the directory /workspace/scenario2/agent/subtask2/workspace/attempt_02 now.\n\n"
        "write 2 Focus on a.txt.",
    ]
    system = v2.stage.SYSTEM_PROMPT.replace("/workspace", places[0]) + "\n\nBe brief."
    assert episode["messages"][0] == {"role": "system", "content": system}
    rounds = [(r["turn"], r["round"], r["stop"], r["score"]) for r in episode["rounds"]]
    assert rounds == [
        (0, 1, "answer", 0.5),
        (0, 2, "answer", 1.0),
        (1, 1, "max_steps", 0.5),
        (1, 2, "answer", 0.5),
        (2, 1, "skipped", 0),
    ]
    # by hand: S_avg (1 + 0.5 + 0) / 3; the first subtask passes at its second attempt
    expected = {"S_avg": 0.5, "Pass@1": 0.0, "Pass@2": 1 / 3}
    assert summary["by_task"][NAME] == pytest.approx(expected)
    assert episode["meta"]["solved"] is False and episode["meta"]["tool_calls"] == 7
    assert summary["faults"][NAME].startswith("a subtask counts as passed or failed")
    printed = capsys.readouterr().out
    assert f"beware: {NAME}: a subtask counts" in printed
    # the agent saw its folder and no other
    outputs = [message["content"] for message in episode["messages"] if message["role"] == "tool"]
    assert outputs[0].count("No such file or directory") == 3 and "subtask_count" not in outputs[0]
    assert (
        "Stdout: ..:\nattempt_01\n\n/workspace:\nscenario2\n\n/workspace/scenario2:\nagent\n"
        in outputs[0]
    )
    # a finished scenario is not run again
    before = len(endpoint.requests)
    assert run(network=True)[0] == rows and len(endpoint.requests) == before


def test_what_a_grader_is_told_and_reaches(endpoint, run):
    path = "/workspace/scenario2/agent/subtask1/workspace/attempt_01/a.txt"
    reply = call("write_file", file_path=path, content="1")
    endpoint.script["write 1"] = [reply | {"content": "At once."}, say("done")]
    _, _, meta, _ = run(subtasks=1, network=True)
    args = {"file_path": path, "content": "1"}
    wrote = f"Successfully created and wrote to new file: {path}."
    assert meta["events"] == [
        {"type": "assistant_message", "content": [{"type": "text", "text": "At once."}]},
        {"type": "tool_call", "tool_call_id": "c0", "tool_name": "write_file", "args": args},
        {"type": "tool_result", "tool_use_id": "c0", "content": wrote},
        {"type": "assistant_message", "content": [{"type": "text", "text": "done"}]},
        {"type": "completed", "metadata": {"session_id": f"{NAME}-0"}},
    ]
    assert meta["reached"] is False and meta["keys"] == []


@pytest.mark.parametrize(
    "mode, text",
    [
        ("crash", "the agent was asked 0 times, no such grader"),
        ("silent", "the agent was asked 0 times, 3 attempts scored"),
        ("outside", "the agent was asked 0 times, 2 attempts scored"),
        ("dots", "the agent was asked 0 times, 2 attempts scored"),
        ("link", "the agent was asked 0 times, "),
    ],
)
def test_a_grader_that_asks_nobody_is_no_score(endpoint, run, tmp_path, mode, text):
    rows, summary, _, code = run(mode)
    assert rows == [] and summary["not_run"] == {"check_not_started": 1} and code == 1
    [entry] = map(json.loads, tmp_path.joinpath("out/not_run.jsonl").read_text().splitlines())
    assert entry["detail"].startswith(text) and len(endpoint.requests) == 1  # the probe


def test_an_endpoint_that_fails_is_no_score(endpoint, run):
    endpoint.script["write 1"] = lambda body: (500, {}, "broken")
    rows, summary, _, code = run()
    assert rows == [] and summary["not_run"] == {"endpoint_error": 1} and code == 1
    endpoint.script["write 1"] = lambda body: say("no")  # it is up again: the same command goes on
    (episode,), _, _, _ = run()
    assert [record["score"] for record in episode["rounds"]] == [0.5, 0.5, 0, 0]


def once(*replies):
    """A script that answers so, one prompt after the other, and then always the last."""
    left = list(replies)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def test_what_the_model_left_cannot_take_a_scenario_out_of_the_mean(endpoint, run, capsys):
    """A grader that ends early, twice, is a 0 and not a scenario less: it was the agent's doing."""

    def begin(body):
        return shell("touch begun; sleep 2") if len(body["messages"]) == 2 else say("x")

    endpoint.script["write 1"] = begin
    rows, summary, _, _ = run("hasty")
    (episode,) = rows
    rounds = [(r["turn"], r["stop"], r["score"]) for r in episode["rounds"]]
    assert rounds == [(turn, "grader crashed", 0) for turn in range(3)]
    assert summary["rounds_ended_by"] == {"grader crashed": 3} and summary["metrics"]["S_avg"] == 0
    assert capsys.readouterr().out.count(f"{NAME}-0: grader crashed: ") == 2


def test_a_program_that_kills_its_grader_is_a_0(endpoint, run):
    def answer(body):
        is_asked = body["messages"][-1]["role"] == "user"
        return shell("echo 'kill -9 $PPID' > run.sh") if is_asked else say("done")

    endpoint.script["write 1"] = answer
    _, summary, _, _ = run("runs", subtasks=1)
    assert summary["rounds_ended_by"] == {"grader crashed": 1} and summary["metrics"]["S_avg"] == 0


EATERS = {
    "memory": ("python3 -c 'x = bytearray(500 << 20); import time; time.sleep(60)'", 0.5, "answer"),
    "processes": ("for i in {1..200}; do sleep 60 & done; wait", 0, "grader crashed"),
}


@pytest.mark.parametrize("script, score, stop", EATERS.values(), ids=EATERS)
def test_a_program_that_takes_too_much_is_the_models_doing(
    endpoint, run, v2, monkeypatch, script, score, stop
):
    """Our own guard ends it, and the grader goes on, or falls with it: a score, not a scenario less."""
    monkeypatch.setitem(v2.stage.LIMITS, "memory", 300 << 20)
    monkeypatch.setitem(v2.stage.LIMITS, "processes", 100)

    def answer(body):
        if body["messages"][-1]["role"] == "user":
            return call("write_file", file_path=f"{home(body)}/run.sh", content=script)
        return say("done")

    def home(body):
        place = "/workspace/scenario2/agent/subtask1/workspace/attempt_0"
        return place + ("2" if "attempt_02" in body["messages"][-1]["content"] else "1")

    endpoint.script["write 1"] = answer
    (episode,), summary, _, _ = run("runs", subtasks=1)
    assert summary["not_run"] == {} and summary["metrics"]["S_avg"] == score
    assert set(summary["rounds_ended_by"]) == {stop}


PLANTS = {
    "socket": "import socket; socket.socket(socket.AF_UNIX).bind('left')",
    "fifo": "import os; os.mkfifo('left')",
    "fifo below": "import os; os.makedirs('a/b'); os.mkfifo('a/b/left')",
    "a file of holes": "open('left', 'w').truncate(3 << 30)",  # each copy of it fills the disk
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_what_is_no_file_is_gone_before_the_grader_copies(endpoint, run, plant):
    endpoint.script["write 1"] = once(
        shell(f'echo -n 1 > a.txt; python3 -c "{plant}"; ls -R'), say("done")
    )
    (episode,), summary, _, _ = run("copies", subtasks=1)
    [output] = [message["content"] for message in episode["messages"] if message["role"] == "tool"]
    assert "left" in output and summary["metrics"]["S_avg"] == 1


LINKS = {
    "through /proc": "touch description.json; ln -s /proc/self/cwd/description.json a",
    "through another process": "touch description.json; ln -s /proc/2/cwd/description.json a",
    "a link to a link": "touch description.json; ln -s /proc/self/cwd b; ln -s b/description.json a",
    "a folder": "ln -s /proc/self/cwd a",
    "absolute": "ln -s /workspace/scenario2/description.json a",
    "relative": "ln -s ../../../../description.json a",
    "nowhere yet": "ln -s ../../description.json a",
    "in a locked folder": "mkdir d; ln -s /proc/self/cwd/description.json d/a; chmod 000 d",
}


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
def test_no_link_leads_the_grader_to_its_answers(endpoint, run, tmp_path, links):
    command = f"echo -n 1 > a.txt; ln -s a.txt kept; {links}; ls -la"
    endpoint.script["write 1"] = once(shell(command), say("done"))
    (episode,), summary, _, _ = run("copies", subtasks=1)
    assert summary["metrics"]["S_avg"] == 1
    copied = tmp_path / "out/workspaces" / f"{NAME}-0/evalspace/1.1"
    texts = [path.read_bytes() for path in copied.rglob("*") if path.is_file()]
    assert b"1" in texts and not any(b"subtask_count" in text for text in texts)
    assert copied.joinpath("kept").read_text() == "1"  # an honest link


def test_a_program_of_the_model_changes_no_module_of_the_grader(endpoint, run, tmp_path):
    """json.py beside the grader, written by what the grader runs: it cannot be written there."""
    script = (
        "for p in ../../../.. ../../.. ../.. ..; do echo 'raise SystemExit(0)' > $p/json.py; done"
    )
    script += (
        "; echo hacked > /workspace/scenario2/eval_task.py; echo 'print(1)' > /bridge/scores.py"
    )
    place = "/workspace/scenario2/agent/subtask1/workspace/attempt_01"
    reply = call("write_file", file_path=f"{place}/run.sh", content=script)
    endpoint.script["write 1"] = once(reply, say("done"))
    (episode,), summary, _, _ = run("runs", subtasks=1)
    assert [record["score"] for record in episode["rounds"]] == [0.5, 0.5]
    home = tmp_path / "out/workspaces"
    assert (home / f"{NAME}-0/json.py").exists()  # beside meta_eval.json: the program did run
    assert not (home / f"{NAME}-0.grader/json.py").exists()
    assert "hacked" not in (home / f"{NAME}-0.grader/eval_task.py").read_text()


# ----------------------------------------------------------------------------------------------------------
# The judges


@pytest.fixture
def judged(run, v2, make_endpoint, monkeypatch):
    """judged(answer) -> as run, with a judge whose answers are answer(body); its requests."""
    server = make_endpoint()
    known = {
        "scenarios": {"MCP/scenario2": {"judge": "score of 10"}},
        "refused": {},
        "packages": {},
    }
    monkeypatch.setattr(v2, "KNOWN", known)

    def judged(answer, patience_of_grader=60, **settings):
        class Script(dict):
            def get(self, first):
                return answer if "Answer in JSON" in first else None

        server.script = Script()
        judge = {"judge_model": "J", "judge_base_url": server.url}
        found = run("judge", 1, patience_of_grader, **judge | settings)
        return found, [
            body for body in server.requests if "Answer in JSON" in str(body["messages"])
        ]

    return judged


def test_a_judge_stands_behind_a_relay(judged, capsys):
    (rows, summary, meta, _), requests = judged(lambda body: say('{"score": 7}'))
    assert [record["score"] for record in rows[0]["rounds"]] == [0.7, 0.7]
    assert [body["model"] for body in requests] == ["J", "J"] and meta["reached"] is False
    assert capsys.readouterr().out.endswith(
        "agencybench-v2-MCP: S_avg 70.0% over 1 of 2 scenarios; judge J in the place of the authors'\n"
        "agencybench-v2: S_avg 70.0% over 1 of 32 scenarios; judge J in the place of the authors'\n"
    )


def dies(body):
    raise ConnectionAbortedError  # no answer at all


@pytest.mark.parametrize(
    "answer, reason, asked",
    [
        (dies, "endpoint_error", 1),
        (lambda body: (500, {}, "broken"), "endpoint_error", 1),
        (lambda body: (200, {}, "<html>"), "endpoint_error", 1),
        (lambda body: (200, {}, '{"choices": []}'), "endpoint_error", 1),
        (lambda body: say("It is fine."), "judge_undecided", 3),
        (lambda body: say(""), "judge_undecided", 3),
        (lambda body: say(None), "judge_undecided", 3),
        (lambda body: say('{"score": '), "judge_undecided", 3),
        (lambda body: say('{"verdict": 7}'), "judge_undecided", 3),
        (lambda body: say('{"score": 70}'), "judge_undecided", 3),
    ],
    ids=[
        "dead",
        "broken",
        "no JSON",
        "no choice",
        "prose",
        "empty",
        "null",
        "cut",
        "no score",
        "of 100",
    ],
)
def test_a_judge_that_does_not_decide_is_no_score(judged, answer, reason, asked, caplog):
    (rows, summary, _, code), requests = judged(answer)
    assert not caplog.records  # a traceback of asyncio's
    assert rows == [] and summary["not_run"] == {reason: 1} and code == 1
    assert len(requests) == asked


def test_a_judge_that_is_slower_than_the_grader_waits_is_no_score(judged, tmp_path):
    """The grader takes it for a 0, as five of the real ones do."""
    left = threading.Event()

    def wait(body):
        left.wait(60)
        return say('{"score": 7}')

    try:
        (rows, summary, _, code), requests = judged(wait, patience_of_grader=0.5)
    finally:
        left.set()
    assert rows == [] and summary["not_run"] == {"endpoint_error": 1} and code == 1
    [entry] = map(json.loads, tmp_path.joinpath("out/not_run.jsonl").read_text().splitlines())
    assert entry["detail"] == "the judge takes longer than the grader waits for it"


@pytest.mark.parametrize(
    "kind, text, read",
    [
        (
            "score of 10",
            'So:\n```json\n{"score": 7, "reason": "{}"}\n``` {x}',
            '{"score": 7, "reason": "{}"}',
        ),
        ("score of 10", '{"score": "7.5"}', '{"score": "7.5"}'),
        ("score of 10", '{"score": 0}', '{"score": 0}'),
        ("score of 10", '{"score": "7/10"}', None),
        ("score of 10", '{"score": true}', None),
        ("score of 10", '{"score": NaN}', None),
        ("score of 10", '{"score": -1}', None),
        ("score of 10", '{"score": null}', None),
        ("score of 10", "[7]", None),
        ("score of 1", '{"score": 0.5}', '{"score": 0.5}'),
        ("score of 1", '{"score": 5}', None),
        ("yes or no", "**Yes**, it says so.", "yes: it says so."),
        ("yes or no", "No. It does not say yes.", "no: It does not say yes."),
        ("yes or no", "The response covers it: yes", None),
        ("yes or no", "Nothing of it.", None),
        ("text", " as it is ", "as it is"),
        ("text", " ", None),
    ],
)
def test_what_a_grader_would_misread_is_no_answer_of_a_judge(v2, kind, text, read):
    assert v2.episode.as_asked(text, kind) == read


def test_a_scenario_with_a_judge_is_left_out_without_one(v2, tmp_path):
    folder = tmp_path / "AgencyBench-v2/Code/scenario2"
    folder.mkdir(parents=True)
    folder.joinpath("eval_task.py").write_text("")
    folder.joinpath("description.json").write_text('{"subtask_count": 1, "subtask1": "q"}')
    settings = {"clone": str(tmp_path), "venv": "venv"}
    tasks, left_out = v2.read_scenarios(v2.Settings(**settings))
    assert tasks == [] and left_out == {"agencybench-v2-Code-scenario2": "needs --judge_model"}
    _, left_out = v2.read_scenarios(v2.Settings(judge_model="J", **settings))
    assert left_out == {"agencybench-v2-Code-scenario2": "needs --repository"}
    settings |= {"judge_model": "J", "repository": "autogen"}
    tasks, left_out = v2.read_scenarios(v2.Settings(**settings))
    assert [task["query_id"] for task in tasks] == [
        "agencybench-v2-Code-scenario2"
    ] and left_out == {}


# ----------------------------------------------------------------------------------------------------------
# Pages, in chromium

# What a page of the model tries; each line's outcome is what fetch gives, or the name of its error
PAGE = r"""<title>A game</title><script>
const hack = JSON.stringify({command: "touch /workspace/scenario2/agent/hacked"});
const judge = JSON.stringify({model: "x", messages: [{role: "user", content: "from the page"}]});
const key = "/workspace/scenario2/description.json";
const blind = {mode: "no-cors"};
const tries = {
    itself: ["/index.html"],
    "the folder above": ["/%2e%2e/%2e%2e" + key],
    "a file": ["file://" + key],
    "a file, blind": ["file://" + key, blind],
    "a command": ["http://127.0.0.1:8088/v1/shell/exec", {method: "POST", body: hack}],
    "a command, blind": ["http://127.0.0.1:8088/v1/shell/exec", {method: "POST", body: hack, ...blind}],
    "the judge": ["http://127.0.0.1:8089/v1/chat", {method: "POST", body: judge}],
    "the judge, blind": ["http://127.0.0.1:8089/v1/chat", {method: "POST", body: judge, ...blind}],
    "its own browser": ["http://127.0.0.1:9222/json/list"],
    "a tab with a file": ["http://127.0.0.1:9222/json/new?file://" + key, {method: "PUT"}],
    "the machine": ["http://127.0.0.1:PORT/v1/models", blind],
    "the network": ["http://1.1.1.1/", blind],
    "a name": ["http://example.com/", blind],
};
async function attempt(url, options) {
    try {
        const reply = await fetch(url, options);
        return `${reply.type} ${reply.status} ${(await reply.text()).slice(0, 7)}`;
    } catch (error) {
        return error.name;
    }
}
function picture(url) {
    return new Promise(done => {
        const image = new Image();
        image.onload = () => done("shown");
        image.onerror = () => done("not shown");
        image.src = url;
    });
}
function socket(url) {
    return new Promise(done => {
        const link = new WebSocket(url);
        link.onopen = () => done("open");
        link.onerror = () => done("not open");
    });
}
addEventListener("load", async () => {
    const said = {};
    for (const [name, words] of Object.entries(tries)) said[name] = await attempt(...words);
    said["a picture"] = await picture("file:///opt/venv/pyvenv.cfg");
    said["the judge's socket"] = await socket("ws://127.0.0.1:8089/v1/chat/completions");
    said["its browser's socket"] = await socket("ws://127.0.0.1:9222/devtools/browser");
    document.body.textContent = JSON.stringify(said);
    document.title = "done";
});
</script><body></body>"""
SAID = {"itself": "basic 200 <title>", "the folder above": "basic 404 <!DOCTY"}
SAID["a command, blind"] = "opaque 0 "  # it was sent; the stand-in did nothing
REFUSED = (
    "a file",
    "a file, blind",
    "a command",
    "the judge",
    "the judge, blind",
    "its own browser",
)
REFUSED += ("a tab with a file", "the machine", "the network", "a name")
SAID |= dict.fromkeys(REFUSED, "TypeError")
SAID |= {
    "a picture": "not shown",
    "the judge's socket": "not open",
    "its browser's socket": "not open",
}


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (apt install chromium)")
def test_a_page_of_the_model_reaches_nothing_but_itself(endpoint, run, v2, tmp_path, monkeypatch):
    """In chromium, shown as the graders do it, by the stand-in of their container."""
    pytest.importorskip("websockets")
    known = {
        "scenarios": {"MCP/scenario2": {"browser": True, "judge": "text"}},
        "refused": {},
        "packages": {},
    }
    monkeypatch.setattr(v2, "KNOWN", known)
    place = "/workspace/scenario2/agent/subtask1/workspace/attempt_01/index.html"
    page = PAGE.replace("PORT", endpoint.url.split(":")[2].split("/")[0])
    endpoint.script["write 1"] = once(
        call("write_file", file_path=place, content=page), say("done")
    )
    judge = {"judge_model": "J", "judge_base_url": endpoint.url}
    (episode,), summary, meta, code = run("page", subtasks=1, **judge)
    assert meta["page"] == {"said": SAID, "picture": "iVBORw0KGgo", "big": True}
    assert not list(tmp_path.glob("out/workspaces/**/hacked"))
    assert "from the page" not in [body["messages"][-1]["content"] for body in endpoint.requests]
    assert [record["score"] for record in episode["rounds"]] == [1.0] and code == 0


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (apt install chromium)")
def test_a_browser_that_does_not_start_is_no_score(endpoint, run, v2, monkeypatch, tmp_path):
    known = {"scenarios": {"MCP/scenario2": {"browser": True}}, "refused": {}, "packages": {}}
    monkeypatch.setattr(v2, "KNOWN", known)
    here = tmp_path / "here"
    shutil.copytree(v2.HERE, here)
    api = here / "sandbox_api.py"
    api.write_text(api.read_text().replace('"/usr', '"/nowhere'))
    monkeypatch.setattr(v2.episode, "HERE", here)
    rows, summary, _, code = run("page", subtasks=1)
    assert rows == [] and summary["not_run"] == {"check_not_started": 1} and code == 1
    [entry] = map(json.loads, tmp_path.joinpath("out/not_run.jsonl").read_text().splitlines())
    assert entry["detail"] == "the agent was asked 0 times, Bail out! chromium does not start"


# ----------------------------------------------------------------------------------------------------------
# Scores, and which scenarios


def test_scores_as_the_graders_write_them(stage):
    sys.path.insert(0, str(ROOT / "recipes/benchmarks/agencybench_v2"))
    attempt_scores = stage("scores").attempt_scores
    skipped = {"attempt_index": 0, "success": False, "loss": None}

    def meta(*subtasks, **more):
        return {"subtasks": [{"attempts": list(attempts)} for attempts in subtasks]} | more

    backend = meta([{"attempt_index": 1, "score": 3}, {"attempt_index": 2, "score": 9.9}], [])
    assert attempt_scores(backend) == [[3, 9.9], []]
    research = meta([{"attempt_index": 1, "rubric": {"score": 8.33}}])
    assert attempt_scores(research) == [[8.33]]
    losses = [
        {"attempt_index": k, "success": False, "loss": loss} for k, loss in ((1, 0.1), (2, 1e-5))
    ]
    assert attempt_scores(meta(losses, [skipped], best_loss=1e-5, final_score=6)) == [[0, 6], []]
    none = meta(
        [{"attempt_index": 1, "success": False, "loss": None}], best_loss=None, final_score=0
    )
    assert attempt_scores(none) == [[0]]
    page = {"attempt_index": 1, "text_result": {"score": 8.0}, "vision_result": {"score": 5.0}}
    assert attempt_scores({"subtasks": {"subtask1": {"attempts": [page]}}}) == [[6.5]]
    assert attempt_scores(meta([{"attempt_index": 1, "judge_score": 0.5}])) == [[5]]
    files = [{"attempt_index": 1, "score": 10}]
    assert attempt_scores(meta(files, files, rubric_recall=0.4, final_score=8)) == [[10], [8]]
    mcp = meta([{"attempt_index": 1, "success": False}, {"attempt_index": 2, "success": True}], [])
    assert attempt_scores(mcp) == [[0, 10], []]


def test_a_part_never_stands_beside_the_paper(v2, capsys):
    """Of a capability that is whole, and of the 32, the published numbers; by hand: 1/3 of the way to 100."""
    backend = {}
    for number, score in ((1, 0), (2, 0), (3, 1)):
        backend[f"agencybench-v2-Backend-scenario{number}"] = {"S_avg": score}
    mcp = {"agencybench-v2-MCP-scenario2": {"S_avg": 0.5}}
    rows = v2.by_capability(backend | mcp)
    assert {name: (row["scenarios"], row["of"]) for name, row in rows.items()} == {
        "agencybench-v2": (4, 32),
        "agencybench-v2-Game": (0, 10),
        "agencybench-v2-Frontend": (0, 3),
        "agencybench-v2-Backend": (3, 3),
        "agencybench-v2-Code": (0, 9),
        "agencybench-v2-Research": (0, 5),
        "agencybench-v2-MCP": (1, 2),
    }
    assert (
        rows["agencybench-v2"]["S_avg"] == 0.375
        and rows["agencybench-v2-Backend"]["S_avg"] == 1 / 3
    )
    assert rows["agencybench-v2-Game"]["S_avg"] is None
    assert [name for name, row in rows.items() if row["published"]] == ["agencybench-v2-Backend"]
    assert rows["agencybench-v2-Backend"]["published"]["GLM-4.6"] == 20.0
    v2.print_scores(rows, None)
    lines = capsys.readouterr().out.splitlines()
    start = "agencybench-v2-Backend: S_avg 33.3% over 3 of 3 scenarios; published: GPT-5.2 61.0, "
    assert lines[0].startswith(start)
    assert lines[1:] == [
        "agencybench-v2-MCP: S_avg 50.0% over 1 of 2 scenarios",
        "agencybench-v2: S_avg 37.5% over 4 of 32 scenarios",
    ]


def test_a_program_that_is_missing_is_named_with_its_package(run, v2, monkeypatch, capsys):
    known = {"scenarios": {"MCP/*": {"programs": ["no-such-browser"]}}, "refused": {}}
    monkeypatch.setattr(v2, "KNOWN", known | {"packages": {"no-such-browser": "a-package"}})
    rows, summary, _, code = run()
    assert rows == [] and summary["not_run"] == {"missing_need": 1} and code == 1
    printed = capsys.readouterr().out
    assert "\nmissing: no-such-browser: apt install a-package\n" in "\n" + printed
    assert f"not run: {NAME}-0: missing_need: no-such-browser\n" in printed


def test_every_program_of_a_scenario_has_its_package(v2):
    programs = set()
    for facts in v2.KNOWN["scenarios"].values():
        programs.update(facts.get("programs", []))
    assert programs - {"network"} == v2.KNOWN["packages"].keys()


def test_which_scenarios_run(v2, tmp_path, run_stage, one_line_error):
    for name in ("Backend/scenario1", "Backend/scenario2", "MCP/scenario1", "Research/scenario3"):
        folder = tmp_path / "AgencyBench-v2" / name
        folder.mkdir(parents=True)
        folder.joinpath("eval_task.py").write_text("")
        folder.joinpath("description.json").write_text('{"subtask_count": 1, "subtask1": "q"}')
    tasks, left_out = v2.read_scenarios(v2.Settings(clone=str(tmp_path), venv="/venv"))
    assert [
        (t["query_id"], t["domain"], len(t["turns"]), str(t["venv"]), t["needs"]) for t in tasks
    ] == [
        ("agencybench-v2-Backend-scenario1", "vibe_coding", 1, "/venv", ["make", "g++"]),
        ("agencybench-v2-Backend-scenario2", "vibe_coding", 1, "/venv", ["javac", "java"]),
        ("agencybench-v2-Research-scenario3", "research", 1, "/venv", []),
    ]
    assert left_out == {"agencybench-v2-MCP-scenario1": "needs a GitHub account"}
    script = "recipes/benchmarks/agencybench_v2.py"
    flags = [
        "--model",
        "x",
        "--base_url",
        "http://localhost:1/v1",
        "--output_dir",
        tmp_path / "out",
    ]
    one_line_error(run_stage(script, *flags), "--clone DIR and --venv DIR are needed")
    flags += ["--clone", tmp_path, "--venv", tmp_path, "--scenarios"]
    result = run_stage(script, *flags, "Code/*")
    one_line_error(result, "--scenarios Code/*: not in", "Backend/scenario1, Backend/scenario2")
    one_line_error(run_stage(script, *flags, "MCP/*"), "no scenario is left to run")
    result = run_stage(script, *flags, "Backend/*", "--repository", "nowhere")
    one_line_error(result, "--repository nowhere: no such folder")
    result = run_stage(script, *flags, "Backend/*")
    one_line_error(result, f"{tmp_path}: sii-agent-sdk==0.1.11 is not installed there")
    result = run_stage(script, *flags, "MCP/*", "--agent", "nothing")
    one_line_error(result, "--agent nothing: its graders ask a model")
    result = run_stage(script, *flags, "MCP/*", "--sandbox", "none")
    one_line_error(result, "its graders run in bubblewrap")
    assert "\n\nAgencyBench v2 by its own graders" in run_stage(script, "--help").stdout
    result = run_stage(script, *flags, "MCP/*", "--compare", "a", "b")
    one_line_error(result, "--compare is for 04_eval.py alone")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"subtask_count": "1"}', "can only concatenate str"),
        ('{"subtask_count": 2, "subtask1": "q"}', "'subtask2': check the clone out again"),
    ],
)
def test_a_description_that_is_damaged_is_named(v2, tmp_path, text, said):
    folder = tmp_path / "AgencyBench-v2/MCP/scenario2"
    folder.mkdir(parents=True)
    folder.joinpath("eval_task.py").write_text("")
    folder.joinpath("description.json").write_text(text)
    with pytest.raises(v2.stage.InputError) as error:
        v2.read_scenarios(v2.Settings(clone=str(tmp_path), venv="/venv"))
    assert str(error.value).startswith(f"{folder}/description.json: ") and said in str(error.value)


def test_a_clone_of_another_version_is_asked_nothing(run, tmp_path, capsys):
    (tmp_path / "clone").mkdir()
    subprocess.run(["git", "init", "--quiet", tmp_path / "clone"], check=True)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "are not as in its commit: git clone it, then git checkout ec65324" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval_task.py", "data/reference.txt"])
def test_a_scenario_with_a_file_that_is_missing_is_left_out(v2, tmp_path, monkeypatch, name):
    """A grader without its data crashes once the agent has worked: a 0 for the model."""
    clone = tmp_path / "clone"
    path = clone / "AgencyBench-v2/Code/scenario1" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm all"):
        subprocess.run(["git", "-C", clone, *words.split()], check=True)
    commit = subprocess.check_output(["git", "-C", clone, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr(v2, "COMMIT", commit)
    path.unlink()
    assert v2.other_files("Code/scenario1", path.parents[name.count("/")]) == f"not as in commit {commit}: {name}"
    other = clone / "AgencyBench-v2/MCP/scenario2"
    other.mkdir(parents=True)
    assert v2.other_files("MCP/scenario2", other) is None


# ----------------------------------------------------------------------------------------------------------
# The real graders, with a model that solves a part; by words of the prompt

CHAT_APP = """mkdir -p src
printf 'task1:\\n\\tmkdir -p bin; g++ -o bin/chat_app src/main.cpp\\n' > Makefile
printf '#include <cstdio>\\nint main() { puts("1.0.0"); }\\n' > src/main.cpp"""
KINETICS = """mkdir docs logs && python3 evaluate_equation.py > logs/subtask1_evaluate.txt
cp equation.py docs/subtask1_rationale.md"""
OSCILLATOR = r"""cd workspace && cat > equation.py <<'P'
import numpy as np
def equation(x, t, v, p):
    s, e = np.sin(t), np.exp(-t)
    return (p[0] * x + p[1] * x * s + p[2] * v * s + p[3] * np.sin(2 * t) + p[4] * x ** 5 + p[5] * e
            + p[6] * x * e + p[7] * x * x * v + p[8] * x * v * v + p[9] * abs(x))
P
printf '{"loss": %s, "equation": "", "comment": ""}' $(python3 evaluate_equation.py) > subtask1_result.json"""
FOLDERS = """cd desktop_2 && mkdir -p workspace_v2/knowledge_base workspace_v2/dev_bundle/{tests,source} \
workspace_v2/data_warehouse/{legacy_archives,active_datasets}"""
PLANS = {"Build the baseline CLI": CHAT_APP, "baseline reaction-rate": KINETICS}
PLANS |= {"(attempt 2/2). Target": OSCILLATOR, "Current focus: subtask1 (attempt 2": FOLDERS}

# As the graders' own functions give them, called by hand on the files that such a run left
SCORES = {
    "Backend/scenario1": [3, 3, 0, 0, 0, 0, 0, 0, 0, 0],
    "Code/scenario1": [10, 0, 0, 0, 0, 0, 0, 0, 0],
    "Code/scenario6": [0, 2],
    "MCP/scenario2": [0, 10, 0, 0],
}


needs_clone = pytest.mark.skipif(
    "AGENCYBENCH" not in os.environ or "AGENCYBENCH_VENV" not in os.environ,
    reason="needs AGENCYBENCH=CLONE of GAIR-NLP/AgencyBench, AGENCYBENCH_VENV=ENVIRONMENT with its packages",
)


@pytest.fixture
def real(endpoint, tmp_path, run_stage):
    """real(answer, *scenarios, judge flags) -> {scenario: [score of 10 of each attempt]}; answer(body) is the
    model's, or the judge's."""

    class Script(dict):
        def get(self, first):
            return self["answer"]

    def run(answer, scenarios, *flags):
        endpoint.script = Script(answer=answer)
        flags += ("--model", "x", "--base_url", endpoint.url, "--patience", 0, "--concurrency", 2)
        flags += ("--clone", os.environ["AGENCYBENCH"], "--venv", os.environ["AGENCYBENCH_VENV"])
        flags += ("--output_dir", tmp_path / "out", "--scenarios", *scenarios)
        result = run_stage("recipes/benchmarks/agencybench_v2.py", *flags, timeout=1800)
        assert result.returncode == 0, result.stderr
        scores = {}
        for line in tmp_path.joinpath("out/episodes.jsonl").read_text().splitlines():
            episode = json.loads(line)
            name = "/".join(episode["query_id"].removeprefix("agencybench-v2-").rsplit("-", 1))
            graded = [record for record in episode["rounds"] if record["stop"] != "skipped"]
            scores[name] = [10 * record["score"] for record in graded]
        return scores

    return run


@needs_clone
def test_the_real_graders(real):
    def solve(body):
        users = [message["content"] for message in body["messages"] if message["role"] == "user"]
        commands = [command for words, command in PLANS.items() if words in users[-1]]
        asked = body["messages"][-1]["role"] == "user"
        return shell(commands[0]) if commands and asked else say("done")

    assert real(solve, SCORES) == SCORES


@needs_clone
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (apt install chromium)")
def test_a_real_grader_of_pages_shows_them_to_its_judges(real, endpoint):
    """A page for each of five subtasks; one attempt each, since both judges give 7."""
    page = "<title>Gomoku</title><body style='background: teal'><h1 id='board'>Board</h1></body>"
    files = [{"path": name, "content": page} for name in ("index.html", "styles.css", "app.js")]

    def answer(body):
        if body["model"] == "J":
            return say('{"score": 7, "confidence": 0.9, "reason": "ok"}')
        return say(json.dumps({"files": files}))

    judge = ("--judge_model", "J", "--judge_base_url", endpoint.url)
    assert real(answer, ["Game/scenario1"], *judge) == {"Game/scenario1": [7, 7, 7, 7, 7]}
    shown = []
    for body in endpoint.requests:
        for message in body["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else []
            shown += [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert len(shown) >= 5 and all(url.startswith("data:image/png;base64,iVBOR") for url in shown)
