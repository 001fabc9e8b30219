"""Pages to read of whatever a stage left behind: rows, trained tokens, episodes, base beside tuned.

    python recipes/view.py data/train.jsonl              # rows: lengths, turns, tools, domains, rejects
    python recipes/view.py outputs/limi                  # which tokens are trained, the loss
    python recipes/view.py results/base                  # tasks, outcomes, every conversation
    python recipes/view.py results/base results/tuned    # what differs first, the plot, task by task

Reads  train.jsonl (02); tokenized.jsonl, tokenizer.json, recipe.json (03); episodes.jsonl, summary.json (04)
Writes index.html and a page for each row, sample, task or episode into --output_dir

The pages work from a disk: no script, nothing from the network. Their form stands in recipes/view/*.html.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import markupsafe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import plot  # noqa: E402
from pages import flatten, grouped, split_rounds, write_numbered, write_page  # noqa: E402
from plot import InputError, evaluation, read_json, read_lines  # noqa: E402


def pictures_of(panels):
    return [markupsafe.Markup(picture) for picture in plot.inline(panels)]


# ---- Rows ----


def view_rows(path, output, most):
    """02's rows, and what it rejected."""
    cards, shown = [], []
    for row in plot.read_rows(path):
        card = plot.card_of(row)
        cards.append(card)
        if len(shown) < most:
            shown.append({"row": row, "card": card})
    write_numbered(output, "row.html", shown)
    rejects = plot.read_rejects(path)
    write_page(
        output / "index.html",
        "rows.html",
        name=path.name,
        cards=cards,
        unit=plot.length_unit(cards),
        pictures=pictures_of(plot.row_panels(cards, rejects)),
        rejects=rejects,
        reasons=plot.reject_counts(rejects).most_common(),
        most=most,
    )


# ---- Trained tokens ----


def token_kinds(sample):
    """A word for each token: "trained" or "context" by its label, and where the label doctor's "right" says
    otherwise "extra" (trained, but should not be) or "untrained" (should be, but is not)."""
    trained = [label != -100 for label in sample["labels"]]
    right = set(sample.get("right", [place for place, on in enumerate(trained) if on]))
    kinds = []
    for place, on in enumerate(trained):
        if on:
            kinds.append("trained" if place in right else "extra")
        else:
            kinds.append("untrained" if place in right else "context")
    return kinds


def token_runs(sample, tokenizer):
    """[(kind of token_kinds or "stop", text)]; a stop is a special token that ends a trained span."""
    added = tokenizer.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}
    runs = []
    pairs = zip(sample["input_ids"], token_kinds(sample), strict=True)
    for kind, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in group]
        stop = [ids.pop()] if kind == "trained" and ids[-1] in special else []
        runs.append((kind, ids))
        runs.append(("stop", stop))
    return [(kind, tokenizer.decode(ids, skip_special_tokens=False)) for kind, ids in runs if ids]


def sample_card(sample, tokenizer):
    labels = sample["labels"]
    trained = [label != -100 for label in labels]
    runs = token_runs(sample, tokenizer)
    return {
        "query_id": sample["query_id"],
        "tokens": len(labels),
        "trained": sum(trained),
        "spans": sum(is_trained for is_trained, _ in itertools.groupby(trained)),
        "stops": sum(kind == "stop" for kind, _ in runs),
        "runs": runs,
        "verdicts": sample.get("verdicts"),  # the label doctor's
    }


def view_tokens(folder, output, most, tokenizer):
    """03's tokenized.jsonl: which tokens carry loss."""
    from tokenizers import Tokenizer

    text = evaluation.read_model_file(tokenizer or folder, "tokenizer.json")
    if not text:
        raise InputError(f"{tokenizer or folder}: no tokenizer.json; name the base model's: --tokenizer NAME")
    tokenizer = Tokenizer.from_str(text)
    cards = []
    for _, sample in read_lines(folder / "tokenized.jsonl", "query_id", "input_ids", "labels"):
        cards.append(sample_card(sample, tokenizer))
        if len(cards) > most:
            del cards[-1]["runs"]  # the numbers are enough
    write_numbered(output, "sample.html", cards[:most])
    recipe = folder / "recipe.json"
    log = read_json(recipe) if recipe.exists() else {}
    write_page(
        output / "index.html",
        "tokens.html",
        name=folder.name,
        cards=cards,
        pictures=pictures_of(plot.training_panels(log, folder.name)),
        most=most,
    )


# ---- Episodes ----


def read_episodes(folder):
    """04's episodes by task and run; a run that still goes on has some."""
    path = folder / "episodes.jsonl"
    wanted = ("query_id", "run", "messages", "meta", "rounds")
    rows = []
    for _, row in read_lines(path, *wanted, append_only=True) if path.exists() else ():
        row.pop("served", None)  # token ids
        row["before"], row["rounds"] = split_rounds(row["messages"], row["rounds"])
        rows.append(row)
    return sorted(rows, key=lambda row: (row["query_id"], row["run"]))


def split_metrics(metrics):
    """(scores as [(names, value, (low, high) or None)], {name: count}) of a summary's metrics."""
    scores = {}
    counts = {}
    for name, value in metrics.items():
        per_task = name.removesuffix(" over turns")
        if name.endswith("_ci") or (per_task != name and value == metrics[per_task]):
            continue  # tasks of one turn
        if f"{per_task}_ci" in metrics:
            scores[name] = (value, metrics.get(f"{name}_ci"))
        else:
            counts[name] = value
    return [(names, *pair) for names, pair in grouped(scores)], counts


def view_episodes(folder, output, most, above=()):
    """One run of 04: its scores, its tasks, every conversation. Returns the episodes."""
    rows = read_episodes(folder)
    shown = [{"row": row, "name": folder.name} for row in rows[:most]]
    write_numbered(output, "episode.html", shown, above)
    path, not_run = folder / "summary.json", folder / "not_run.jsonl"
    summary = read_json(path) if path.exists() else {}
    scores, counts = split_metrics(summary.get("metrics", {}))
    write_page(
        output / "index.html",
        "episodes.html",
        name=folder.name,
        rows=rows,
        scores=scores,
        counts=counts,
        warnings=summary.get("warnings", []),
        not_run=list(read_lines(not_run, append_only=True)) if not_run.exists() else [],
        facts=flatten(summary),
        links=above,
        most=most,
    )
    return rows


# ---- Comparisons ----


def paired(table, published):
    """[(metrics, means of the runs, paired differences of the last to each, published)], as 04 has them.

    published: {metric: lines of 04's paper_numbers}"""
    rows = []
    for metrics, per_run in grouped(table):
        differences = []
        for values in per_run[:-1]:
            each = [last - first for first, last in zip(values, per_run[-1])]
            interval = evaluation.bootstrap(each)  # None for too few tasks
            edges = " [{:+.1%}, {:+.1%}]".format(*interval) if interval else ""
            p = evaluation.permutation_p(each)
            differences.append(f"{statistics.mean(each):+.1%}{edges}, {p_value(p)}")
        means = [evaluation.percent(values) for values in per_run]
        lines = itertools.chain(*(published.get(metric, []) for metric in metrics))
        rows.append((metrics, means, differences, list(lines)))
    return rows


def p_value(p):
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"


def by_change(comparison):
    """[(query_id, score of each run, change from the first run to the last)], the largest change first."""
    per_run = next(iter(comparison["table"].values()))
    rows = []
    for task, *values in zip(comparison["tasks"], *per_run):
        rows.append((task, values, values[-1] - values[0]))
    return sorted(rows, key=lambda row: -abs(row[2]))


def view_comparison(folders, output, most, paper):
    """Two or more runs of 04 over the tasks that all have, base first, tuned last."""
    comparison = plot.read_comparison(folders)
    names, tasks = comparison["names"], by_change(comparison)
    published = {}
    for metric in comparison["table"] if paper else ():
        last = comparison["summaries"][-1]
        published[metric] = evaluation.paper_numbers(paper, metric, last, comparison["tasks"])
    above = [("comparison", "../index.html")]
    runs = []
    for number, (name, folder) in enumerate(zip(names, folders), 1):
        rows = view_episodes(folder, output / str(number), most, above)
        runs.append({"name": name, "folder": number, "rows": rows})
    shown = [{"task": task, "runs": runs, "most": most} for task, _, _ in tasks]
    write_numbered(output, "task.html", shown)
    facts = [flatten(summary) for summary in comparison["summaries"]]
    table = {}
    for key in itertools.chain(*facts):
        table[key] = [fact.get(key) for fact in facts]
    panels = plot.comparison_panels(comparison)
    plot.save(panels, output / "compare")
    scored = [summary["by_task"] for summary in comparison["summaries"]]
    write_page(
        output / "index.html",
        "compare.html",
        names=names,
        runs=runs,
        tasks=tasks,
        not_shared=sorted(set().union(*scored) - set(comparison["tasks"])),
        scores=paired(comparison["table"], published),
        table=table,
        pictures=pictures_of(panels),
    )


# ---- What the paths are ----


def view(paths, output, most, paper=None, tokenizer=None):
    """Write the pages of what the paths are and return the address of the first. Raises InputError."""
    first = paths[0]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    if len(paths) > 1:
        output = output or paths[-1] / "compare"
        view_comparison(paths, output, most, paper)
    elif first.is_file():
        output = output or first.with_suffix(".pages")
        view_rows(first, output, most)
    elif first.joinpath("tokenized.jsonl").exists():
        output = output or first / "pages"
        view_tokens(first, output, most, tokenizer)
    elif first.joinpath("episodes.jsonl").exists():
        output = output or first / "pages"
        view_episodes(first, output, most)
    else:
        raise InputError(f"{first}: no tokenized.jsonl (03_sft.py), no episodes.jsonl (04_eval.py)")
    return output / "index.html"


def main(arguments):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=form)
    what = "train.jsonl, a trained model's folder, a results folder, or several of these, base first"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=what)
    parser.add_argument("--output_dir", type=Path, help="of the pages (default: beside what was read)")
    parser.add_argument("--limit", type=int, default=500, help="pages at most (default: %(default)s)")
    parser.add_argument("--paper", type=Path, help="published numbers, to stand beside several results")
    parser.add_argument("--tokenizer", help="folder or Hub id of the base model: a dry run writes none")
    settings = parser.parse_args(arguments)
    paths = [path.resolve() for path in settings.paths]
    more = (settings.limit, settings.paper, settings.tokenizer)
    print(f"pages: {view(paths, settings.output_dir, *more)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
