"""The plan, the table and the plot of recipes/curve.sh.

    python recipes/curve.py plan RECIPE ROWS SIZES... --seeds 3
    python recipes/curve.py table RECIPE

plan   writes data/curve-RECIPE/n10-seed1.jsonl ... (nested subsets), and in results/curve-RECIPE runs.tsv (a
       run a line: name, checkpoint, rows, updates, seed) and curve.json (which runs make which curve)
table  reads the summary.json of every run (04_eval.py); writes table.md and curve.png
"""

import argparse
import importlib
import json
import random
import statistics
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARMS = {"updates": "equal updates", "tokens": "equal tokens"}
COLUMNS = ["rows", "curve", "FTFC", "each seed", "gain over the base", "answered", "tasks for +5 points"]
COLOURS = {"updates": "#2f6fde", "tokens": "#1f9d55"}


class InputError(ValueError):
    """A mistake in the user's input, told in one line; exit code 2."""


def row_tokens(model, rows):
    """Tokens of each row as 03 renders it, but for splitting."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(model)
    counts = []
    for row in rows:
        text = tok.apply_chat_template(row["messages"], tools=row["tools"] or None, tokenize=False)
        counts.append(len(tok(text)["input_ids"]))
    return counts


def plan(recipe, rows_file, sizes, seeds):
    """Write the subsets, runs.tsv and curve.json."""
    folder = ROOT / "recipes" / recipe
    if not (folder / "sft.yaml").exists():
        raise InputError(f"{folder}: no sft.yaml there; RECIPE is a folder of recipes/")
    settings = yaml.safe_load((folder / "sft.yaml").read_text())
    lines = Path(rows_file).read_text().splitlines()
    if max(sizes) > len(lines):
        raise InputError(f"{rows_file}: {len(lines)} rows, but a size is {max(sizes)}")
    model = settings["model_name_or_path"]
    tokens = row_tokens(model, [json.loads(line) for line in lines])
    batch = settings.get("global_batch_size", 64)
    updates = int(max(sizes) * settings.get("num_train_epochs", 8)) // batch
    if updates < 3 * settings.get("warmup_steps", 2):
        told = f"{max(sizes)} rows give {updates} updates of {batch}"
        raise InputError(f"{told}, not even three times the warm-up: more passes or rows, smaller batches")
    data = ROOT / f"data/curve-{recipe}"
    data.mkdir(parents=True, exist_ok=True)
    runs = {"base": f"base\t{model}\t-\t0\t0"}
    points = []
    for seed in range(1, seeds + 1):
        order = random.Random(seed).sample(range(len(lines)), len(lines))  # nested: the first n of one order
        most = statistics.mean(tokens[place] for place in order[: max(sizes)])
        for size in sizes:
            part = order[:size]
            rows = data / f"n{size}-seed{seed}.jsonl"
            rows.write_text("".join(lines[place] + "\n" for place in part))
            share = most / statistics.mean(tokens[place] for place in part)
            for arm, steps in (("updates", updates), ("tokens", round(updates * share))):
                run = f"n{size}-seed{seed}-updates{steps}"
                checkpoint = f"outputs/curve-{recipe}/{run}"
                runs[run] = f"{run}\t{checkpoint}\t{rows.relative_to(ROOT)}\t{steps}\t{seed}"
                points.append({"arm": arm, "size": size, "seed": seed, "updates": steps, "run": run})
    results = ROOT / f"results/curve-{recipe}"
    results.mkdir(parents=True, exist_ok=True)
    (results / "runs.tsv").write_text("\n".join(runs.values()) + "\n")
    (results / "curve.json").write_text(json.dumps(points, indent=1))
    print(f"{len(runs) - 1} trainings of about {updates} updates of {batch} rows, {len(runs)} evaluations")


def read_run(folder):
    """({task: FTFC}, {how a round ended: share}) of a run's summary."""
    path = folder / "summary.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; bash recipes/curve.sh makes it")
    summary = json.loads(path.read_text())
    ended = summary["rounds_ended_by"]
    shares = {name: count / sum(ended.values()) for name, count in ended.items()}
    return {task: scores["FTFC"] for task, scores in summary["by_task"].items()}, shares


def point_of(folder, base, runs):
    """One point of a curve. score: mean FTFC over tasks and seeds, gain: over the base, both with intervals
    over tasks; seeds: of each; tasks_needed: to show a gain of 5 points with a power of 80 %; answered: share
    of rounds that ended with an answer, not in repetition, an unparsed call or nothing."""
    stage = importlib.import_module("04_eval")
    scores = []
    answered = []
    for run in runs:
        by_task, shares = read_run(folder / run)
        scores.append(by_task)
        answered.append(shares.get("answer", 0.0))
    means = []
    gains = []
    for task in base:
        if all(task in by_task for by_task in scores):
            means.append(statistics.mean(by_task[task] for by_task in scores))
            gains.append(means[-1] - base[task])
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return {
        "score": statistics.mean(means),
        "interval": stage.bootstrap(means),
        "gain": statistics.mean(gains),
        "gain_interval": stage.bootstrap(gains),
        "seeds": [statistics.mean(by_task.values()) for by_task in scores],
        "tasks_needed": round((2.8 * spread / 0.05) ** 2),
        "answered": statistics.mean(answered),
    }


def percent(share, interval=None):
    edges = " [{:.0%}, {:.0%}]".format(*interval) if interval else ""
    return f"{share:.0%}{edges}"


def cells_of(arm, size, point):
    """The cells of a line of the table."""
    return [
        str(size),
        ARMS[arm],
        percent(point["score"], point["interval"]),
        ", ".join(percent(value) for value in point["seeds"]),
        percent(point["gain"], point["gain_interval"]),
        percent(point["answered"]),
        str(point["tasks_needed"]),
    ]


def table(recipe):
    """Write table.md and curve.png, print the table."""
    folder = ROOT / f"results/curve-{recipe}"
    points = json.loads((folder / "curve.json").read_text())
    base, shares = read_run(folder / "base")
    score = statistics.mean(base.values())
    rows = [
        COLUMNS,
        ["---"] * len(COLUMNS),
        ["0", "base", percent(score), "", "", percent(shares.get("answer", 0.0)), ""],
    ]
    runs = {}
    for point in points:
        runs.setdefault((point["arm"], point["size"]), []).append(point["run"])
    curves = {}
    for arm, size in sorted(runs, key=lambda key: (list(ARMS).index(key[0]), key[1])):
        curves[arm, size] = point_of(folder, base, runs[arm, size])
        rows.append(cells_of(arm, size, curves[arm, size]))
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    (folder / "table.md").write_text(text + "\n")
    plot(folder / "curve.png", score, curves)
    print(f"{text}\nplot: {folder / 'curve.png'}")


def plot(path, base, curves):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for arm, label in ARMS.items():
        sizes = [size for name, size in curves if name == arm]
        scores = [100 * curves[arm, size]["score"] for size in sizes]
        axis.plot([0, *sizes], [100 * base, *scores], marker="o", label=label, color=COLOURS[arm])
        for size in sizes:
            seeds = [100 * value for value in curves[arm, size]["seeds"]]
            axis.plot([size] * len(seeds), seeds, ".", color=COLOURS[arm], alpha=0.4)
    axis.set(xlabel="training rows", ylabel="FTFC, %", ylim=(-3, 103))
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("recipe")
    planning.add_argument("rows_file")
    planning.add_argument("sizes", nargs="+", type=int)
    planning.add_argument("--seeds", type=int, default=3)
    commands.add_parser("table").add_argument("recipe")
    settings = vars(parser.parse_args())
    globals()[settings.pop("command")](**settings)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"curve.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
