"""The demo as a user starts it: real trainer, real vLLM, real sandbox; then once more, which must reuse everything."""

import json
import subprocess

import pytest
from conftest import ROOT


def demo():
    result = subprocess.run(["bash", "recipes/demo/run.sh"], cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.demo
@pytest.mark.vllm
def test_what_is_trained_is_what_is_served():
    demo()
    base, tuned = (json.loads((ROOT / f"results/demo/{n}/summary.json").read_text()) for n in ("base", "tuned"))
    assert base["tasks"] == tuned["tasks"] == 8
    assert base["metrics"]["SR@3"] == 0.0
    assert tuned["metrics"]["SR@3"] >= 0.9
    assert tuned["metrics"]["parse_errors"] == 0
    # the recorded trajectories of two tasks need a second round: a replay must show that, not only success
    assert tuned["by_task"]["roman"]["FTFC"] == 0.75 and tuned["by_task"]["roman"]["SR@3"] == 1.0

    # a tuned episode is the trained one, message by message, but for the ids of its calls
    def calls(messages):
        return [[call["function"] for call in message.get("tool_calls", [])] for message in messages]

    trained = {row["query_id"]: row for row in map(json.loads, (ROOT / "data/demo/train.jsonl").open())}
    episodes = [json.loads(line) for line in (ROOT / "results/demo/tuned/episodes.jsonl").open()]
    same = sum(
        calls(e["messages"]) == calls(row["messages"])
        for e in episodes
        for row in trained.values()
        if row["messages"][1]["content"] == e["messages"][1]["content"] and row["tools"] == e["tools"]
    )
    assert same >= 7, f"only {same} of 8 episodes replay their trajectory call by call"

    before = (ROOT / "outputs/demo/tuned/recipe.json").stat().st_mtime_ns
    again = demo()
    assert again.count("8 of 8 episodes done") == 2
    assert (ROOT / "outputs/demo/tuned/recipe.json").stat().st_mtime_ns == before
