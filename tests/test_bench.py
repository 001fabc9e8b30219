"""recipes/bench.py measures what it says: the loop does all its steps, what is sent raw is what 04 sent."""

import importlib.util
import json
import shutil
import types

import pytest
from conftest import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"recipes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("bench")


@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
def test_the_agent_loop_does_every_step(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "EPISODES", 2)
    monkeypatch.setattr(bench, "STEPS", 3)
    options = types.SimpleNamespace(inspect_python=None)
    name, figures = next(bench.bench_agent(tmp_path, options))
    assert name.startswith("04's loop") and figures.endswith("(6 steps)")


def test_a_conversation_is_sent_again_token_for_token(bench):
    """Of a prompt with which the next one begins, 04 keeps the length."""
    served = [
        {"prompt_token_ids": 2, "token_ids": [7]},
        {"prompt_token_ids": 4, "token_ids": [8, 9]},
        {"prompt_token_ids": [1, 2, 7, 3, 8, 9, 4], "token_ids": [5]},
        {"prompt_token_ids": [1, 6], "token_ids": [5, 5, 5]},
    ]
    expected = [([1, 2], 1), ([1, 2, 7, 3], 2), ([1, 2, 7, 3, 8, 9, 4], 1), ([1, 6], 3)]
    assert bench.requests_of({"served": served}) == expected


def test_the_made_logs_are_logs_of_sii_cli(bench, run_stage, tmp_path):
    messages = bench.trajectory(1000)
    (tmp_path / "log.json").write_text(json.dumps(bench.sii_log("one", messages)))
    done = run_stage("02_format_trajectories.py", tmp_path / "log.json", "--output_file", tmp_path / "t.jsonl")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert [message["content"] for message in row["messages"]] == [one["content"] for one in messages]


def test_a_part_that_does_not_exist_is_told(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(types.SimpleNamespace(parts=["agent", "date"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "bench.py: date: no such part; there are data, agent, share, kill\n"


def test_only_pairs_in_which_both_ran_are_compared():
    assert load("bench_sft").ratios_of([None, 3.0, 8.0], [2.0, 6.0, 2.0]) == [0.5, 4.0]
