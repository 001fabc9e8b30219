"""How a page shows what a model or a person wrote: for view.py and review.py beside it.

Every text is escaped (jinja2's autoescape), what cannot be seen is made visible, a long text is cut and
says by how much, names and units are a person's. The forms stand in view/*.html and review/*.html.
"""

import json
import re
import statistics
from pathlib import Path

import jinja2
import markupsafe
import yaml

HERE = Path(__file__).resolve().parent
LONGEST = 20_000  # characters of one text: a page must open quickly
SHORT = 80  # characters of an argument that stands in the line of its call
# Control characters, direction marks, half surrogate pairs, tags (models read them, nobody sees them);
# but not the joiners that emoji and Persian need
UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
EDITS = {"old_string": "removed", "old_str": "removed", "new_string": "added", "new_str": "added"}
WORDS = yaml.safe_load((HERE / "view" / "words.yaml").read_text(encoding="utf-8"))


def visible(value):
    """What a page shows of a value: None as a dash, 1,000 for 1000, nothing unseen."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return UNSEEN.sub(show_unseen, value)
    return value


def show_unseen(match):
    return f"⟨U+{ord(match[0]):04X}⟩"


def clip(text):
    """A long text without its middle, with the length of what is left out."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - LONGEST:,} characters left out of this page …]\n{text[-half:]}"


def duration(seconds):
    """A number of seconds as a person says it; None for what is no number."""
    if not isinstance(seconds, (int, float)):
        return None
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def call_parts(function):
    """A tool call as a person writes it: {"command": str | None, "short", "long"}.

    short: [(label, text)], what stands in the line of the call; long: [(label, text, kind)], a block each.
    """
    arguments = function["arguments"]
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    parts = {"command": None, "short": [], "long": []}
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        label = name.replace("_", " ")
        if name in ("command", "cmd") and isinstance(value, str):
            parts["command"] = text
        elif name in EDITS or len(text) > SHORT or "\n" in text:
            parts["long"].append((label, text, EDITS.get(name, "")))
        else:
            parts["short"].append(("" if name.endswith("path") else label, text))
    return parts


def diff_lines(text):
    """[(kind, line)] of a diff: file, place, added, removed, same."""
    kinds = {"+++": "file", "---": "file", "dif": "file", "@": "place", "+": "added", "-": "removed"}
    lines = []
    for line in text.splitlines():
        kind = kinds.get(line[:3]) or kinds.get(line[:1], "same")
        lines.append((kind, line))
    return lines


def tool_names(messages):
    """{id of a call: name of its tool}"""
    names = {}
    for message in messages:
        for call in message.get("tool_calls") or []:
            names[call.get("id")] = call["function"]["name"]
    return names


def split_rounds(messages, records):
    """(messages before the first round, 04's rounds, each with its "messages" and "told").

    told: the feedback where no message repeats it.
    """
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    starts = starts[: len(records)]
    starts += [len(messages)] * (len(records) - len(starts))  # a driver may end without asking the agent
    rounds = []
    for record, start, end in zip(records, starts, [*starts[1:], len(messages)]):
        feedback = record.get("feedback") or ""
        repeated = end < len(messages) and feedback in messages[end]["content"]
        more = {"messages": messages[start:end], "told": "" if repeated else feedback}
        rounds.append(record | more)
    before = messages[: starts[0]] if starts else messages
    return before, rounds


def flatten(summary):
    """{human name: value} of what a summary says of its run beside the scores; hashes are shortened."""
    facts = {}
    for key, value in summary.items():
        if key in ("by_task", "metrics", "task_sha256", "warnings"):
            continue
        if key == "sources":  # of every task, and mostly the same
            value = ", ".join(sorted({source for source in value.values() if source}))
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for name, one in entries:
            text = json.dumps(one) if isinstance(one, (dict, list)) else one
            if isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32,}", text):
                text = text[:12] + "…"
            facts[f"{key} {name}".strip().replace("_", " ")] = text
    return facts


def metric_name(key):
    for pattern, name in WORDS["metrics"].items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return key.replace("_", " ").capitalize()


def grouped(scores):
    """[(names, value)] of {name: value}: names with the same value stand together, "average" last of them."""
    groups = {}
    for name, value in scores.items():
        groups.setdefault(json.dumps(value), []).append(name)
    pairs = []
    for names in groups.values():
        pairs.append((sorted(names, key=lambda name: name == "average"), scores[names[0]]))
    return pairs


def metric_names(names):
    """Of scores that are the same: the first one's words, the others' names."""
    first, *others = names
    return metric_name(first) + (f"; the same: {', '.join(others)}" if others else "")


def stop_words(stop):
    return WORDS["stops"].get(stop, str(stop).replace("_", " "))


def page_name(number):
    return f"{number:04}.html"


def pretty(value):
    return json.dumps(value, indent=1, ensure_ascii=False)


FILTERS = [clip, duration, call_parts, diff_lines, tool_names, flatten]
FILTERS += [metric_name, metric_names, stop_words, page_name, pretty]


def make_environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE / "view", HERE / "review"]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # what a message lacks prints nothing
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in FILTERS:
        environment.filters[show.__name__] = show
    environment.filters["median"] = statistics.median
    return environment


ENVIRONMENT = make_environment()


def write_page(path, template, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ENVIRONMENT.get_template(template).render(values)
    path.write_text(text, encoding="utf-8")


def write_numbered(output, template, items, above=()):
    """0001.html, 0002.html ...: a page for each item, with links to its neighbours."""
    for number, item in enumerate(items, 1):
        links = [("↑ all", "index.html")]
        if number > 1:
            links.append(("← previous", page_name(number - 1)))
        if number < len(items):
            links.append(("next →", page_name(number + 1)))
        write_page(output / page_name(number), template, links=[*links, *above], **item)
