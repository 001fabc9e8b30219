"""The demo's tasks: small jobs in files and shell, thirteen families to learn and two that are only tested.

    python recipes/demo/tasks.py --output_dir data/demo --per_family 6

Writes train_tasks.jsonl  training tasks; teacher.py plays their `meta.steps`
       held_out.jsonl     tasks of the same families, unseen.jsonl: of the families of UNSEEN
       workspaces/        a task's folder; private/: the same folder as it must be once the job is done

A family is a function that draws words and numbers and returns a Job. Words and numbers come from two pools, one for
training and one for tests: no name and no value of a test stands in a training task.
"""

import argparse
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

WORDS = Path(__file__).with_name("words.txt").read_text().split()
SYSTEM = "You work in the folder /workspace. Do the task with the tool, then say in one sentence what you did."


@dataclass
class Job:
    query: str
    files: dict[str, str]  # the workspace: name -> text
    changes: dict[str, str | None]  # what the job does to it; None: the file is gone
    steps: list[tuple[str, str]]  # what the teacher says and runs, call by call
    answer: str
    check: str = "diff -r /private /workspace"


class Draw:
    """Words and numbers of one pool ("train" or "test"), each at most once in a task."""

    def __init__(self, pool: str, seed: str):
        self.random = random.Random(f"{pool} {seed}")
        test = pool == "test"
        words = [word for place, word in enumerate(WORDS) if (place % 3 == 0) == test]
        numbers = [number for number in range(11, 1000) if (number % 3 == 0) == test]
        self.words = iter(self.random.sample(words, len(words)))
        self.numbers = iter(self.random.sample(numbers, len(numbers)))
        self.small_numbers = iter(self.random.sample(numbers[:6], 6))  # 11 to 27

    def word(self):
        return next(self.words)

    def number(self):
        return next(self.numbers)

    def name(self, *endings):
        """A file name such as "maple.txt"."""
        return self.word() + self.random.choice(endings)

    def lines(self, count, *repeated):
        """A text of `count` lines of two words; each word of `repeated` begins two to four more lines."""
        words = [self.word() for _ in range(6)]
        lines = [" ".join(self.random.sample(words, 2)) for _ in range(count)]
        for word in repeated:
            lines += [f"{word} {other}" for other in words[: self.random.randint(2, 4)]]
        return text(self.random.sample(lines, len(lines)))


def text(lines):
    return "".join(f"{line}\n" for line in lines)


def create(draw):
    file, content = draw.name(".txt", ".md"), f"{draw.word()} {draw.word()}"
    steps = [("", f"echo '{content}' > {file}")]
    return Job(f"Create the file {file} with the text: {content}", {}, {file: text([content])}, steps, f"Created {file}.")


def count(draw):
    log, out, word = draw.name(".log", ".txt"), draw.name(".txt"), draw.word()
    lines = draw.lines(5, word)
    query = f"Count the lines of {log} that contain {word} and write the number to {out}"
    steps = [("", f"grep -c {word} {log} > {out}")]
    return Job(query, {log: lines}, {out: text([lines.count(word)])}, steps, f"Wrote the count to {out}.")


def replace(draw):
    file, old, new = draw.name(".txt", ".md"), draw.word(), draw.word()
    lines, query = draw.lines(3, old), f"Replace {old} by {new} everywhere in {file}"
    steps = [("", f"sed -i 's/{old}/{new}/g' {file}")]
    return Job(query, {file: lines}, {file: lines.replace(old, new)}, steps, f"Replaced {old} by {new}.")


def rename(draw):
    old, new, lines = draw.name(".csv", ".txt"), draw.name(".csv", ".txt"), draw.lines(3)
    return Job(f"Rename {old} to {new}", {old: lines}, {old: None, new: lines}, [("", f"mv {old} {new}")], f"Renamed {old}.")


def filter_lines(draw):
    source, out, word = draw.name(".csv", ".log"), draw.name(".txt"), draw.word()
    lines, query = draw.lines(5, word), f"Write all lines of {source} that contain {word} to {out}"
    kept, steps = [line for line in lines.splitlines() if word in line], [("", f"grep {word} {source} > {out}")]
    return Job(query, {source: lines}, {out: text(kept)}, steps, f"Wrote the lines to {out}.")


def sort(draw):
    source, out, lines = draw.name(".txt", ".csv"), draw.name(".txt"), draw.lines(6)
    query, steps = f"Sort the lines of {source} and write them to {out}", [("", f"sort {source} > {out}")]
    return Job(query, {source: lines}, {out: text(sorted(lines.splitlines()))}, steps, f"Wrote the sorted lines to {out}.")


def move(draw):
    ending, folder = draw.random.choice([".log", ".csv", ".md"]), draw.word()
    moved = {draw.name(ending): draw.lines(1) for _ in range(2)}
    changes = dict.fromkeys(moved) | {f"{folder}/{name}": lines for name, lines in moved.items()}
    query, steps = f"Move all {ending} files into a new folder {folder}", [("", f"mkdir {folder} && mv *{ending} {folder}")]
    return Job(query, moved | {draw.name(".txt"): draw.lines(1)}, changes, steps, f"Moved the files to {folder}.")


def add_up(draw):
    source, out, numbers = draw.name(".txt", ".csv"), draw.name(".txt"), [draw.number() for _ in range(4)]
    query = f"Add up the numbers in {source} and write the sum to {out}"
    steps = [("", f"awk '{{s += $1}} END {{print s}}' {source} > {out}")]
    return Job(query, {source: text(numbers)}, {out: text([sum(numbers)])}, steps, f"Wrote the sum to {out}.")


def last_lines(draw, command="tail", which="last"):
    source, out, number = draw.name(".log", ".txt"), draw.name(".txt"), next(draw.small_numbers)
    lines = draw.lines(40)
    kept = lines.splitlines()[-number:] if which == "last" else lines.splitlines()[:number]
    query, steps = f"Write the {which} {number} lines of {source} to {out}", [("", f"{command} -n {number} {source} > {out}")]
    return Job(query, {source: lines}, {out: text(kept)}, steps, f"Wrote the lines to {out}.")


def edit_json(draw):
    file, keys, new = draw.name(".json"), [draw.word() for _ in range(3)], draw.number()
    values = {key: draw.number() for key in keys}
    steps = [("", f"sed -i 's/\"{keys[1]}\": [0-9]*/\"{keys[1]}\": {new}/' {file}")]
    before, after = (json.dumps(table, indent=1) + "\n" for table in (values, values | {keys[1]: new}))
    return Job(f"Set {keys[1]} to {new} in {file}", {file: before}, {file: after}, steps, f"Set {keys[1]} to {new}.")


def look_up(draw):
    table, out, prices = draw.name(".csv"), draw.name(".txt"), {draw.word(): draw.number() for _ in range(4)}
    wanted, price = draw.random.choice(list(prices.items()))
    query = f"Look up the price of {wanted} in {table} and write it to {out}"
    steps = [("First I look it up.", f"grep {wanted} {table}"), (f"The price is {price}.", f"echo {price} > {out}")]
    lines = text(f"{name},{price}" for name, price in prices.items())
    return Job(query, {table: lines}, {out: text([price])}, steps, f"Wrote {price} to {out}.")


def find_file(draw):
    file, folder, lines = draw.name(".txt", ".md"), f"{draw.word()}/{draw.word()}", draw.lines(2)
    files = {f"{folder}/{file}": lines, f"{draw.word()}/{draw.name('.txt')}": draw.lines(1)}
    query = f"Find the file {file} in the subfolders and copy it to /workspace"
    steps = [("First I search it.", f"find . -name {file}"), (f"It is in {folder}.", f"cp {folder}/{file} .")]
    return Job(query, files, {file: lines}, steps, f"Copied {file}.")


def fix_script(draw):
    file, first, second = draw.name(".py"), draw.word(), draw.word()
    values = draw.number(), draw.number()
    good = f"{first} = {values[0]}\n{second} = {values[1]}\nprint({first} + {second})\n"
    steps = [("First I read it.", f"cat {file}"), ("It subtracts.", f"sed -i 's/{first} - {second}/{first} + {second}/' {file}")]
    query, check = f"The script {file} should print the sum. Fix it.", f'[ "$(python3 -I {file})" = {sum(values)} ]'
    return Job(query, {file: good.replace("+", "-")}, {file: good}, steps, f"Fixed {file}.", check)


def first_lines(draw):
    return last_lines(draw, "head", "first")


def delete(draw):
    file, other = draw.name(".log", ".csv"), draw.name(".txt")
    return Job(f"Delete the file {file}", {file: draw.lines(2), other: draw.lines(2)}, {file: None}, [("", f"rm {file}")], f"Deleted {file}.")


LEARNED = [create, count, replace, rename, filter_lines, sort, move, add_up, last_lines, edit_json]
LEARNED += [look_up, find_file, fix_script]
UNSEEN = [first_lines, delete]


def write_tasks(folder, name, pool, families, per_family):
    """Write folder/name and its tasks' folders; returns the number of tasks."""
    tasks = []
    for family in families:
        for number in range(per_family):
            query_id = f"{pool}-{family.__name__}-{number}"
            job = family(Draw(pool, query_id))
            write_files(folder / "workspaces" / query_id, job.files)
            write_files(folder / "private" / query_id, job.files | job.changes)
            commands = [command for _, command in job.steps]
            turn = {"query": job.query, "check": job.check, "solution": f"{'; '.join(commands)}; echo {job.answer}"}
            tasks.append({
                "query_id": query_id,
                "domain": "vibe_coding",
                "subdomain": family.__name__,
                "source": "demo",
                "system": SYSTEM,
                "turns": [turn],
                "workspace": f"workspaces/{query_id}",
                "private": f"private/{query_id}",
                "meta": {"steps": job.steps, "answer": job.answer},
            })  # fmt: skip
    (folder / name).write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return len(tasks)


def write_files(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)


def main(output_dir, per_family, tests_per_family, unseen_per_family):
    folder = Path(output_dir)
    counts = [
        write_tasks(folder, "queries.jsonl", "train", LEARNED, per_family),
        write_tasks(folder, "held_out.jsonl", "test", LEARNED, tests_per_family),
        write_tasks(folder, "unseen.jsonl", "test", UNSEEN, unseen_per_family),
    ]
    print("{} training tasks, {} held-out ones, {} of unseen families".format(*counts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="data/demo")
    parser.add_argument("--per_family", type=int, default=6)
    parser.add_argument("--tests_per_family", type=int, default=2)
    parser.add_argument("--unseen_per_family", type=int, default=4)
    main(**vars(parser.parse_args()))
