"""Tables of recipes/limi: the paper's claims, and one model's runs beside the paper's numbers.

    python recipes/limi/table.py                # claims.yaml as markdown; README.md holds it
    python recipes/limi/table.py --write        # the same, into README.md
    python recipes/limi/table.py --runs results/limi-qwen3-8b --model qwen3-8b    # run.sh's last step

--runs reads base-tools, tuned-tools, base-no_tools and tuned-no_tools below the folder (04_eval.py's
summary.json), writes table.md there and prints it; with what run.sh --generalization has left there, a second
table, beside the paper's Tables 3 and 4.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
MARKS = ("<!-- claims -->\n", "<!-- /claims -->")
COLUMNS = ["claim", "where", "paper", "ours", "command", "cost", "for", "against"]
ARMS = ["base-tools", "tuned-tools", "base-no_tools", "tuned-no_tools"]
METRICS = ["FTFC", "RC@3", "SR@3", "average"]
# Of run.sh --generalization: (end of the folder's name, benchmark and metric as in paper_tables.yaml)
BENCHMARKS = [
    ("tau2-airline", "tau2-airline", "pass^4"),
    ("tau2-retail", "tau2-retail", "pass^4"),
    ("ds1000", "DS-1000", "SR@1"),
    ("humaneval", "HumanEval+", "SR@1"),
    ("mbpp", "MBPP+", "SR@1"),
    ("scicode", "SciCode", "pass@1"),
    ("scicode", "SciCode", "SR@1 over turns"),
]
TABLES = {"tools": "Table 3", "no_tools": "Table 4"}

# Our recipe: (base, tuned) as Table 2 calls them
IN_TABLE_2 = {"glm-4.5": ("GLM-4.5", "LIMI"), "glm-4.5-air": ("GLM-4.5-Air", "LIMI-Air")}
# Of dense models only the average is published: assets/generalize_improvement.png of LIMI's repository
DENSE = {"qwen3-4b": (4.6, 8.6), "qwen3-8b": (7.3, 10.6), "qwen3-32b": (8.4, 20.5)}


class InputError(ValueError):
    """A mistake in the user's input, told in one line; exit code 2."""


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def claims_table() -> str:
    rows = []
    for claim in yaml.safe_load((HERE / "claims.yaml").read_text()):
        missing = [column for column in COLUMNS if not claim.get(column)]
        if missing or len(claim) > len(COLUMNS):
            raise InputError(f"claims.yaml: {claim.get('claim')!r}: wants exactly {', '.join(COLUMNS)}")
        cells = {column: " ".join(str(claim[column]).split()) for column in COLUMNS}
        if not cells["command"].startswith("none"):
            cells["command"] = f"`{cells['command']}`"
        rows.append(list(cells.values()))
    return markdown(COLUMNS, rows)


def split_readme() -> tuple[str, str, str]:
    """(text up to the first mark and with it, the table, the rest)."""
    before, found, rest = (HERE / "README.md").read_text().partition(MARKS[0])
    table, also, after = rest.partition(MARKS[1])
    if not found or not also:
        raise InputError(f"README.md: wants {MARKS[0].strip()} and {MARKS[1]}")
    return before + found, table, also + after


def write_readme() -> None:
    before, _, after = split_readme()
    (HERE / "README.md").write_text(before + claims_table() + after)


def paper_numbers(model: str) -> dict[str, list[str]]:
    """Metric -> what the paper has for [base, tuned], both with tools; "" where it has nothing."""
    tables = yaml.safe_load((HERE.parent / "benchmarks" / "paper_tables.yaml").read_text())
    table = tables["Table 2"]["benchmarks"]["agencybench-v1"]
    numbers = {metric: ["", ""] for metric in METRICS}
    if model in IN_TABLE_2:
        for metric in METRICS:
            numbers[metric] = [str(table[metric][name]) for name in IN_TABLE_2[model]]
    elif model in DENSE:
        numbers["average"] = [str(number) for number in DENSE[model]]
    return numbers


def read_run(folder: Path) -> dict:
    path = folder / "summary.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; 04_eval.py writes it, recipes/limi/run.sh has the command")
    return json.loads(path.read_text())


def shown(summary: dict, metric: str) -> str:
    """In percent, with the interval over tasks where there is one."""
    metrics = summary["metrics"]
    if not metrics or metrics.get(metric, 0) is None:
        return "not all ran"
    if metric == "average":
        return f"{100 * statistics.mean(metrics[part] for part in METRICS[:3]):.1f}"
    interval = metrics.get(f"{metric}_ci")
    ends = [f"{100 * end:.1f}" for end in interval or ()]
    return f"{100 * metrics[metric]:.1f}" + (f" [{', '.join(ends)}]" if ends else "")


def published(arm: str, model: str, benchmark: str, metric: str) -> list[str]:
    """[base, tuned] of Table 3 or 4, which have GLM-4.5 alone; "" for others."""
    tables = yaml.safe_load((HERE.parent / "benchmarks" / "paper_tables.yaml").read_text())
    numbers = tables[TABLES[arm]]["benchmarks"][benchmark][metric] if model == "glm-4.5" else {}
    return [str(numbers.get(name, "")) for name in IN_TABLE_2["glm-4.5"]]


def generalization_runs(folder: Path) -> dict[str, dict]:
    """{name of a run's folder: its summary} of what is there; a run that was cut short has none."""
    runs = {}
    for name in dict.fromkeys(name for name, _, _ in BENCHMARKS):
        for run in (f"{arm}-{name}" for arm in ARMS):
            if (folder / run / "summary.json").exists():
                runs[run] = read_run(folder / run)
    return runs


def generalization_table(runs: dict[str, dict], model: str) -> str:
    """A line for each benchmark of which a run is there; "" for none."""
    columns = ["%"]
    for arm, table in TABLES.items():
        words = arm.replace("_", " ")
        columns += [f"{table}: base", f"{table}: tuned", f"base, {words}", f"tuned, {words}"]
    rows = []
    for name, benchmark, metric in BENCHMARKS:
        row = [f"{benchmark}, {metric}"]
        for arm in TABLES:
            row += published(arm, model, benchmark, metric)
            for which in ("base", "tuned"):
                run = runs.get(f"{which}-{arm}-{name}")
                row.append(shown(run, metric) if run else "")
        if any(f"{arm}-{name}" in runs for arm in ARMS):
            rows.append(row)
    return "\n" + markdown(columns, rows) if rows else ""


def runs_table(folder: Path, model: str) -> str:
    summaries = {arm: read_run(folder / arm) for arm in ARMS}
    paper = paper_numbers(model)
    columns = ["%", "paper: base", "paper: tuned", *(arm.replace("-", ", ") for arm in ARMS)]
    rows = []
    for metric in METRICS:
        rows.append([metric, *paper[metric], *(shown(summaries[arm], metric) for arm in ARMS)])
    others = generalization_runs(folder)
    lines = []
    for run, summary in (summaries | others).items():
        away = sum(summary["not_run"].values())
        episodes = f" {summary['episodes']} episodes," if "episodes" in summary else ""  # tau2.py counts none
        lines.append(f"- {run}: {summary['tasks']} tasks,{episodes} {away} not run")
        lines += [f"- {run}, beware: {warning}" for warning in summary.get("warnings", [])]
    text = markdown(columns, rows) + generalization_table(others, model)
    return text + "\n" + "\n".join(lines) + "\n\n" + remarks(model)


def remarks(model: str) -> str:
    if model == "miniature":
        return "A random model on the demo's tasks: it shows that the path runs, nothing about the paper.\n"
    return (
        "The paper's numbers have no interval, were graded in a way that was never published, and are with "
        "tools over all ten tasks of AgencyBench v1; without tools it has none there. No simple formula "
        "gives its RC column. Compare our columns with each other first.\n"
    )


def main(options) -> None:
    if options.write:
        write_readme()
    elif options.runs:
        table = runs_table(options.runs, options.model)
        (options.runs / "table.md").write_text(table)
        print(table, end="")
    else:
        print(claims_table(), end="")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help="the claims' table into README.md")
    parser.add_argument("--runs", type=Path, help="a folder of results of run.sh")
    parser.add_argument("--model", default="", help="its recipe, for the paper's numbers beside it")
    try:
        main(parser.parse_args())
    except (InputError, OSError) as error:
        print(f"table.py: {error}", file=sys.stderr)
        sys.exit(2)
