"""Are your trainer's labels what your engine must generate? See recipes/label_doctor/README.md
    python recipes/label_doctor.py --tokenizer Qwen/Qwen3-8B --rows rows.jsonl --labels dump.jsonl

Reads rows {"messages", "tools"?, "query_id"?} and what was trained of them, {"input_ids", "labels",
"query_id"?}, -100 for no loss; prints a verdict for every turn that is not exact, then exit code 1.
"""

import argparse
import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Turn:
    number: int  # of the message in the row
    message: dict
    context: list  # token ids that the engine is given
    target: list  # token ids that it must generate


@dataclass
class Finding:
    kind: str
    turn: int | None
    detail: str = ""

    def __str__(self):
        where = "" if self.turn is None else f"messages[{self.turn}]: "
        return f"{where}{self.kind}: {self.detail}"


class Patient:
    def __init__(self, sample):
        self.ids = sample["input_ids"]
        self.labels = sample["labels"]
        self.trained = [label != -100 for label in self.labels]
        self.right = sample["right"] = []  # places that should carry loss
        self.taken = set()  # places of turns
        self.end = 0  # of the last turn that was found

    def run(self, start):
        """The range of the first tokens with loss, from start on."""
        start = next_place(True, self.trained, start)
        return range(start, next_place(False, self.trained, start))


def expected_turns(sft, tok, row):
    """A Turn for each message of the row that the model wrote; raises sft.Refused."""
    sft.check_row({name: row.get(name) for name in ("messages", "tools")})
    messages = [sft.without_empty_keys(message) for message in row["messages"]]
    sft.check_stops(tok, messages)
    numbers = [number for number, message in enumerate(messages) if sft.is_trained(message)]
    spans = []
    for ids, labels in sft.encode_conversation(tok, messages, row.get("tools")):
        exact = Patient({"input_ids": ids, "labels": labels})
        run = exact.run(0)
        while run:
            spans.append((ids[: run.start], ids[run.start : run.stop]))
            run = exact.run(run.stop)
    turns = []
    for number, span in zip(numbers, spans, strict=True):
        turns.append(Turn(number, messages[number], *span))
    return turns


def places_of(part, ids, start):
    end = len(part)
    return [place for place in range(start, len(ids)) if ids[place : place + end] == part]


def first_difference(ours, theirs):
    for place, (one, other) in enumerate(zip(ours, theirs)):
        if one != other:
            return place
    return min(len(ours), len(theirs))


def next_place(flag, flags, start):
    return flags.index(flag, start) if flag in flags[start:] else len(flags)


def find_turn(turn, patient):
    """Where a turn begins that is not in its own context: with loss, or at all; else the next loss."""
    whole = places_of(turn.target, patient.ids, patient.end)
    places = whole + places_of(turn.target[:-1] or turn.target, patient.ids, patient.end)
    length = len(turn.target)
    for place in places:
        if any(patient.trained[place : place + length]):
            return place
    return whole[0] if whole else patient.run(patient.end).start


def shown(tok, ids):
    return repr(tok.decode(ids[:12]))


def difference(tok, verb, ours, theirs):
    at = first_difference(ours, theirs)
    return f"token {at}: {verb} {shown(tok, ours[at:])}, trained {shown(tok, theirs[at:])}"


def compare_labels(tok, turn, trained):
    """[Finding] of tokens of a turn without loss. trained: of its target, or the beginning of it."""
    if trained and not any(trained):
        return [Finding("not trained", turn.number)]
    last = len(turn.target) - 1
    ends = {"beginning": next_place(True, trained, 0), "hole": last, "stop token": last + 1}
    found = []
    start = 0
    for kind, end in ends.items():
        part = trained[:end]
        silent = next_place(False, part, start)
        if silent < len(part):
            told = shown(tok, turn.target[silent : next_place(True, part, silent)])
            found.append(Finding(kind, turn.number, f"{told} carries no loss"))
        start = end
    return found


def compare_tokens(tok, turn, patient, places):
    """[Finding] of the first label that is another token than the one that stands there."""
    for place in places:
        label = patient.labels[place]
        if label not in (-100, patient.ids[place]):
            told = f"{shown(tok, [label])} for {shown(tok, patient.ids[place : place + 1])}"
            return [Finding("another token", turn.number, told)]
    return []


def compare_end(tok, turn, patient, end):
    other = patient.ids[end : end + 1]  # none if the sample ends
    trained = any(patient.trained[end : end + 1])
    kind = "another stop token" if trained and other[0] in tok.stop_ids else "stop token"
    return Finding(kind, turn.number, f"{shown(tok, other)} for {shown(tok, turn.target[-1:])}")


def written_otherwise(sft, tok, turn, patient, place):
    """(findings, its tokens) of a turn in another form: what is trained from its place on."""
    run = patient.run(place)
    if not run:
        return [Finding("not trained", turn.number, "nor does it stand there")], run
    theirs = patient.ids[place : run.stop]
    told = difference(tok, "must write", turn.target, theirs)
    text = tok.decode(theirs)
    parts = sft.parts_of(turn.message, thoughts=True)
    missing = [name for name, value in parts if not sft.stands_in(value, text)]
    empty = sum(value == "" for _, value in parts)
    kind = "missing" if missing else "written otherwise"
    told = "; ".join([*missing, told])
    found = [Finding(kind, turn.number, told)]
    if not tok.stop_ids & set(theirs):
        found.append(Finding("stop token", turn.number, "there is none"))
    if len(missing) + empty == len(parts):
        run = range(0)  # none of it is there: this is another turn
    return found, run


def examine_turn(sft, tok, turn, patient):
    """(findings, range of a turn's tokens in a sample, how many of them are right)."""
    ids = patient.ids
    place = len(turn.context)
    found = []
    if len(ids) <= place and ids == turn.context[: len(ids)]:
        return [Finding("truncated", turn.number, "before it")], range(0), 0
    if ids[:place] != turn.context:
        place = find_turn(turn, patient)
        told = difference(tok, "served", turn.context, ids[:place])
        found = [Finding("context", turn.number, told)]
    same = first_difference(turn.target, ids[place:])
    end = place + same
    length = len(turn.target)
    if same < length - 1 and end < len(ids):
        others, taken = written_otherwise(sft, tok, turn, patient, place)
        return found + others, taken, 0
    found += compare_labels(tok, turn, patient.trained[place:end])
    found += compare_tokens(tok, turn, patient, range(place, end))
    if same == length - 1:
        found.append(compare_end(tok, turn, patient, end))
    elif same < length:
        found.append(Finding("truncated", turn.number, f"after {same} of {length} tokens"))
    return found, range(place, place + length), same


def best_findings(sft, tok, turn, patients):
    places = [examine_turn(sft, tok, turn, patient) for patient in patients]
    nothing = [Finding("not trained", turn.number, "no sample has it")]
    best = min((found for found, _, _ in places), key=len, default=nothing)
    for patient, (found, taken, right) in zip(patients, places):
        patient.end = max(patient.end, taken.stop)
        if found is best or not found:
            patient.taken.update(taken)
            patient.right += taken[:right]
    return best or [Finding("exact", turn.number)]


def examine_row(sft, tok, row, samples):
    """Findings of a row: one "exact" or more for each turn, and loss where none belongs."""
    try:
        turns = expected_turns(sft, tok, row)
    except sft.Refused as error:
        return [Finding("refused", None, str(error))]
    patients = [Patient(sample) for sample in samples]
    findings = []
    for turn in turns:
        findings += best_findings(sft, tok, turn, patients)
    for patient in patients:
        extra = [place for place, on in enumerate(patient.trained) if on and place not in patient.taken]
        if extra:
            told = f"{len(extra)} tokens, first {shown(tok, patient.ids[extra[0] :])}"
            findings.append(Finding("extra", None, told))
    return findings


def read_dump(path, names, sft):
    """[the samples of each row]; names of rows. Raises InputError for a line that is none."""
    numbers = {}
    for number, name in enumerate(names):
        numbers[name] = None if name in numbers else number
    samples = [[] for _ in names]
    for number, (where, line) in enumerate(sft.read_jsonl(path)):
        try:
            right = len(line["input_ids"]) == len(line["labels"])
        except (KeyError, TypeError):
            right = False
        if not right:
            raise sft.InputError(f"{where}: input_ids and labels must be lists of one length")
        at = numbers.get(str(line["query_id"])) if "query_id" in line else number
        if at is None or at >= len(names):
            raise sft.InputError(f"{where}: belongs to no row of --rows, or to several of one query_id")
        samples[at].append(line)
    return samples


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="Folder or Hub id, with a chat template.")
    parser.add_argument("--rows", required=True, help="Conversations, JSONL.")
    parser.add_argument("--labels", required=True, help="The trainer's input_ids and labels, JSONL.")
    parser.add_argument("--chat_template_kwargs", help="Switches of the template, JSON.")
    parser.add_argument("--output_dir", type=Path, help="Folder for recipes/view.py.")
    flags = parser.parse_args(arguments)
    sft = importlib.import_module("03_sft")
    try:
        tok = sft.load_tokenizer(flags.tokenizer, sft.read_switches(flags))
        rows = list(sft.read_jsonl(flags.rows))
        names = [str(row.get("query_id", where)) for where, row in rows]
        dump = read_dump(flags.labels, names, sft)
    except (sft.InputError, OSError) as error:
        print(f"label_doctor.py: {error}", file=sys.stderr)
        return 2
    counts = Counter()
    for (where, row), name, samples in zip(rows, names, dump):
        findings = examine_row(sft, tok, row, samples)
        counts.update(finding.kind for finding in findings)
        verdicts = [str(finding) for finding in findings if finding.kind != "exact"]
        for verdict in verdicts:
            print(f"{where}: {verdict}")
        for sample in samples:
            sample |= {"query_id": name, "verdicts": verdicts}
    print(", ".join(f"{kind}: {count}" for kind, count in counts.most_common()))
    if flags.output_dir:
        sft.write_samples(flags.output_dir, sum(dump, []), tok)
    return int(set(counts) != {"exact"})


if __name__ == "__main__":
    sys.exit(main())
