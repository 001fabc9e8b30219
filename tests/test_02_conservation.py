"""Stage 2: no text of a log is lost in silence, whatever a new version of a tool does to the shape of its logs.

Small logs of every format are changed at one place at a time: a key that holds text is renamed, its text wrapped in
an object or in a list, moved to the parent, or a new text, long or short, is added beside it. Then the row has the
text, or the log is rejected by name. 2,000 changes a format: MUTATIONS=2000 pytest tests/test_02_conservation.py
"""

import copy
import importlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

stage = importlib.import_module("02_format_trajectories")
MUTATIONS = int(os.environ.get("MUTATIONS", 60))
LOGS = json.loads((Path(__file__).parent / "fixtures/small_logs.json").read_text())
READERS = stage.load_readers(stage.HERE / "recipes/logs")
# New text is longer than what the check passes over, and reads like text
NEW = "words that {} was told nobody may lose"


def places(value, path=()):
    """The path of every text of a conversation: strings of 20 characters with a space, and the short ones that say something."""
    if isinstance(value, str):
        return [path] if " " in value.strip() and len(value) >= stage.SHORTEST else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in items:
        found += places(item, (*path, key))
    return found


def parent_of(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


def rename(holder, key, parent, text):
    if isinstance(holder, dict):
        holder[f"{key}_v2"] = holder.pop(key)


def wrap(holder, key, parent, text):
    holder[key] = {"body": holder[key]}


def wrap_in_list(holder, key, parent, text):
    holder[key] = [{"type": "body", "body": holder[key]}]


def move(holder, key, parent, text):
    if isinstance(parent, dict):
        parent["moved"] = holder[key]
        holder[key] = ""


def add(holder, key, parent, text):
    if isinstance(holder, dict):
        holder["extra_text"] = text
    else:
        holder.append({"type": "text", "text": text})


def say(holder, key, parent, text):
    """A short text under another key for what is said."""
    if isinstance(holder, dict):
        holder[next(other for other in sorted(stage.SAID_KEYS) if other not in holder)] = text


def add_kind(holder, key, parent, text):
    """An entry of a new kind beside an old one."""
    siblings = holder if isinstance(holder, list) else parent
    if isinstance(siblings, list):
        siblings.append({"type": "brand_new_kind", "body": text})


CHANGES = [rename, wrap, wrap_in_list, move, add, say, add_kind]


def mutated(log, generator):
    """(a changed log, the text that it is about, what was done)."""
    log = copy.deepcopy(log)
    path = generator.choice(places(log))
    change = generator.choice(CHANGES)
    holder = parent_of(log, path)
    grown = change in (add, say, add_kind)
    text = NEW.format(generator.choice(["Ann", "Ben"])) if grown else holder[path[-1]]
    text = "Eh, no." if change is say else text
    parent = parent_of(log, path[:-1]) if len(path) > 1 else None
    change(holder, path[-1], parent, text)
    done = f"{change.__name__} {'.'.join(map(str, path))}"
    return log, text, done


def outcome_of(log):
    """The reasons of a reject, or the row's text and what its reader leaves out by name."""
    run = stage.make_run(stage.Settings())
    run.tools[""] = stage.read_tools(LOGS["tools"])
    try:
        reader = stage.find_format(log, READERS)
        if reader is None:
            return ["not_a_log"], ""
        parts = reader.split(log) if reader.split else [log]
        rows = [stage.make_row("log", reader, part, run)[0] for part in parts]
        return [], "\n".join(stage.strings_of(rows))
    except (stage.Reject, *stage.MALFORMED) as reject:
        return [str(reject) or "malformed"], ""


def is_left_out(text, done, name):
    """Does the change stand where the tool itself took a text back, repeats it, or asks a helper?"""
    if text in (stage.CONTEXT_ANSWER, stage.NEXT_SPEAKER):
        return True
    path = done.split(" ", 1)[1] + "."
    return any(path.startswith(f"{place}.") for place in LOGS["left_out"].get(name, []))


@pytest.mark.parametrize("name", LOGS["logs"])
def test_the_small_log_itself_gives_a_row(name):
    reasons, _ = outcome_of(LOGS["logs"][name])
    assert reasons == []
    assert stage.find_format(LOGS["logs"][name], READERS).name == name


@pytest.mark.parametrize("name", LOGS["logs"])
def test_no_text_is_lost_in_silence(name):
    generator = random.Random(name)
    silent, results = [], Counter()
    for _ in range(MUTATIONS):
        log, text, done = mutated(LOGS["logs"][name], generator)
        if not any(text in string for string in stage.strings_of(log)):
            continue  # there was no place for a new entry
        reasons, kept = outcome_of(log)
        pieces = [piece.strip() for piece in text.splitlines() if piece.strip()]
        results["rejected" if reasons else "kept"] += 1
        if not reasons and not all(piece in kept for piece in pieces) and not is_left_out(text, done, name):
            silent.append(done)
    assert silent == [], f"{len(silent)} of {MUTATIONS}: {sorted(set(silent))[:8]}"
    assert results["rejected"] or MUTATIONS < 60
