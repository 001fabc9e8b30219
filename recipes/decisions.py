"""What reviewers decided: the file, what an edit does, how far they agree. For review.py beside it."""

import copy
import fcntl
import itertools
import json
import os
from collections import Counter, defaultdict

from plot import read_lines


def read_reviews(path):
    """({query_id: {reviewer: the last decision}}, {query_id: [(reviewer, edit) in the order of time]})"""
    found, edits = defaultdict(dict), defaultdict(list)
    lines = read_lines(path, "query_id", "reviewer", "decision", append_only=True) if path.exists() else ()
    records = [record for _, record in lines]
    for record in sorted(records, key=lambda record: record.get("at", "")):
        found[record["query_id"]][record["reviewer"]] = record
        if record.get("edit"):
            edits[record["query_id"]].append((record["reviewer"], record["edit"]))
    return found, edits


def edited(item, edits):
    """A copy of a task or a row with the reviewers' edits, the later over the earlier, field by field."""
    item = copy.deepcopy(item)
    for _, edit in edits:
        for turn, query in zip(item.get("turns", []), edit.get("queries", [])):
            turn["query"] = query
        if "rubric" in edit:
            item["turns"][0]["rubric"] = edit["rubric"]
        if "domain" in edit:
            where = item if "turns" in item else item.setdefault("meta", {})
            where["domain"] = edit["domain"]
    return item


def names_of(items):
    """What decisions call each item: its query_id, with a number where it is not the first of that id."""
    times = Counter()
    names = []
    for item in items:
        name = item["query_id"]
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name}.{times[name]}")
    return names


def store(path, record):
    """Add a line: appended under a lock, what a killed writer left of its last line is cut off first."""
    with open(path, "ab+") as file:  # O_APPEND
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def assign(items, reviewers, overlap):
    """{reviewer: numbers of the items}: every item for `overlap` reviewers, every group of them as often."""
    groups = list(itertools.combinations(reviewers, overlap))
    work = {reviewer: [] for reviewer in reviewers}
    for number in range(len(items)):
        for reviewer in groups[number % len(groups)]:
            work[reviewer].append(number)
    return work


def agreement(units):
    """(Krippendorff's alpha for nominal values, number of units with two values or more).

    units: of each item the decisions on it. alpha = 1 - observed / expected disagreement; 1 where nobody
    differs, None where no item has two decisions.
    """
    units = [unit for unit in units if len(unit) > 1]
    values = Counter(itertools.chain(*units))
    total = sum(values.values())
    observed = 0.0
    for unit in units:
        same = sum(count * (count - 1) for count in Counter(unit).values())
        observed += (len(unit) * (len(unit) - 1) - same) / (len(unit) - 1)
    expected = total * total - sum(count * count for count in values.values())
    if not units:
        return None, 0
    return (1 - (total - 1) * observed / expected if expected else 1.0), len(units)


def verdict(decisions, reject):
    """True: stays, False: is out, None: nobody decided yet. reject: "any" or "majority" of the reviewers."""
    if not decisions:
        return None
    against = sum(record["decision"] == "reject" for record in decisions)
    return not against if reject == "any" else against <= len(decisions) / 2
