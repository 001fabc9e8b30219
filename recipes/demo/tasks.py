"""The demo's tasks: small jobs in files and shell, thirteen families to learn and two that are only tested.

    python recipes/demo/tasks.py --output_dir data/demo --per_family 6

Writes queries.jsonl   training tasks; teacher.py plays their meta.steps
       held_out.jsonl  tasks of the same families, unseen.jsonl: of the families of UNSEEN
       workspaces/     a task's folder; private/: the same folder as it must be once the job is done

A family is a function that draws words and numbers and returns a Job. There are two pools, one for training
and one for tests: no name and no value of a test stands in a training task.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

WORDS = Path(__file__).with_name("words.txt").read_text().split()
SYSTEM = "You work in /workspace. Do the task with the tool, then say in one sentence what you did."


class Job:
    """query; files: name -> text, after: the same once it is done; steps: [(what the teacher says, what it
    runs)]; answer: what it says at the end; check: a shell command."""

    def __init__(self, query, answer, check="diff -r /private /workspace"):
        self.query = query
        self.answer = answer
        self.check = check
        self.files = {}
        self.after = {}
        self.steps = []

    def file(self, name, text):
        self.files[name] = text
        self.after[name] = text

    def step(self, command, says=""):
        self.steps.append((says, command))


class Draw:
    """Words and numbers of one pool, each at most once in a task."""

    def __init__(self, pool, seed):
        self.random = random.Random(f"{pool} {seed}")
        test = pool == "test"
        words = [word for place, word in enumerate(WORDS) if (place % 3 == 0) == test]
        numbers = [number for number in range(11, 1000) if (number % 3 == 0) == test]
        self.words = self.random.sample(words, len(words))
        self.numbers = self.random.sample(numbers, len(numbers))
        self.small_numbers = self.random.sample(numbers[:6], 6)  # up to 27

    def word(self):
        return self.words.pop()

    def number(self):
        return self.numbers.pop()

    def name(self, *endings):
        """A file name such as "maple.txt"."""
        return self.word() + self.random.choice(endings)

    def text(self, lines, repeated=None):
        """A text of two words a line; two to four lines more begin with the word `repeated`."""
        words = [self.word() for _ in range(6)]
        texts = [" ".join(self.random.sample(words, 2)) for _ in range(lines)]
        if repeated:
            texts += [f"{repeated} {other}" for other in words[: self.random.randint(2, 4)]]
        return in_lines(self.random.sample(texts, len(texts)))


def in_lines(values):
    return "".join(f"{value}\n" for value in values)


def create(draw):
    name = draw.name(".txt", ".md")
    text = f"{draw.word()} {draw.word()}"
    job = Job(f"Create the file {name} with the text: {text}", f"Created {name}.")
    job.step(f"echo '{text}' > {name}")
    job.after[name] = in_lines([text])
    return job


def count(draw):
    source = draw.name(".log", ".txt")
    out = draw.name(".txt")
    word = draw.word()
    query = f"Count the lines of {source} that contain {word} and write the number to {out}"
    job = Job(query, f"Wrote the number to {out}.")
    job.file(source, draw.text(5, word))
    job.step(f"grep -c {word} {source} > {out}")
    job.after[out] = in_lines([job.files[source].count(word)])
    return job


def replace(draw):
    name = draw.name(".txt", ".md")
    old = draw.word()
    new = draw.word()
    job = Job(f"Replace {old} by {new} everywhere in {name}", f"Replaced {old} by {new}.")
    job.file(name, draw.text(3, old))
    job.step(f"sed -i 's/{old}/{new}/g' {name}")
    job.after[name] = job.files[name].replace(old, new)
    return job


def rename(draw):
    old = draw.name(".csv", ".txt")
    new = draw.name(".csv", ".txt")
    job = Job(f"Rename {old} to {new}", f"Renamed {old}.")
    job.file(old, draw.text(3))
    job.step(f"mv {old} {new}")
    job.after[new] = job.after.pop(old)
    return job


def filter_lines(draw):
    source = draw.name(".csv", ".log")
    out = draw.name(".txt")
    word = draw.word()
    job = Job(f"Write all lines of {source} that contain {word} to {out}", f"Wrote the lines to {out}.")
    job.file(source, draw.text(5, word))
    job.step(f"grep {word} {source} > {out}")
    job.after[out] = in_lines(line for line in job.files[source].splitlines() if word in line)
    return job


def sort(draw):
    source = draw.name(".txt", ".csv")
    out = draw.name(".txt")
    job = Job(f"Sort the lines of {source} and write them to {out}", f"Sorted {source}.")
    job.file(source, draw.text(6))
    job.step(f"sort {source} > {out}")
    job.after[out] = in_lines(sorted(job.files[source].splitlines()))
    return job


def move(draw):
    ending = draw.random.choice([".log", ".csv", ".md"])
    folder = draw.word()
    job = Job(f"Move all {ending} files into a new folder {folder}", f"Moved them to {folder}.")
    job.file(draw.name(".txt"), draw.text(1))
    for _ in range(2):
        name = draw.name(ending)
        job.file(name, draw.text(1))
        job.after[f"{folder}/{name}"] = job.after.pop(name)
    job.step(f"mkdir {folder} && mv *{ending} {folder}")
    return job


def add_up(draw):
    source = draw.name(".txt", ".csv")
    out = draw.name(".txt")
    numbers = [draw.number() for _ in range(4)]
    job = Job(f"Add up the numbers in {source} and write the sum to {out}", f"Wrote the sum to {out}.")
    job.file(source, in_lines(numbers))
    job.step(f"awk '{{s += $1}} END {{print s}}' {source} > {out}")
    job.after[out] = in_lines([sum(numbers)])
    return job


def last_lines(draw, which="last", command="tail"):
    source = draw.name(".log", ".txt")
    out = draw.name(".txt")
    number = draw.small_numbers.pop()
    job = Job(f"Write the {which} {number} lines of {source} to {out}", f"Wrote the lines to {out}.")
    job.file(source, draw.text(40))
    job.step(f"{command} -n {number} {source} > {out}")
    lines = job.files[source].splitlines()
    job.after[out] = in_lines(lines[-number:] if command == "tail" else lines[:number])
    return job


def edit_json(draw):
    name = draw.name(".json")
    values = {draw.word(): draw.number() for _ in range(3)}
    key = draw.random.choice(list(values))
    new = draw.number()
    job = Job(f"Set {key} to {new} in {name}", f"Set {key} to {new}.")
    job.file(name, json.dumps(values, indent=1) + "\n")
    job.step(f"sed -i 's/\"{key}\": [0-9]*/\"{key}\": {new}/' {name}")
    job.after[name] = json.dumps(values | {key: new}, indent=1) + "\n"
    return job


def look_up(draw):
    source = draw.name(".csv")
    out = draw.name(".txt")
    prices = {draw.word(): draw.number() for _ in range(4)}
    wanted = draw.random.choice(list(prices))
    query = f"Look up the price of {wanted} in {source} and write it to {out}"
    job = Job(query, f"Wrote the price to {out}.")
    job.file(source, in_lines(f"{name},{price}" for name, price in prices.items()))
    job.step(f"grep {wanted} {source}", "First I look it up.")
    job.step(f"echo {prices[wanted]} > {out}", f"The price is {prices[wanted]}.")
    job.after[out] = in_lines([prices[wanted]])
    return job


def find_file(draw):
    name = draw.name(".txt", ".md")
    folder = f"{draw.word()}/{draw.word()}"
    job = Job(f"Find the file {name} in the subfolders and copy it to /workspace", f"Copied {name}.")
    job.file(f"{folder}/{name}", draw.text(2))
    job.file(f"{draw.word()}/{draw.name('.txt')}", draw.text(1))
    job.step(f"find . -name {name}", "First I search it.")
    job.step(f"cp {folder}/{name} .", f"It is in {folder}.")
    job.after[name] = job.files[f"{folder}/{name}"]
    return job


def fix_script(draw):
    name = draw.name(".py")
    first = draw.word()
    second = draw.word()
    numbers = [draw.number(), draw.number()]
    check = f'[ "$(python3 -I {name})" = {sum(numbers)} ]'
    job = Job(f"The script {name} should print a sum. Fix it.", f"Fixed {name}.", check)
    text = f"{first} = {numbers[0]}\n{second} = {numbers[1]}\nprint({first} - {second})\n"
    job.file(name, text)
    job.step(f"cat {name}", "First I read it.")
    job.step(f"sed -i 's/{first} - {second}/{first} + {second}/' {name}", "It subtracts.")
    job.after[name] = text.replace("-", "+")
    return job


def first_lines(draw):
    return last_lines(draw, "first", "head")


def delete(draw):
    name = draw.name(".log", ".csv")
    job = Job(f"Delete the file {name}", f"Deleted {name}.")
    job.file(draw.name(".txt"), draw.text(2))
    job.files[name] = draw.text(2)
    job.step(f"rm {name}")
    return job


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
            write_files(folder / "private" / query_id, job.after)
            commands = [command for _, command in job.steps]
            solution = "; ".join([*commands, f"echo {job.answer}"])
            tasks.append({
                "query_id": query_id,
                "domain": "vibe_coding",
                "subdomain": family.__name__,
                "source": "demo",
                "system": SYSTEM,
                "turns": [{"query": job.query, "check": job.check, "solution": solution}],
                "workspace": f"workspaces/{query_id}",
                "private": f"private/{query_id}",
                "meta": {"steps": job.steps, "answer": job.answer},
            })  # fmt: skip
    (folder / name).write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return len(tasks)


def write_files(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def main(output_dir, per_family, held_out, unseen):
    folder = Path(output_dir)
    learned = write_tasks(folder, "queries.jsonl", "train", LEARNED, per_family)
    tested = write_tasks(folder, "held_out.jsonl", "test", LEARNED, held_out)
    new = write_tasks(folder, "unseen.jsonl", "test", UNSEEN, unseen)
    print(f"{learned} training tasks; {tested} held-out ones, {new} of families that training never shows")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output_dir", default="data/demo")
    parser.add_argument("--per_family", type=int, default=6, help="training tasks of a family")
    parser.add_argument("--held_out", type=int, default=2, help="held-out tasks of a family")
    parser.add_argument("--unseen", type=int, default=4, help="tasks of an unseen family")
    main(**vars(parser.parse_args()))
