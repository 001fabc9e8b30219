"""The plan, the table and the plot of recipes/curve.sh.

    python recipes/curve.py plan RECIPE ROWS SIZES... --seeds 3 --against OTHER_ROWS
    python recipes/curve.py table RECIPE

plan   writes data/curve-RECIPE/rows-n10-seed1.jsonl ... (nested subsets), and in results/curve-RECIPE
       runs.tsv (a run a line: name, checkpoint, rows, updates, seed), curve.json (its curves' points) and
       inputs.json (of which files)
table  reads of every run summary.json and episodes.jsonl (04_eval.py), and recipe.json of its checkpoint
       where that is still there; writes table.md and curve.png
"""

import argparse
import hashlib
import importlib
import json
import math
import random
import statistics
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARMS = {"updates": "equal updates", "tokens": "equal tokens"}
COLUMNS = ["trained on", "curve", "updates", "million tokens", "FTFC", "each seed", "gain over the base"]
COLUMNS += ["tasks for +5 points", "answered", "first 20 messages"]
LOOKS = {"rows": ("#2f6fde", "#1f9d55"), "other": ("#b45309", "#9333ea")}  # a colour for each arm
DEGENERATE = ("empty", "unparsed", "repetitive")
LOOKED_AT = 20  # messages of a model in which it is looked for degeneration
NEARLY_EQUAL = 0.1  # of the updates: where rows are about equally long, both curves are of the same runs
LONGEST_LOOP = 200  # characters of what is said again and again


class InputError(ValueError):
    """A mistake in the user's input, told in one line; exit code 2."""


# ---- The plan ----


def parsed(path, lines):
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from None


def row_tokens(model, rows):
    """Tokens of each row as 03 renders it, but for splitting."""
    from transformers import AutoTokenizer

    rows = list(rows)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"messages", "tools"} <= row.keys():
            told = "wants messages and tools; 02_format_trajectories.py makes rows of logs"
            raise InputError(f"row {number}: {told}")
    tok = AutoTokenizer.from_pretrained(model)
    counts = []
    for row in rows:
        text = tok.apply_chat_template(row["messages"], tools=row["tools"] or None, tokenize=False)
        counts.append(len(tok(text)["input_ids"]))
    return counts


def read_recipe(recipe):
    path = ROOT / "recipes" / recipe / "sft.yaml"
    if not path.exists():
        raise InputError(f"{path}: no such file; RECIPE is a folder of recipes/ with sft.yaml")
    return yaml.safe_load(path.read_text())


def updates_of(settings, size):
    """Updates of the largest size, which all sizes get. Raises InputError where they would only warm up."""
    batch = settings.get("global_batch_size", 64)
    updates = int(size * settings.get("num_train_epochs", 8)) // batch
    warmup = settings.get("warmup_steps", 2)
    warmup = math.ceil(warmup * updates) if warmup < 1 else warmup
    if updates < 3 * warmup:
        told = f"{size} rows give {updates} updates of {batch}"
        raise InputError(f"{told}, not even three times the warm-up: more passes or rows, smaller batches")
    if settings.get("zero_first_update"):
        raise InputError("sft.yaml: zero_first_update: a point of the curve would have an update at 0")
    return updates


def lines_of(path):
    """Lines of a JSONL file, ended by newlines alone: a text in one may hold Unicode's other line ends."""
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


def read_set(path, sizes):
    lines = lines_of(path)
    if min(sizes) < 1:
        raise InputError(f"a size is {min(sizes)}; the base, 0 rows, is evaluated anyway")
    if max(sizes) > len(lines):
        raise InputError(f"{path}: {len(lines)} rows, but a size is {max(sizes)}")
    return lines


def refuse_other_inputs(results, outputs, inputs):
    """All runs of a curve are of the same files. inputs: {what it is: its file}. Raises InputError where one
    has changed since; a second set may be added."""
    path = results / "inputs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, file in inputs.items():
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if known.setdefault(name, digest) != digest:
            raise InputError(f"{file}: not the {name} of the runs in {results}: delete it and {outputs}")
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known))


def plan_set(recipe, name, lines, tokens, sizes, seeds, updates, equal):
    """Write the subsets of one set; returns its points. equal: {seed: tokens of a row in ROWS}."""
    points = []
    for seed in range(1, seeds + 1):
        order = random.Random(seed).sample(range(len(lines)), len(lines))  # nested: the first n of one order
        for size in sizes:
            part = order[:size]
            rows = ROOT / f"data/curve-{recipe}/{name}-n{size}-seed{seed}.jsonl"
            rows.write_text("".join(lines[place] + "\n" for place in part))
            mean = statistics.mean(tokens[place] for place in part)
            as_many_tokens = max(1, round(updates * equal[seed] / mean))
            if abs(as_many_tokens - updates) <= NEARLY_EQUAL * updates:
                as_many_tokens = updates
            for arm, steps in (("updates", updates), ("tokens", as_many_tokens)):
                run = f"{name}-n{size}-seed{seed}-updates{steps}"
                point = {"set": name, "arm": arm, "size": size, "seed": seed, "run": run}
                points.append(point | {"updates": steps, "mean_tokens": mean})
    return points


def plan(recipe, rows_file, sizes, seeds, against=None):
    """Write the subsets, runs.tsv and curve.json."""
    settings = read_recipe(recipe)
    model = settings["model_name_or_path"]
    sizes = sorted(set(sizes))
    lines = read_set(rows_file, sizes)
    others = read_set(against, [1]) if against else []
    updates = updates_of(settings, max(sizes))
    results = ROOT / f"results/curve-{recipe}"
    inputs = {"sft.yaml": ROOT / "recipes" / recipe / "sft.yaml", "rows": rows_file}
    inputs |= {"second set": against} if against else {}
    refuse_other_inputs(results, ROOT / f"outputs/curve-{recipe}", inputs)
    tokens = row_tokens(model, parsed(rows_file, lines))
    (ROOT / f"data/curve-{recipe}").mkdir(parents=True, exist_ok=True)
    equal = {}
    for seed in range(1, seeds + 1):  # what the largest size has
        order = random.Random(seed).sample(range(len(lines)), len(lines))
        equal[seed] = statistics.mean(tokens[place] for place in order[: max(sizes)])
    points = plan_set(recipe, "rows", lines, tokens, sizes, seeds, updates, equal)
    if against:
        counts = row_tokens(model, parsed(against, others))
        sizes = sorted({size for size in sizes if size < len(others)} | {len(others)})
        points += plan_set(recipe, "other", others, counts, sizes, seeds, updates, equal)
    runs = {"base": f"base\t{model}\t-\t0\t0"}
    for point in points:
        run, size, seed = point["run"], point["size"], point["seed"]
        rows = f"data/curve-{recipe}/{point['set']}-n{size}-seed{seed}.jsonl"
        runs[run] = f"{run}\toutputs/curve-{recipe}/{run}\t{rows}\t{point['updates']}\t{seed}"
    batch = settings.get("global_batch_size", 64)
    for point in points:
        point["tokens"] = round(point.pop("mean_tokens") * batch * point["updates"])
    (results / "runs.tsv").write_text("\n".join(runs.values()) + "\n")
    (results / "curve.json").write_text(json.dumps(points, indent=1))
    print(f"{len(runs) - 1} trainings of about {updates} updates of {batch} rows, {len(runs)} evaluations")


# ---- What a run has come to ----


def read_run(folder):
    """({task: FTFC}, {how a round ended: share}) of a run's summary."""
    path = folder / "summary.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; bash recipes/curve.sh makes it")
    summary = json.loads(path.read_text())
    if not summary["by_task"]:
        raise InputError(f"{path}: no task has a score; not_run.jsonl beside it says why")
    ended = summary["rounds_ended_by"]
    shares = {name: count / sum(ended.values()) for name, count in ended.items()}
    return {task: scores["FTFC"] for task, scores in summary["by_task"].items()}, shares


def first_kinds(folder):
    """What the model's first messages of a run are, in the order of its tasks: as in DEGENERATE, or ""."""
    path = folder / "episodes.jsonl"
    rows = [json.loads(line) for line in lines_of(path)] if path.exists() else []
    kinds = []
    for row in sorted(rows, key=lambda row: (row["query_id"], row["run"])):
        before = None
        for message in row["messages"]:
            if message["role"] == "assistant":
                said = text_of(message)
                kinds.append(kind_of(said, before))
                before = said
        if row["rounds"][-1]["stop"] == "unparsed_call":
            kinds[-1] = "unparsed"
    return kinds[:LOOKED_AT]


def text_of(message):
    """All that the model wrote in a message."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = "".join(f"{function['name']} {json.dumps(function['arguments'])}" for function in functions)
    return (message.get("reasoning_content") or "") + message["content"] + calls


def kind_of(said, before):
    if not said.strip():
        return "empty"
    if '{"invalid_json": ' in said:  # 04's mark of a call that it could not read
        return "unparsed"
    return "repetitive" if loops(said) or said == before else ""


def loops(said):
    """Does it end in the same, five times and 60 characters or more? What closes a call is no end."""
    said = said.rstrip('"}] ')
    for period in range(1, LONGEST_LOOP + 1):
        same = 0
        while same + period < len(said) and said[-1 - same] == said[-1 - same - period]:
            same += 1
        if same >= max(4 * period, 60):
            return True
    return False


def degeneration(folders):
    """"3 empty, 1 repetitive of 60" for the first messages of these runs."""
    kinds = []
    for folder in folders:
        kinds += first_kinds(folder)
    found = [f"{kinds.count(kind)} {kind}" for kind in DEGENERATE if kind in kinds]
    return f"{', '.join(found) or 'none odd'} of {len(kinds)}"


def check_rates(recipe, run):
    """A point of a curve has no update at learning rate 0. Raises InputError."""
    path = ROOT / f"outputs/curve-{recipe}/{run}/recipe.json"
    log = json.loads(path.read_text())["log"] if path.exists() else []
    for update in log:
        if float(update.get("learning_rate", 1)) <= 0:
            raise InputError(f"{path}: update {update['step']} had the learning rate 0: no point of a curve")


def mean_by_task(scores):
    """{task that all have: its mean over the seeds}; scores: the base's, then each seed's."""
    shared = set(scores[0]).intersection(*scores[1:])
    means = {}
    for task in sorted(shared):
        means[task] = statistics.mean(run[task] for run in scores[1:])
    return means


def mean_over(tasks, by_task):
    return statistics.mean(by_task[task] for task in tasks)


def point_of(folder, base, points):
    """One point of a curve, over the tasks that the base and every seed have. score: mean FTFC over tasks and
    seeds, gain: over the base, both with intervals over tasks; seeds: of each; tasks_needed: to show a gain
    of 5 points with a power of 80 %, 0 where all gains are the same; answered: share of rounds that ended
    with an answer."""
    stage = importlib.import_module("04_eval")
    scores = []
    answered = []
    for point in points:
        by_task, shares = read_run(folder / point["run"])
        scores.append(by_task)
        answered.append(shares.get("answer", 0.0))
    means = mean_by_task([base, *scores])
    if not means:
        raise InputError(f"{folder}: no task has a score in the base and in {points[0]['run']}")
    gains = [means[task] - base[task] for task in means]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return {
        "by_task": means,
        "score": statistics.mean(means.values()),
        "interval": stage.bootstrap(list(means.values())),
        "gain": statistics.mean(gains),
        "gain_interval": stage.bootstrap(gains),
        "seeds": [mean_over(means, run) for run in scores],
        "tasks_needed": math.ceil((2.8 * spread / 0.05) ** 2),  # 1.96 + 0.84 standard errors
        "answered": statistics.mean(answered),
        "updates": statistics.mean(point["updates"] for point in points),
        "tokens": statistics.mean(point["tokens"] for point in points),
        "first": degeneration([folder / point["run"] for point in points]),
    }


# ---- The table and the plot ----


def percent(share, interval=None):
    edges = " [{:.0%}, {:.0%}]".format(*interval) if interval else ""
    return f"{share:.0%}{edges}"


def name_of(which, size):
    return f"{size:,} {'rows' if which == 'rows' else 'other rows'}"


def cells_of(which, arm, size, point):
    """The cells of a line of the table."""
    return [
        name_of(which, size),
        ARMS[arm],
        f"{point['updates']:,.0f}",
        f"{point['tokens'] / 1e6:,.2f}",
        percent(point["score"], point["interval"]),
        ", ".join(percent(value) for value in point["seeds"]),
        percent(point["gain"], point["gain_interval"]),
        f"{point['tasks_needed']:,}" if point["tasks_needed"] else "–",
        percent(point["answered"]),
        point["first"],
    ]


def differences(curves):
    """Lines: the largest size of ROWS minus each size of the other set, task by task."""
    stage = importlib.import_module("04_eval")
    largest = max(size for which, _, size in curves if which == "rows")
    lines = []
    for which, arm, size in curves:
        if which != "other":
            continue
        ours = curves["rows", arm, largest]["by_task"]
        theirs = curves[which, arm, size]["by_task"]
        each = [ours[task] - theirs[task] for task in ours if task in theirs]
        pair = f"{name_of('rows', largest)} minus {name_of(which, size)} at {ARMS[arm]}"
        edges = percent(statistics.mean(each), stage.bootstrap(each))
        lines.append(f"- {pair}: {edges}, p = {stage.permutation_p(each):.3f}")
    return lines


def counted_tasks(base, curves):
    """A line: over how many tasks the figures are."""
    counts = {len(base), *(len(point["by_task"]) for point in curves.values())}
    if len(counts) == 1:
        return f"Over {len(base)} tasks."
    told = "those with a score in the base and in every seed of a line"
    return f"Over {min(counts)} to {max(counts)} tasks: {told}."


def table(recipe):
    """Write table.md and curve.png, print the table."""
    folder = ROOT / f"results/curve-{recipe}"
    base, shares = read_run(folder / "base")
    grouped = {}
    for point in json.loads((folder / "curve.json").read_text()):
        check_rates(recipe, point["run"])
        grouped.setdefault((point["set"], point["arm"], point["size"]), []).append(point)
    score = statistics.mean(base.values())
    first = ["the base", "", "0", "0", percent(score), "", "", "", percent(shares.get("answer", 0.0))]
    rows = [COLUMNS, ["---"] * len(COLUMNS), [*first, degeneration([folder / "base"])]]
    curves = {}
    for key, points in grouped.items():
        curves[key] = point_of(folder, base, points)
        rows.append(cells_of(*key, curves[key]))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join([*lines, "", counted_tasks(base, curves), *differences(curves)])
    (folder / "table.md").write_text(text + "\n")
    plot(folder / "curve.png", score, curves)
    print(f"{text}\nplot: {folder / 'curve.png'}")


def plot(path, base, curves):
    """FTFC by rows, a line for each set and arm, a dot for each seed; symlog, so that n = 0 is there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    lines = {}
    for which, arm, size in curves:
        lines.setdefault((which, arm), []).append(size)
    for (which, arm), sizes in lines.items():
        color = LOOKS[which][list(ARMS).index(arm)]
        scores = [100 * curves[which, arm, size]["score"] for size in sizes]
        label = f"{'other rows, ' * (which == 'other')}{ARMS[arm]}"
        dashes = "--" if arm == "tokens" else "-"  # where both are of the same runs, both are seen
        axis.plot([0, *sizes], [100 * base, *scores], dashes, marker="o", label=label, color=color)
        for size in sizes:
            seeds = [100 * value for value in curves[which, arm, size]["seeds"]]
            axis.plot([size] * len(seeds), seeds, ".", color=color, alpha=0.4)
    ticks = sorted({0, *(size for _, _, size in curves)})
    axis.set_xscale("symlog", linthresh=min(ticks[1:]))
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="training rows", ylabel="FTFC, %", ylim=(-3, 103))
    axis.set_title("Each dot is a seed, each line their mean", fontsize=10)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("recipe")
    planning.add_argument("rows_file")
    planning.add_argument("sizes", nargs="+", type=int)
    planning.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    planning.add_argument("--against", help="rows of another kind: at the same sizes, and all of them")
    commands.add_parser("table").add_argument("recipe")
    settings = vars(parser.parse_args())
    globals()[settings.pop("command")](**settings)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"curve.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
