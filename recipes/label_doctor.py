"""Are your trainer's labels what your engine must generate? Any trainer's, from a dump of what it trains on.

    python recipes/label_doctor.py --tokenizer Qwen/Qwen3-8B --rows rows.jsonl --labels dump.jsonl

Reads  --rows    conversations, a line each: {"messages", "tools"?, "query_id"?} (02_format_trajectories.py)
       --labels  what was trained, a line each: {"input_ids", "labels", "query_id"?}, -100 where there is no
                 loss; a line is of the row with its query_id, or else of its number; a row may have several
Prints a verdict for every turn of the model that is not exact, and a count of each kind; then exit code 1.

What is right is not read from any trainer: for each turn the model's own chat template says what the engine
is given (the conversation so far, with a generation prompt) and what the model must then write, up to and
with the stop token (03_sft.py, whose labels are tested against vLLM's token ids). Verdicts:

  exact                 trained in the context it is served in, all of it, stop token included
  stop token            the stop token carries no loss, or is not there: the model never learns to stop
  beginning             the first tokens carry no loss (a header that is cut too far)
  hole                  tokens in the middle carry no loss
  not trained           the turn carries no loss at all
  truncated             the sample ends within the turn
  missing               a text, call, argument or thought of the turn is nowhere in what is trained
  written otherwise     all is there, in another form than the template's
  context               it is trained after other tokens than it is served after
  context never served  the same, because a later user message has changed what stands before it
  extra                 tokens that the model never has to write carry loss
  refused               the template cannot show the row exactly: no labels of it would be right
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
    """What the engine is given, and what it must generate; token ids."""

    number: int  # of the message in the row
    message: dict
    context: list
    target: list


@dataclass
class Finding:
    kind: str
    turn: int | None
    detail: str = ""


def expected_turns(sft, tok, row):
    """A Turn for each message of the row that the model wrote; raises sft.Refused."""
    turns = []
    messages = row["messages"]
    for number, message in enumerate(messages):
        if sft.is_trained(message):
            end = number + 1
            while end < len(messages) and messages[end]["role"] == "tool":
                end += 1  # GLM-4.5 stops at the role that comes next
            ids, labels = sft.encode(tok, messages[:end], row.get("tools"), first=number)
            trained = [place for place, label in enumerate(labels) if label != -100]
            start = trained[0]
            turns.append(Turn(number, message, ids[:start], ids[start : trained[-1] + 1]))
    return turns


def place_of(part, ids, start=0):
    """Where a list of ids stands in another, from start on; None if it does not."""
    for place in range(start, len(ids) - len(part) + 1):
        if ids[place] == part[0] and ids[place : place + len(part)] == part:
            return place
    return None


def first_difference(ours, theirs):
    """The first place at which two lists differ."""
    for place, (one, other) in enumerate(zip(ours, theirs)):
        if one != other:
            return place
    return min(len(ours), len(theirs))


def shown(tok, ids):
    return repr(tok.decode(ids[:12]))


def compare_context(tok, turn, sample, place, whole):
    """A Finding where the tokens before a turn are not those that it is served after; None if they are."""
    theirs = sample["input_ids"][:place]
    if theirs == turn.context:
        return None
    at = first_difference(turn.context, theirs)
    told = f"token {at}: served {shown(tok, turn.context[at:])}, trained {shown(tok, theirs[at:])}"
    never = sample["input_ids"][: len(whole)] == whole
    return Finding("context never served" if never else "context", turn.number, told)


def compare_labels(tok, turn, labels):
    """A Finding where a turn's tokens do not all carry loss; None if they do. labels: of its target."""
    trained = [label != -100 for label in labels]
    if all(trained):
        return None
    if not any(trained):
        return Finding("not trained", turn.number)
    if all(trained[:-1]):
        return Finding("stop token", turn.number, f"{shown(tok, turn.target[-1:])} carries no loss")
    first = trained.index(False)
    kind = "beginning" if first == 0 and False not in trained[trained.index(True) : -1] else "hole"
    return Finding(kind, turn.number, f"{shown(tok, turn.target[first:])} carries no loss")


def missing_parts(sft, tok, turn, sample):
    """Why a turn's tokens are not in a sample."""
    ids = sample["input_ids"]
    without_stop = place_of(turn.target[:-1], ids, 0) if len(turn.target) > 1 else None
    if without_stop is not None:
        ends = without_stop + len(turn.target) - 1 == len(ids)
        told = f"{shown(tok, turn.target[-1:])} does not follow"
        return Finding("stop token", turn.number, told + (", the sample ends" if ends else ""))
    for length in range(len(turn.target) - 1, 0, -1):
        if ids[-length:] == turn.target[:length]:
            return Finding("truncated", turn.number, f"after {length} of {len(turn.target)} tokens")
    text = tok.decode([label for label in sample["labels"] if label != -100])
    for name, value in sft.parts_of(turn.message, thoughts=True):
        if not sft.stands_in(value, text):
            return Finding("missing", turn.number, f"{name}: {str(value)[:60]!r}")
    return Finding("written otherwise", turn.number, f"the engine must write {shown(tok, turn.target)}")


def examine_turn(sft, tok, turn, sample, whole):
    """(Findings of one turn in one sample, the places that it takes there)."""
    ids = sample["input_ids"]
    place = len(turn.context)
    if ids[place : place + len(turn.target)] != turn.target:
        place = place_of(turn.target, ids)
    if place is None:
        return [missing_parts(sft, tok, turn, sample)], set()
    places = range(place, place + len(turn.target))
    labels = [sample["labels"][number] for number in places]
    found = [compare_context(tok, turn, sample, place, whole), compare_labels(tok, turn, labels)]
    return [finding for finding in found if finding], set(places)


def best_findings(sft, tok, turn, samples, whole, taken):
    """Findings of a turn in the sample where it is best; the places that it takes are added to `taken`."""
    best = None
    for number, sample in enumerate(samples):
        found, places = examine_turn(sft, tok, turn, sample, whole)
        taken[number] |= places
        if best is None or len(found) < len(best):
            best = found
    return [Finding("not trained", turn.number, "no sample has it")] if best is None else best


def extra_loss(tok, samples, taken):
    """Findings of loss on tokens that no turn has to generate."""
    findings = []
    for sample, places in zip(samples, taken):
        trained = [place for place, label in enumerate(sample["labels"]) if label != -100]
        extra = [place for place in trained if place not in places]
        if extra:
            told = f"{len(extra)} tokens, first {shown(tok, sample['input_ids'][extra[0] :])}"
            findings.append(Finding("extra", None, told))
    return findings


def examine_row(sft, tok, row, samples):
    """Findings of a row: one "exact" or more for each turn, and loss where none belongs."""
    try:
        turns = expected_turns(sft, tok, row)
        text = sft.render(tok, row["messages"], row.get("tools"))
    except sft.Refused as error:
        return [Finding("refused", None, str(error))]
    whole = tok(text, add_special_tokens=False)["input_ids"]
    taken = [set() for _ in samples]
    findings = []
    for turn in turns:
        found = best_findings(sft, tok, turn, samples, whole, taken)
        findings += found or [Finding("exact", turn.number)]
    unplaced = {"missing", "written otherwise", "truncated"} & {finding.kind for finding in findings}
    return findings if unplaced else findings + extra_loss(tok, samples, taken)


def read_lines(path, sft):
    return [row for _, row in sft.read_jsonl(path)]


def read_dump(path, rows, sft):
    """[the samples of each row]; raises InputError for a line that is none."""
    by_id = {row.get("query_id"): number for number, row in enumerate(rows)}
    samples = [[] for _ in rows]
    for number, line in enumerate(read_lines(path, sft)):
        ids = line.get("input_ids")
        labels = line.get("labels")
        if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels):
            raise sft.InputError(f"{path}:{number + 1}: input_ids and labels must be lists of one length")
        at = by_id.get(line["query_id"]) if "query_id" in line else number
        if at is None or at >= len(rows):
            raise sft.InputError(f"{path}:{number + 1}: belongs to no row of --rows")
        samples[at].append(line)
    return samples


def main(arguments=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--tokenizer", required=True, help="Folder or Hub id, with a chat template.")
    parser.add_argument("--rows", required=True, help="Conversations, JSONL.")
    parser.add_argument("--labels", required=True, help="The trainer's input_ids and labels, JSONL.")
    parser.add_argument("--chat_template_kwargs", type=json.loads, help="Switches of the template, JSON.")
    flags = parser.parse_args(arguments)
    sft = importlib.import_module("03_sft")
    try:
        tok = sft.load_tokenizer(flags.tokenizer, flags.chat_template_kwargs)
        rows = read_lines(flags.rows, sft)
        dump = read_dump(flags.labels, rows, sft)
    except (sft.InputError, OSError) as error:
        print(f"label_doctor.py: {error}", file=sys.stderr)
        return 2
    counts = Counter()
    for number, (row, samples) in enumerate(zip(rows, dump), 1):
        for finding in examine_row(sft, tok, row, samples):
            counts[finding.kind] += 1
            if finding.kind != "exact":
                where = "" if finding.turn is None else f": messages[{finding.turn}]"
                print(f"{flags.rows}:{number}{where}: {finding.kind}: {finding.detail}")
    print(", ".join(f"{kind}: {count}" for kind, count in counts.most_common()))
    return 1 if set(counts) - {"exact"} else 0


if __name__ == "__main__":
    sys.exit(main())
