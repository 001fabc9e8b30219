"""recipes/curve.py: subsets, updates and tokens of every point; intervals, power and degeneration from made
results."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TASKS = 24


@pytest.fixture(scope="module")
def curve():
    sys.path.insert(0, str(ROOT / "recipes"))
    return importlib.import_module("curve")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# The plan


def small_recipe(root, **settings):
    """A recipe of 2 rows a batch and its 8 rows, of 100, 110, ... tokens."""
    folder = root / "recipes" / "small"
    folder.mkdir(parents=True)
    usual = {"model_name_or_path": "base", "global_batch_size": 2}
    usual |= {"num_train_epochs": 3, "warmup_steps": 1}
    (folder / "sft.yaml").write_text(json.dumps(usual | settings))
    return write_rows(root / "train.jsonl", 8)


def write_rows(path, number):
    lines = [json.dumps({"query_id": str(name)}) for name in range(number)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tokens_of(row):
    return 100 + 10 * int(row["query_id"])


@pytest.fixture
def planner(curve, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "ROOT", tmp_path)
    monkeypatch.setattr(curve, "row_tokens", lambda model, rows: [tokens_of(row) for row in rows])
    return curve


def points_of(root):
    return json.loads((root / "results/curve-small/curve.json").read_text())


def test_the_subsets_of_a_curve_are_nested(planner, tmp_path):
    planner.plan("small", small_recipe(tmp_path), [2, 4, 8], 2)
    for seed in (1, 2):
        parts = {}
        for size in (2, 4, 8):
            path = tmp_path / f"data/curve-small/rows-n{size}-seed{seed}.jsonl"
            parts[size] = [row["query_id"] for row in rows_of(path)]
        assert parts[2] == parts[8][:2] and parts[4] == parts[8][:4]
        assert sorted(parts[8]) == list("01234567")


def test_every_size_gets_equal_updates_or_equal_tokens(planner, tmp_path):
    planner.plan("small", small_recipe(tmp_path), [2, 8], 6)
    points = points_of(tmp_path)
    assert len(points) == 2 * 2 * 6
    for point in points:
        size, seed = point["size"], point["seed"]
        rows = rows_of(tmp_path / f"data/curve-small/rows-n{size}-seed{seed}.jsonl")
        mean = sum(map(tokens_of, rows)) / len(rows)
        as_many_tokens = round(12 * 135 / mean)  # 8 rows x 3 passes / 2
        alike = as_many_tokens in (11, 12, 13)  # one run for both
        expected = {"updates": 12, "tokens": 12 if alike else as_many_tokens}
        assert point["updates"] == expected[point["arm"]]
        assert point["tokens"] == round(2 * mean * point["updates"])
        if point["arm"] == "tokens" and not alike:
            assert point["tokens"] == pytest.approx(12 * 2 * 135, abs=mean)  # to half an update of two rows
    text = (tmp_path / "results/curve-small/runs.tsv").read_text()
    first, *others = text.splitlines()
    assert first == "base\tbase\t-\t0\t0"
    names = [line.split("\t")[0] for line in others]
    assert sorted(names) == sorted({point["run"] for point in points})


def test_a_second_set_has_the_same_sizes_and_all_its_rows(planner, tmp_path):
    others = write_rows(tmp_path / "other.jsonl", 30)
    planner.plan("small", small_recipe(tmp_path), [2, 8], 1, against=others)
    found = set()
    for point in points_of(tmp_path):
        found.add((point["set"], point["size"], point["arm"]))
        if point["set"] == "other" and point["arm"] == "updates":
            assert point["updates"] == 12
        if point["set"] == "other" and point["arm"] == "tokens":
            assert point["tokens"] == pytest.approx(12 * 2 * 135, abs=400)
    expected = set()
    for arm in planner.ARMS:
        expected |= {("rows", 2, arm), ("rows", 8, arm)}
        expected |= {("other", 2, arm), ("other", 8, arm), ("other", 30, arm)}
    assert found == expected
    assert len(rows_of(tmp_path / "data/curve-small/other-n30-seed1.jsonl")) == 30


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_train_epochs": 1, "warmup_steps": 2}, "4 rows give 2 updates of 2, not even three"),
        ({"warmup_steps": 0.5}, "4 rows give 6 updates of 2, not even three times the warm-up"),
        ({"zero_first_update": True}, "a point of the curve would have an update at 0"),
    ],
)
def test_a_curve_that_would_only_warm_up_is_refused(planner, tmp_path, settings, told):
    rows = small_recipe(tmp_path, **settings)
    with pytest.raises(planner.InputError, match=told):
        planner.plan("small", rows, [4], 1)


@pytest.mark.parametrize(("size", "told"), [(9, "8 rows, but a size is 9"), (0, "a size is 0; the base")])
def test_a_size_beyond_the_rows_is_refused(planner, tmp_path, size, told):
    rows = small_recipe(tmp_path)
    with pytest.raises(planner.InputError, match=told):
        planner.plan("small", rows, [2, size], 1)


@pytest.mark.parametrize("changed", ["train.jsonl", "other.jsonl", "recipes/small/sft.yaml"])
def test_runs_of_other_files_are_not_points_of_the_same_curve(planner, tmp_path, changed):
    """Their checkpoints would be taken for those of the new rows. More sizes, a second set are no change."""
    rows = small_recipe(tmp_path)
    others = write_rows(tmp_path / "other.jsonl", 9)
    planner.plan("small", rows, [2, 8], 1)
    planner.plan("small", rows, [2, 4, 8], 2, against=others)
    before = points_of(tmp_path)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    told = f"{changed}: not the .+: delete it and .+/outputs/curve-small"
    with pytest.raises(planner.InputError, match=told):
        planner.plan("small", rows, [2, 4, 8], 2, against=others)
    assert points_of(tmp_path) == before


def test_what_is_no_row_is_told(curve, planner, tmp_path, monkeypatch):
    rows = small_recipe(tmp_path)
    with rows.open("a") as file:
        file.write("{\n")
    with pytest.raises(planner.InputError, match="train.jsonl:9: not valid JSON"):
        planner.plan("small", rows, [8], 1)
    monkeypatch.undo()
    with pytest.raises(curve.InputError, match="row 2: wants messages and tools; 02"):
        curve.row_tokens("none", [{"messages": [], "tools": None}, {"conversations": []}])


def test_a_row_may_hold_any_line_end_of_unicode(planner, tmp_path):
    small_recipe(tmp_path)
    row = {"query_id": "1", "text": "a\u2028b\x85c"}
    text = 2 * (json.dumps(row, ensure_ascii=False) + "\n")
    rows = tmp_path / "train.jsonl"
    rows.write_text(text, encoding="utf-8")
    planner.plan("small", rows, [2], 1)
    assert (tmp_path / "data/curve-small/rows-n2-seed1.jsonl").read_text() == text


def test_sizes_are_in_order_and_a_training_has_an_update_at_least(planner, tmp_path):
    rows = small_recipe(tmp_path)
    planner.plan("small", rows, [8, 2, 2, 4], 1)
    assert [point["size"] for point in points_of(tmp_path)] == [2, 2, 4, 4, 8, 8]
    long = tmp_path / "long.jsonl"
    row = {"query_id": "1000000"}  # of ten million tokens
    long.write_text(json.dumps(row))
    planner.plan("small", rows, [8], 1, against=long)
    assert points_of(tmp_path)[-1]["updates"] == 1  # 0 would be no limit at all


# ------------------------------------------------------------------------------------------------------------
# The runs

RUNS = "base\\tMODEL\\t-\\t0\\t0\\nrows-n2\\toutputs/a\\tdata/a.jsonl\\t12\\t1\\n"


@pytest.fixture
def run_curve(tmp_path):
    """run_curve(recipe, **environment) -> (the finished process, the programs that it called)."""
    root = tmp_path / "checkout"
    for name in ("curve.sh", "qwen3-8b/accelerate.yaml", "glm-4.5-air/accelerate.yaml"):
        (root / "recipes" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "recipes" / name, root / "recipes" / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "accelerate", "srun", "scontrol"):
        (programs / name).write_text(
            f"""#!/bin/bash
            echo "{name} $*" >> {tmp_path}/calls
            [ "$1 $2" = "recipes/curve.py plan" ] || exit 0
            mkdir -p results/curve-$3
            printf '{RUNS}' > results/curve-$3/runs.tsv
            """
        )
        (programs / name).chmod(0o755)

    def call(recipe, **more):
        environment = dict(os.environ)
        environment.pop("SLURM_JOB_ID", None)
        environment |= {"PATH": f"{programs}:{os.environ['PATH']}"} | more
        command = ["bash", "recipes/curve.sh", recipe, "rows.jsonl", "2"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        (tmp_path / "calls").touch()
        return done, (tmp_path / "calls").read_text().splitlines()

    return call


def test_every_run_is_trained_and_evaluated_and_the_base_only_evaluated(run_curve):
    done, calls = run_curve("qwen3-8b")
    assert done.returncode == 0, done.stderr
    results = "--output_dir results/curve-qwen3-8b"
    sft = "03_sft.py --config recipes/qwen3-8b/sft.yaml --train_file data/a.jsonl --output_dir outputs/a"
    assert calls == [
        "python recipes/curve.py plan qwen3-8b rows.jsonl 2",
        f"python 04_eval.py --config recipes/qwen3-8b/eval.yaml --model MODEL {results}/base",
        f"accelerate launch --config_file recipes/qwen3-8b/accelerate.yaml {sft} --max_steps 12 --seed 1",
        f"python 04_eval.py --config recipes/qwen3-8b/eval.yaml --model outputs/a {results}/rows-n2",
        "python recipes/curve.py table qwen3-8b",
    ]


def test_a_recipe_of_several_nodes_wants_slurm_and_numbers_its_nodes(run_curve):
    done, calls = run_curve("glm-4.5-air")
    told = "curve.sh: glm-4.5-air needs 4 nodes: sbatch --nodes=4 --wrap 'bash recipes/curve.sh glm-4.5-air "
    assert (done.returncode, done.stderr, calls) == (2, f"{told}rows.jsonl 2'\n", [])
    done, calls = run_curve("glm-4.5-air", SLURM_JOB_ID="1")
    assert done.returncode == 0, done.stderr
    trained = next(call for call in calls if "03_sft.py" in call)
    first = "srun --nodes=4 --ntasks-per-node=1 bash -c exec accelerate launch --machine_rank $SLURM_NODEID"
    assert trained.startswith(first)
    assert sum(call.startswith("srun --nodes=1 --ntasks=1 python 04_eval.py") for call in calls) == 2


# ------------------------------------------------------------------------------------------------------------
# The table


def write_run(folder, scores, messages=("Done.",), stop="answer"):
    folder.mkdir(parents=True)
    by_task = {}
    for number, score in enumerate(scores):
        by_task[f"t{number:02d}"] = {"FTFC": score}
    ended = {"answer": 3, "length": 1}
    summary = {"by_task": by_task, "rounds_ended_by": ended}
    (folder / "summary.json").write_text(json.dumps(summary))
    said = [{"role": "user", "content": "Do it."}]
    for text in messages:
        said.append({"role": "assistant", "content": text})
    row = {"query_id": "t00", "run": 0, "messages": said}
    row["rounds"] = [{"stop": stop}]
    (folder / "episodes.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def results(curve, tmp_path, monkeypatch):
    """Two seeds of 4 rows, one of all 6 other rows; the base solves nothing of 24 tasks."""
    monkeypatch.setattr(curve, "ROOT", tmp_path)
    folder = tmp_path / "results/curve-small"
    write_run(folder / "base", [0] * TASKS, ["", "x" * 500])
    write_run(folder / "a", [1, 0] * (TASKS // 2))
    write_run(folder / "b", [1] * TASKS, ["Same.", "Same."])
    write_run(folder / "c", [0, 0, 0, 1] * (TASKS // 4), stop="unparsed_call")
    points = []
    for arm, updates in (("updates", 12), ("tokens", 9)):
        amount = {"arm": arm, "updates": updates, "tokens": 1000 * updates}
        for run in "ab":
            points.append({"set": "rows", "size": 4, "run": run} | amount)
        points.append({"set": "other", "size": 6, "run": "c"} | amount)
    (folder / "curve.json").write_text(json.dumps(points))
    return folder


def test_the_table_has_base_gains_power_and_what_the_models_say(curve, results, stage):
    """The mean over the seeds is 1 for 12 tasks and 0.5 for 12: variance 12 x 2 / 23 / 16, so
    (2.8 / 0.05)^2 x 0.0652 = 204.5 tasks; of the other rows 6 of 24: 6 x 18 / 24 / 23, 613.6 tasks."""
    curve.table("small")
    low, high = stage("04_eval").bootstrap([1.0] * 12 + [0.5] * 12)
    interval = f"75% [{low:.0%}, {high:.0%}]"
    low, high = stage("04_eval").bootstrap(([0.0] * 3 + [1.0]) * 6)
    other = f"25% [{low:.0%}, {high:.0%}]"
    lines = (results / "table.md").read_text().splitlines()
    assert lines[2] == "| the base |  | 0 | 0 | 0% |  |  |  | 75% | 1 empty, 1 repetitive of 2 |"
    alike = f"50%, 100% | {interval} | 205 | 75% | 1 repetitive of 3 |"
    assert lines[3].replace(interval, "I", 1) == f"| 4 rows | equal updates | 12 | 0.01 | I | {alike}"
    assert lines[5].startswith("| 4 rows | equal tokens | 9 | 0.01 | ")
    assert lines[4].endswith(f"| 25% | {other} | 614 | 75% | 1 unparsed of 1 |")
    assert (results / "curve.png").stat().st_size > 5000


def test_the_sets_are_compared_task_by_task(curve, results, stage):
    curve.table("small")
    each = [1 - 0, 0.5 - 0, 1 - 0, 0.5 - 1] * (TASKS // 4)
    low, high = stage("04_eval").bootstrap(each)
    expected = f"- 4 rows minus 6 other rows at equal updates: 50% [{low:.0%}, {high:.0%}], p = "
    *_, tasks, first, second = (results / "table.md").read_text().splitlines()
    assert tasks == "Over 24 tasks."
    assert first.startswith(expected)
    assert second.startswith("- 4 rows minus 6 other rows at equal tokens: 50%")


def test_a_task_that_was_not_run_is_in_no_figure_of_its_line(curve, results):
    """Seed b without its second half: each seed and the mean are over the first 12 tasks."""
    shutil.rmtree(results / "b")
    write_run(results / "b", [1] * (TASKS // 2))
    curve.table("small")
    lines = (results / "table.md").read_text().splitlines()
    assert re.search(r"\| 75% \[.+\] \| 50%, 100% \| 75% \[", lines[3])
    told = "those with a score in the base and in every seed of a line"
    assert f"Over 12 to 24 tasks: {told}." in lines


def test_gains_without_spread_tell_no_number_of_tasks(curve, results):
    for run in "ab":
        shutil.rmtree(results / run)
        write_run(results / run, [0] * TASKS)
    curve.table("small")
    assert " | 0% [0%, 0%] | – | 75% | " in (results / "table.md").read_text().splitlines()[3]


def test_a_run_without_any_score_is_told(curve, results):
    summary = json.dumps({"by_task": {}, "rounds_ended_by": {}})
    (results / "c/summary.json").write_text(summary)
    told = "c/summary.json: no task has a score; not_run.jsonl"
    with pytest.raises(curve.InputError, match=told):
        curve.table("small")


def test_a_run_with_an_update_at_0_is_no_point(curve, results, tmp_path):
    folder = tmp_path / "outputs/curve-small/b"
    folder.mkdir(parents=True)
    log = [{"step": 1, "learning_rate": "0"}, {"step": 2, "learning_rate": "1e-05"}]
    (folder / "recipe.json").write_text(json.dumps({"log": log}))
    with pytest.raises(curve.InputError, match="b/recipe.json: update 1 had the learning rate 0"):
        curve.table("small")


def test_only_the_first_twenty_messages_are_looked_at(curve, tmp_path):
    write_run(tmp_path / "run", [1], [f"Step {number}." for number in range(20)] + ["", ""])
    assert curve.degeneration([tmp_path / "run"]) == "none odd of 20"


@pytest.mark.parametrize(
    ("said", "before", "kind"),
    [
        ("", None, "empty"),
        (" \n", None, "empty"),
        ('bash {"invalid_json": "{"}', None, "unparsed"),
        ("ls ls ls " * 60, None, "repetitive"),
        ("The code:\n" + "The text:\n" * 13 + "The te", None, "repetitive"),  # cut by its length
        ("The lines: " + "1." * 50, None, "repetitive"),
        ('bash {"command": "' + "sudo rm -r / && " * 9 + '"}', None, "repetitive"),
        ("The text:\n" * 13 + "And now something else.", None, ""),
        ("ls ls ls " * 6, None, ""),  # a short text may repeat a word
        ("Now the tests.", "Now the tests.", "repetitive"),
        ("Now the tests.", "First the tests.", ""),
        (" ".join(str(number * number) for number in range(300)), None, ""),
    ],
)
def test_what_counts_as_degenerate(curve, said, before, kind):
    assert curve.kind_of(said, before) == kind
