"""How many of its tasks each family solves: held-out tasks first, then the families that were never trained.

    python recipes/demo/families.py results/demo/base results/demo/tuned

Reads summary.json of 04_eval.py (by_task, SR@R) in each folder; the 95 % intervals are Wilson's.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tasks import UNSEEN  # noqa: E402

UNSEEN_NAMES = [family.__name__ for family in UNSEEN]


def solved_by_family(folder):
    """{family: [is it solved? for each of its tasks]}, by the ids that tasks.py gives: pool-family-number."""
    summary = json.loads((Path(folder) / "summary.json").read_text())
    families = {}
    for query_id, scores in summary["by_task"].items():
        rate = next(value for name, value in scores.items() if name.startswith("SR@"))
        families.setdefault(query_id.split("-")[1], []).append(rate == 1)
    return families


def wilson(successes, count):
    """The 95 % interval of a share, as (low, high)."""
    z = 1.96
    share = successes / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0, middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def cell(solved):
    """ "7 of 8" """
    return f"{sum(solved)} of {len(solved)}"


def total(solved):
    if not solved:
        return "-"
    low, high = wilson(sum(solved), len(solved))
    return f"{cell(solved)} = {sum(solved) / len(solved):.0%} [{low:.0%}, {high:.0%}]"


def group_rows(title, names, runs):
    """Rows of the table: a family each, then their total."""
    rows = []
    for name in names:
        rows.append([name.replace("_", " "), *(cell(run[name]) for run in runs)])
    totals = []
    for run in runs:
        solved = []
        for name in names:
            solved += run[name]
        totals.append(total(solved))
    return [*rows, [f"**{title}**", *totals]]


def table(folders):
    """A Markdown table: a family a row, a folder a column."""
    runs = [solved_by_family(folder) for folder in folders]
    learned = [name for name in runs[0] if name not in UNSEEN_NAMES]
    unseen = [name for name in runs[0] if name in UNSEEN_NAMES]
    rows = [["family", *(Path(folder).name for folder in folders)], ["---"] * (1 + len(folders))]
    rows += group_rows("trained families", learned, runs)
    rows += group_rows("unseen families", unseen, runs)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(table(sys.argv[1:]))
