"""Stage 4: a run that goes on is the same run, and its numbers are what the definitions say."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scripted import call, say, write_tasks

ROOT = Path(__file__).resolve().parent.parent
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


@pytest.fixture(scope="module")
def m(stage):
    return stage("04_eval")


# --------------------------------------------------------------------------------------------------------
# What may change between two starts

REFUSED = {
    "the model": {"model": "other"},
    "the rounds": {"rounds": 2},
    "the temperature": {"temperature": 0.0},
    "top_p": {"top_p": 1.0},
    "the length of an answer": {"max_tokens": 9},
    "the seed": {"seed": 1},
    "the steps": {"max_steps": 9},
    "the time of a round": {"max_seconds": 9},
    "no tools": {"no_tools": True},
    "who grades": {"feedback": "human"},
    "the network": {"network": True},
    "the time of a command": {"command_seconds": 9},
    "the time of a check": {"check_seconds": 9},
    "the body of a request": {"request": {"top_k": 1}},
    "its headers": {"headers": {"x-provider": "other"}},
    "reasoning sent back": {"send_reasoning": False},
    "the server's parser": {"tool_call_parser": "hermes"},
}
FREE = {
    "nothing": {},
    "episodes at a time": {"concurrency": 1},
    "patience": {"patience": 7},
    "prices": {"price_in": 1.0, "price_out": 2.0},
    "what may be spent": {"price_in": 1.0, "price_out": 2.0, "max_usd": 9.0},
    "the name of the key": {"api_key_env": "OTHER_KEY"},
    "the address": {"base_url": ["http://127.0.0.1:9/v1"]},
    "fewer tasks": {"limit": 1},
}
SHOUT = "def shout(): return ''\nFUNCTION = {'name': 'shout', 'parameters': {'type': 'object'}}\n"
SHOUT += "TOOLS = [{'type': 'function', 'function': FUNCTION}]\n"


@pytest.fixture
def given(tmp_path):
    """given(**changes of the first task) -> two tasks; the folders stand in tmp_path."""
    for name in ("start", "hidden"):
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "file").write_text("1")
    task = {"query_id": "t", "workspace": "start", "private": "hidden", "system": "Work."}
    task["turns"] = [{"query": "q", "check": "true"}]
    other = {"query_id": "u", "turns": [{"query": "q", "check": "true"}]}
    return lambda **changes: (task | changes, other)


@pytest.fixture
def start(m, endpoint, evaluate, given):
    """start(*tasks, **settings) -> "refused: why" or "free"."""
    endpoint.script["q"] = [say("done")]

    def run(*tasks, **settings):
        try:
            evaluate(*(tasks or given()), **settings)
        except m.InputError as error:
            assert "name another --output_dir" in str(error)
            return "refused: " + str(error).partition("(")[2]
        return "free"

    return run


@needs_bwrap
def test_settings_that_change_a_score_end_a_run_that_goes_on(start, endpoint):
    assert start() == "free"
    asked = len(endpoint.requests)
    told = {change: start(**settings) for change, settings in REFUSED.items()}
    for change, settings in REFUSED.items():
        assert told[change].startswith(f"refused: {next(iter(settings))} "), change
    free = {change: start(**settings) for change, settings in FREE.items()}
    assert free == dict.fromkeys(FREE, "free") and len(endpoint.requests) == asked
    assert start(n_runs=2) == "free" and len(endpoint.requests) == asked + 3  # a probe, two more episodes


@needs_bwrap
def test_tasks_tools_and_script_belong_to_a_run(start, given, m, tmp_path, monkeypatch):
    assert start() == "free"
    query, check = {"query": "q!", "check": "true"}, {"query": "q", "check": "true; true"}
    changed = {
        "its text": given(turns=[query]),
        "its check": given(turns=[check]),
        "a turn more": given(turns=[{"query": "q", "check": "true"}] * 2),
        "its system prompt": given(system="Work!"),
        "its tools": given(tools=[{"function": {"name": "glob", "parameters": {"type": "object"}}}]),
        "what it needs": given(needs=["bash"]),
        "no private folder": given(private=None),
        "a task more": (*given(), {"query_id": "v", "turns": [query]}),
        "another order": tuple(reversed(given())),
    }
    for change, tasks in changed.items():
        assert start(*tasks).startswith("refused: tasks_sha256 "), change
    for name in ("start", "hidden"):
        file = tmp_path / name / "file"
        file.write_text("2")
        assert start().startswith("refused: tasks_sha256 "), f"a file in {name}"
        file.write_text("1")
        file.chmod(0o755)
        assert start().startswith("refused: tasks_sha256 "), f"what may be run in {name}"
        file.chmod(0o644)
        file.with_name("empty").mkdir()
        assert start().startswith("refused: tasks_sha256 "), f"a folder in {name}"
        file.with_name("empty").rmdir()
    tmp_path.joinpath("shout.py").write_text(SHOUT)
    assert start(tools=str(tmp_path / "shout.py")).startswith("refused: tools_sha256 ")
    assert start() == "free"
    tmp_path.joinpath("changed.py").write_text(Path(m.__file__).read_text() + "# a word\n")
    monkeypatch.setattr(m, "__file__", str(tmp_path / "changed.py"))
    assert start().startswith("refused: script_sha256 ")


# --------------------------------------------------------------------------------------------------------
# A person's day


@pytest.fixture
def session(endpoint, tmp_path):
    """session(text, *flags) -> (exit code, output, errors) of a person who types the text."""
    turns = [{"query": "q"}, {"query": "and then?"}]
    path = write_tasks(tmp_path, {"query_id": "t", "turns": turns})
    command = [sys.executable, ROOT / "04_eval.py", "--feedback", "human", "--tasks", path, "--model", "x"]
    command += ["--base_url", endpoint.url, "--output_dir", tmp_path / "out", "--patience", "0"]

    def run(text, *flags, pid=None):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([*map(str, command), *flags], **pipes)
        if pid is not None:
            pid.append(process.pid)
        output, error = process.communicate(text.encode("latin-1"), timeout=120)
        assert b"Traceback" not in error, error.decode()
        return process.returncode, output.decode(), error.decode()

    return run


def rows_of(folder):
    return [json.loads(line) for line in folder.joinpath("out/episodes.jsonl").read_text().splitlines()]


@needs_bwrap
def test_what_a_person_has_said_outlives_a_kill(endpoint, session, tmp_path):
    """SIGKILL while the model works on the second turn: the first one, which was accepted, is not asked again."""
    process = []

    def die():
        os.kill(process[0], signal.SIGKILL)
        return say("nobody hears this")

    work = call("run_shell_command", command="echo mine > note; rm -f gone")
    second = [call("run_shell_command", command="cat note"), say("second")]
    endpoint.script["q"] = lambda body: die() if done(body) == 2 else dict([work, say("first")][done(body)])
    assert session("accept\n", pid=process)[0] == -signal.SIGKILL
    endpoint.requests.clear()
    endpoint.script["q"] = lambda body: dict(second[done(body) - 2])
    shutil.rmtree(tmp_path / "out/workspaces/t-0")  # what the agent made is kept elsewhere, too
    code, output, error = session("accept\n")
    assert code == 0 and "--- assistant\nfirst" not in output and len(endpoint.requests) == 1 + 2, error
    (row,) = rows_of(tmp_path)
    assert [(r["turn"], r["score"]) for r in row["rounds"]] == [(0, 1), (1, 1)]
    assert "Stdout: mine" in row["messages"][-2]["content"] and row["meta"]["steps"] == 4


def done(body):
    return sum(message["role"] == "assistant" for message in body["messages"])


@needs_bwrap
def test_a_day_that_ended_at_the_question_goes_on_there(endpoint, session, tmp_path):
    """The files are those of that day, even where somebody has removed or changed the folder."""
    work = call("run_shell_command", command="echo mine > note")
    endpoint.script["q"] = [work, say("first"), say("second")]
    assert session("")[0] == 130
    tmp_path.joinpath("out/workspaces/t-0/note").write_text("another's\n")
    code, output, _ = session("accept\naccept\n")
    assert code == 0 and "+mine" in output and "another's" not in output


@needs_bwrap
def test_a_damaged_state_of_a_day_is_told(endpoint, session, tmp_path):
    endpoint.script["q"] = [say("first"), say("second")]
    assert session("")[0] == 130
    state = tmp_path / "out/workspaces/t-0.json"
    for text, told in (("{", "not valid JSON"), ('{"rounds": 5}', "damaged"), ("[]", "expected a JSON object")):
        state.write_text(text)
        code, _, error = session("accept\n")
        assert code == 2 and f"t-0.json: {told}" in error


@needs_bwrap
def test_other_settings_do_not_mix_into_an_open_episode(endpoint, session):
    endpoint.script["q"] = [say("first"), say("second")]
    assert session("accept\n")[0] == 130  # one turn is accepted, the second one waits
    for change in (["--seed", "7"], ["--rounds", "2"], ["--temperature", "1.5"]):
        code, _, error = session("accept\n", *change)
        assert code == 2 and change[0].strip("-") in error
    assert session("accept\n")[0] == 0


@needs_bwrap
def test_feedback_that_is_no_utf8_is_read(endpoint, session, tmp_path):
    endpoint.script["q"] = [say("first"), say("second"), say("third")]
    assert session("\xff\xfe bad\n.\naccept\naccept\n")[0] == 0
    said = [message["content"] for message in rows_of(tmp_path)[0]["messages"] if message["role"] == "user"]
    assert said == ["q", "\ufffd\ufffd bad", "and then?"]


# --------------------------------------------------------------------------------------------------------
# Killed ten times

# Each start is a fork of a process that has imported everything. It kills itself at an event that is counted;
# then the endpoint is told which episodes are there
KILLS = """
import asyncio, importlib, json, os, signal, sys
from pathlib import Path
import httpx
sys.path.insert(0, ".")
stage = importlib.import_module("04_eval")
settings, moments = json.loads(sys.argv[1])

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_line(self, key, row):
    self.file.write(json.dumps(row)[:200])
    self.file.flush()
    killed()

def die_at(owner, name, count):
    owner = getattr(stage, owner) if owner else stage
    plain = getattr(owner, name)
    left = iter(range(count - 1, -1, -1))
    setattr(owner, name, lambda *given, **more: plain(*given, **more) if next(left) else killed())

for moment in [*moments, None]:
    child = os.fork()
    if child == 0:
        if moment == "half a line":
            stage.Ledger.scored = half_a_line
        elif moment:
            die_at(*moment)
        os._exit(stage.main(stage.Settings(**settings)))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    there = [row["query_id"] for _, row in stage.read_jsonl(settings["output_dir"] + "/episodes.jsonl", True)]
    told = {"messages": [{"role": "user", "content": "killed"}], "there": there, "code": code}
    httpx.post(settings["base_url"][0] + "/chat/completions", json=told)
"""
MOMENTS = [
    ["Endpoint", "post", 3],  # of one start: before its third request, its 20th reply ...
    ["", "read_reply", 20],
    ["Ledger", "scored", 1],
    ["Sandbox", "start", 60],
    ["Ledger", "scored", 6],
    "half a line",
    ["Episode", "grade", 9],
    ["", "remove", 30],
    ["Ledger", "stop_in_time", 22],
    ["", "write_summary", 1],
]


@needs_bwrap
@pytest.mark.kills
def test_ten_kills_lose_no_episode_and_repeat_none(endpoint, tmp_path):
    """40 episodes, 16 at once: each is in the file once, and none that is there is asked for again."""
    tasks = []
    for n in range(40):
        endpoint.script[f"q{n}"] = [call("run_shell_command", command=f"echo {n} > x"), say("done")]
        tasks.append((f"t{n}", [(f"q{n}", f"grep -x {n} x")]))
    out = tmp_path / "out"
    settings = {"model": "x", "base_url": [endpoint.url], "tasks": [str(write_tasks(tmp_path, *tasks))]}
    settings |= {"output_dir": str(out), "concurrency": 16, "patience": 1}
    command = [sys.executable, "-c", KILLS, json.dumps([settings, MOMENTS])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    there = set()
    codes = []
    for body in endpoint.requests:
        if "there" in body:
            assert len(body["there"]) == len(set(body["there"])) and there <= set(body["there"])
            there = set(body["there"])
            codes.append(body["code"])
        else:
            assert body["messages"][1]["content"].replace("q", "t") not in there
    assert codes == [-signal.SIGKILL] * 10 + [0]
    rows = rows_of(tmp_path)
    assert sorted(row["query_id"] for row in rows) == sorted(f"t{n}" for n in range(40))
    assert all(row["meta"]["solved"] and row["meta"]["steps"] == 2 for row in rows)
    assert json.loads(out.joinpath("summary.json").read_text())["not_run"] == {}
    assert sorted(os.listdir(out / "workspaces")) == sorted(f"t{n}-0" for n in range(40))
    assert "40 of 40 episodes done" in result.stdout


# --------------------------------------------------------------------------------------------------------
# The numbers, by another hand


def draw_run(draw):
    """Episodes of 3 to 12 tasks, as a run of R rounds leaves them."""
    limit = draw.randint(1, 5)
    runs = draw.randint(1, 4)
    episodes = []
    for task, run in itertools.product(range(draw.randint(3, 12)), range(runs)):
        turns = random.Random(task).randint(1, 5)  # the same in all runs of a task
        rounds = []
        for turn in range(turns):
            for number in range(1, limit + 1):
                wanted = draw.randint(1, 7)
                met = draw.choice([wanted, draw.randint(0, wanted)])
                stop = draw.choice(["answer", "answer", "max_steps", "context_full"])
                record = {"turn": turn, "round": number, "stop": stop, "checks": []}
                rounds.append(record | {"score": met / wanted})
                if met == wanted or stop == "context_full":
                    break
        solved = {r["turn"] for r in rounds if r["score"] == 1} == set(range(turns))
        meta = {"solved": solved, "seconds": 1.0, "steps": 3, "tool_calls": 2, "parse_errors": 0}
        meta |= {"prompt_tokens": draw.randint(0, 99), "completion_tokens": 5, "states_not_kept": 0}
        episodes.append({"query_id": f"t{task}", "run": run, "rounds": rounds, "meta": meta})
    return episodes, limit


def scores_of(rounds, limit):
    """(FTFC, SR, RC) of one turn's rounds, exactly."""
    first = Fraction(rounds[0]["score"]).limit_denominator(7)
    solved = [record["round"] for record in rounds if record["score"] == 1]
    return first, Fraction(bool(solved)), Fraction(limit - solved[0] + 1, limit) if solved else Fraction(0)


def interval_of(values):
    """Percentiles of the means of 10,000 resamplings, by sorting; the draws are NumPy's."""
    if len(values) < 5:
        return None
    picks = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    means = []
    for row in picks.tolist():
        means.append(sum(values[pick] for pick in row) / len(values))
    means.sort()
    edges = []
    for share in (0.025, 0.975):
        at = share * (len(means) - 1)
        low = means[int(at)]
        edges.append(low + (means[min(int(at) + 1, len(means) - 1)] - low) * (at - int(at)))
    return edges


def drawn_chances(solved, k):
    """(every one, at least one) of k runs drawn from a task's runs, by trying all draws."""
    draws = list(itertools.combinations(solved, k))
    return Fraction(sum(map(all, draws)), len(draws)), Fraction(sum(map(any, draws)), len(draws))


def numbers_of(episodes, limit):
    """{metric: one value a task}, and the means over all turns."""
    by_task = {}
    solved = {}
    turns = []
    for episode in episodes:
        grouped = itertools.groupby(episode["rounds"], key=lambda record: record["turn"])
        scores = [scores_of(list(rounds), limit) for _, rounds in grouped]
        turns += scores
        each = [sum(column) / len(scores) for column in zip(*scores)]
        by_task.setdefault(episode["query_id"], []).append(each)
        solved.setdefault(episode["query_id"], []).append(episode["meta"]["solved"])
    numbers = {}
    for place, name in enumerate(("FTFC", f"SR@{limit}", f"RC@{limit}")):
        numbers[name] = []
        for runs in by_task.values():
            numbers[name].append(sum(run[place] for run in runs) / len(runs))
        numbers[f"{name} over turns"] = [score[place] for score in turns]
    for k in range(1, len(next(iter(solved.values()))) + 1):
        chances = [drawn_chances(runs, k) for runs in solved.values()]
        numbers[f"pass^{k}"], numbers[f"pass@{k}"] = map(list, zip(*chances))
    return numbers


def test_the_metrics_are_what_another_program_finds(m):
    draw = random.Random(1)
    seen = 0
    while seen < 200:
        episodes, limit = draw_run(draw)
        seen += len(episodes)
        metrics = m.summarize(episodes, m.Settings(model="x", rounds=limit))["metrics"]
        expected = numbers_of(episodes, limit)
        counts = {*m.STATS, "seconds"}
        assert {key for key in metrics if not key.endswith("_ci")} - counts == set(expected)
        for name, values in expected.items():
            assert metrics[name] == pytest.approx(float(sum(values) / len(values)), abs=6e-5), name
            if f"{name}_ci" in metrics:
                interval = interval_of([float(value) for value in values])
                assert metrics[f"{name}_ci"] == (interval and pytest.approx(interval, abs=6e-5)), name
        assert metrics["prompt_tokens"] == sum(episode["meta"]["prompt_tokens"] for episode in episodes)
