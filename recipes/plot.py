"""The pictures, as PNG and SVG: rows, a training run, base against tuned.

    python recipes/plot.py data/train.jsonl              # lengths, turns, tools, domains
    python recipes/plot.py outputs/limi                  # loss and learning rate by update
    python recipes/plot.py results/base results/tuned  # the paper's Fig. 1: score, score by training rows

Reads  data/train.jsonl (02), outputs/<run>/recipe.json (03), results/<run>/summary.json (04)
Writes NAME.png and NAME.svg (--output NAME; the default stands beside what was read)

A panel is a function that draws on one axis. A fork adds a picture by adding a panel.
"""

import argparse
import importlib
import io
import json
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
evaluation = importlib.import_module("04_eval")  # its intervals are the ones that are shown
visible = importlib.import_module("pages").visible
InputError = evaluation.InputError
read_json = evaluation.read_json

BLUE, GREEN, GREY, LIGHT = "#2f6fde", "#1f9d55", "#8b94a3", "#9cc0f5"
INK = (
    "#010203"  # text and axes; becomes the colour of the page's text where the SVG stands in a page
)
MOST_BARS = 12
# Fig. 1 of the paper: AgencyBench after training GLM-4.5 on so many samples, in percent
PAPER = {"LIMI": (78, 73.5), "CC": (260, 29.2), "Web": (7_610, 36.7), "Code": (10_000, 47.8)}
LOOK = {
    "font.size": 11,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a $ in a name is a dollar
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "svg.hashsalt": "limi",  # the same picture is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
)


def read_lines(path, *fields, append_only=False):
    """(file:line, record) of a JSONL file. Raises InputError where a line is not JSON or lacks a field.

    append_only: a last line that a kill cut short is no record.
    """
    for where, record in evaluation.read_jsonl(path, append_only):
        for field in fields:
            if field not in record:
                raise InputError(f"{where}: no {field}; is this the file that the stage wrote?")
        yield where, record


def is_message(message):
    """Has it what 02's messages have, and the pages show?"""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return False
    functions = [call.get("function") or {} for call in message.get("tool_calls") or []]
    complete = all({"name", "arguments"} <= function.keys() for function in functions)
    return "role" in message and complete


def read_rows(path):
    """The rows of 02's train.jsonl. Raises InputError, naming file, line and message."""
    empty = True
    for where, row in read_lines(path, "query_id", "messages"):
        messages = row["messages"] if isinstance(row["messages"], list) else [None]
        for number, message in enumerate(messages):
            if not is_message(message):
                told = "wants a role, content that is text, calls with name and arguments"
                told += "; 02_format_trajectories.py makes rows of logs"
                raise InputError(f"{where}: messages[{number}]: {told}")
        empty = False
        yield row
    if empty:
        raise InputError(f"{path}: no row in it")


# ---- Panels ----


def histogram(axis, title, values, unit):
    """How many rows have which value; the median as a line with its number."""
    middle = statistics.median(values)
    low, high = min(values), max(values)
    bins = 30 if len(values) > 100 else 12
    if high - low < 30:
        bins = [number - 0.5 for number in range(low, high + 2)]  # a bar for each number
    axis.hist(values, bins=bins, color=LIGHT, edgecolor=BLUE, linewidth=0.5)
    axis.axvline(middle, color=BLUE, linewidth=2)
    axis.set_title(f"{title}, median {middle:,.0f}")
    axis.set(xlabel=unit, ylabel="rows")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True, nbins=5)
    if high - low < 6:
        axis.set_xticks(range(low, high + 1))  # every number, none in between


def bars(axis, title, counts, unit):
    """The largest counts, the rest as one bar. counts: {name: number}."""
    largest = Counter(counts).most_common(MOST_BARS)
    rest = sum(counts.values()) - sum(count for _, count in largest)
    if rest:
        largest.append((f"{len(counts) - MOST_BARS} others", rest))
    names = [visible(name if len(name) <= 26 else name[:25] + "…") for name, _ in largest]
    places = range(len(largest), 0, -1)
    sizes = [count for _, count in largest]
    drawn = axis.barh(places, sizes, 0.7, tick_label=names, color=LIGHT)
    axis.bar_label(drawn, [f"{size:,}" for size in sizes], padding=3)
    axis.set_title(title)
    axis.set(xlabel=unit, xlim=(0, 1.18 * max(sizes)))
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)


def loss(axis, title, log, key="loss", color=BLUE):
    """log: 03's recipe.json, [{"step", "loss", "learning_rate", ...}]."""
    points = [(int(row["step"]), float(row[key])) for row in log if key in row]
    axis.plot(*zip(*points), color=color, marker="o", markersize=3 if len(points) < 60 else 0)
    axis.set_title(title)
    axis.set(xlabel="updates", ylabel=key.replace("_", " "))
    axis.xaxis.get_major_locator().set_params(integer=True)


def scores(axis, title, names, values, edges):
    """Bars with 95 % intervals. values: percent; edges: (low, high) of each run, None for too few tasks."""
    colors = [GREY, *[LIGHT] * (len(names) - 2), BLUE][-len(names) :]  # base, other data, ours
    places = range(len(names), 0, -1)
    short = [name if len(name) <= 22 else "…" + name[-21:] for name in names]
    axis.barh(places, values, 0.6, color=colors, tick_label=short)
    for place, mean, interval in zip(places, values, edges):
        low, high = interval or (mean, mean)
        axis.plot((low, high), (place, place), color=INK, linewidth=1.5)
        axis.text(high + 2, place, f"{mean:.1f}", va="center", weight="bold")
    axis.set_title(title)
    axis.set(xlim=(0, 115), xticks=range(0, 101, 20), xlabel="percent, 95 % interval over tasks")


def by_samples(axis, title, names, values, sizes, paper):
    """Score by number of training rows, log scale. paper: {name: (rows, percent)}."""
    known = [(name, size, value) for name, size, value in zip(names, sizes, values) if size]
    for name, size, value in known:
        axis.plot(size, value, "o", markersize=9, color=BLUE)
        axis.annotate(f"{name}: {size:,}", (size, value), (9, -4), textcoords="offset points")
    for name, (size, value) in paper.items():
        axis.plot(size, value, "x", markersize=8, color=GREY)
        label = {"textcoords": "offset points", "ha": "right", "color": GREY}
        axis.annotate(f"paper's {name}", (size, value), (-9, -4), **label)
    axis.axhline(values[0], color=GREY, linestyle="--", linewidth=1)
    axis.annotate(names[0], (0.01, values[0] + 1.5), xycoords=("axes fraction", "data"), color=GREY)
    largest = max([size for _, size, _ in known] + [size for size, _ in paper.values()])
    axis.set_title(title)
    axis.set(xscale="log", xlim=(1, 30 * max(largest, 1000)), ylim=(0, 105))
    axis.set(xlabel="training rows", ylabel="percent")
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")


# ---- Panels of what the stages leave ----


def text_length(message):
    calls = message.get("tool_calls") or []
    arguments = sum(
        len(json.dumps(call["function"]["arguments"], ensure_ascii=False)) for call in calls
    )
    return len(message["content"]) + len(message.get("reasoning_content") or "") + arguments


def card_of(row):
    """The numbers of a row that pages and pictures show."""
    messages = row["messages"]
    meta = row.get("meta") or {}
    calls = []
    for message in messages:
        calls += [call["function"]["name"] for call in message.get("tool_calls") or []]
    return {
        "query_id": row["query_id"],
        "domain": str(meta.get("domain") or "no domain"),
        "format": str(meta.get("format") or ""),
        "source": str(meta.get("source") or ""),
        "messages": len(messages),
        "turns": sum(message["role"] == "user" for message in messages),
        "calls": len(calls),
        "tools": calls,
        "tokens": meta["n_tokens"] if isinstance(meta.get("n_tokens"), int) else None,
        "characters": sum(map(text_length, messages)),
    }


def reject_counts(rejects):
    """{reason without its detail: number of rejected records that have it}."""
    counts = Counter()
    for record in rejects:
        counts.update({reason.partition(":")[0] for reason in record["reasons"]})
    return counts


def words_of(counts):
    return {name.replace("_", " "): count for name, count in counts.items()}


def length_unit(cards):
    """Tokens where 02 counted them (--tokenizer), else characters."""
    return "tokens" if all(card["tokens"] for card in cards) else "characters"


def row_panels(cards, rejects):
    unit = length_unit(cards)
    tools = Counter()
    for card in cards:
        tools.update(card["tools"])
    domains = words_of(Counter(card["domain"] for card in cards))
    panels = [
        partial(
            histogram,
            title="Length",
            values=[card[unit] for card in cards],
            unit=f"{unit} in a row",
        ),
        partial(
            histogram,
            title="Turns",
            values=[card["turns"] for card in cards],
            unit="user messages in a row",
        ),
        partial(
            histogram,
            title="Tool calls",
            values=[card["calls"] for card in cards],
            unit="calls in a row",
        ),
        partial(bars, title="Tools", counts=tools, unit="calls") if tools else None,
        partial(bars, title="Domains", counts=domains, unit="rows"),
        partial(bars, title="Rejected, by reason", counts=words_of(reject_counts(rejects)), unit="records")
        if rejects
        else None,
    ]
    return [panel for panel in panels if panel]


def training_panels(recipe, name):
    """recipe: 03's recipe.json. No panel where it has no log (a dry run)."""
    log = [row for row in recipe.get("log", []) if "loss" in row and "step" in row]
    if not log:
        return []
    panels = [partial(loss, title=f"{name}: loss", log=log)]
    if any("learning_rate" in row for row in log):
        panels.append(
            partial(loss, title="Learning rate", log=log, key="learning_rate", color=GREEN)
        )
    return panels


def shared(lists):
    """What stands in every list, in the order of the first."""
    common = set(lists[0]).intersection(*lists[1:])
    return [entry for entry in lists[0] if entry in common]


def read_summaries(folders):
    """04's summary.json of each folder, as if all had had the fewest rounds of them. Raises InputError."""
    summaries = [evaluation.load_run(folder) for folder in folders]
    rounds = min(summary["settings"]["rounds"] for summary in summaries)
    for folder, summary in zip(folders, summaries):
        summary["by_task"] = evaluation.scores_within(folder, summary, rounds)
    return summaries


def run_names(folders):
    """The folders' own names, numbered where two are the same."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def score_table(summaries, tasks):
    """{metric that all have: of each run the list of its tasks' values in [0, 1]}.

    Where there are several metrics, the paper's "average" of them comes first.
    """
    metrics = shared([list(summary["by_task"][tasks[0]]) for summary in summaries])
    table = {"average": []} if len(metrics) > 1 else {}
    for metric in metrics:
        table[metric] = []
        for summary in summaries:
            values = [summary["by_task"][task][metric] for task in tasks]
            table[metric].append(values)
    if len(metrics) > 1:
        for number in range(len(summaries)):
            columns = [table[metric][number] for metric in metrics]
            table["average"].append([statistics.mean(values) for values in zip(*columns)])
    return table


def read_comparison(folders):
    """{names, summaries, tasks, table}: what these runs have in common. Raises InputError."""
    summaries = read_summaries(folders)
    tasks = shared([list(summary["by_task"]) for summary in summaries])
    if not tasks:
        raise InputError(f"{' and '.join(map(str, folders))}: no task was scored in all of them")
    for task in tasks:
        if len({summary["task_sha256"].get(task) for summary in summaries}) > 1:
            told = f"the task {task} differs between the runs: text, check or folders"
            raise InputError(f"{folders[-1]}: {told}")
    return {
        "names": run_names(folders),
        "summaries": summaries,
        "tasks": tasks,
        "table": score_table(summaries, tasks),
    }


def percent(values):
    return values and [100 * value for value in values]


def is_like_the_papers(comparison):
    """The paper's number is the average of its three metrics over all ten tasks, with tools."""
    theirs = [task for task in comparison["tasks"] if task.startswith("agencybench-v1-")]
    if len(theirs) != 10 or len(comparison["tasks"]) != 10:
        return False
    with_tools = not any(summary["settings"].get("no_tools") for summary in comparison["summaries"])
    return with_tools and set(comparison["table"]) == {"average", "FTFC", "SR@3", "RC@3"}


def comparison_panels(comparison):
    """The first metric of the comparison by run, and by training rows where a run says how many it had."""
    metric, *others = comparison["table"]
    title = f"Average of {', '.join(others)}" if metric == "average" else metric
    per_run = comparison["table"][metric]
    names = comparison["names"]
    sizes = [summary.get("trained_on") for summary in comparison["summaries"]]
    values = [100 * statistics.mean(run) for run in per_run]
    edges = [percent(evaluation.bootstrap(run)) for run in per_run]
    panels = [partial(scores, title=title, names=names, values=values, edges=edges)]
    if any(sizes):
        more = {"names": names, "values": values, "sizes": sizes}
        more["paper"] = PAPER if is_like_the_papers(comparison) else {}
        panels.append(partial(by_samples, title="The same, by training rows", **more))
    return panels


# ---- Files ----


def draw(panels, columns=3, width=5.2, height=3.3):
    """One figure of all panels, without pyplot: nothing global is left behind."""
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels):
        panel(axis)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    return figure


def inline(panels):
    """Each panel as the text of an SVG for a page: no background, in the colour of the page's text."""
    import matplotlib

    pictures = []
    with matplotlib.rc_context(LOOK):
        for number, panel in enumerate(panels):
            file = io.StringIO()
            figure = draw([panel])
            matplotlib.rcParams["svg.hashsalt"] = f"limi {number}"  # ids must differ within a page
            figure.savefig(
                file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
            picture = "<svg" + file.getvalue().partition("<svg")[2]
            pictures.append(picture.replace(INK, "currentColor"))
    return pictures


def save(panels, output):
    """output.png and output.svg, on white."""
    import matplotlib

    with matplotlib.rc_context(LOOK):
        figure = draw(panels, columns=2 if len(panels) in (2, 4) else 3)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{output}.png", dpi=150)
        figure.savefig(f"{output}.svg", metadata={"Date": None, "Creator": None})


def read_rejects(train_file):
    """The records that 02 left out, beside its rows; [] where there is no such file."""
    path = Path(train_file).with_suffix(".rejected.jsonl")
    if not path.exists():
        return []
    return [record for _, record in read_lines(path, "source", "reasons")]


def panels_of(paths):
    """(panels, where the picture goes by default) for what the paths are. Raises InputError."""
    first = Path(paths[0])
    if len(paths) > 1:
        return comparison_panels(read_comparison(paths)), Path(paths[-1], "compare")
    if first.joinpath("recipe.json").exists():
        panels = training_panels(read_json(first / "recipe.json"), first.resolve().name)
        if not panels:
            raise InputError(f"{first}/recipe.json: no update is logged there")
        return panels, first / "loss"
    if first.is_file():
        cards = [card_of(row) for row in read_rows(first)]
        return row_panels(cards, read_rejects(first)), first.with_suffix("")
    raise InputError(
        f"{first}: neither rows (train.jsonl), nor a trained model's folder, nor several results folders"
    )


def main(arguments):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="train.jsonl, a trained folder, or results folders"
    )
    parser.add_argument(
        "--output", help="name of the picture without .png and .svg (default: beside what was read)"
    )
    settings = parser.parse_args(arguments)
    panels, output = panels_of(settings.paths)
    output = settings.output or output
    save(panels, output)
    print(f"picture: {output}.png, {output}.svg")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
