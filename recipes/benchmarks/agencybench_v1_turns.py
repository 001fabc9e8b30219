"""What agencybench_v1.py makes of a task's text: turns, each with a check or a rubric, and its solution."""

import json
import re
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().with_name("agencybench_v1")
GRADING = yaml.safe_load((HERE / "grading.yaml").read_text())


def rubric(text):
    """Requirements of a subtask: its commands, bullets, lines "Success Criteria: ...", or the whole text."""
    text = text[text.index("Subtask") :].partition("\n")[2]
    commands = r"^(?:Run|How to run/test)[^\n]*:\s*(.*?)(?=^Success|^Expected)"
    found = []
    if run := re.search(commands, text, re.DOTALL | re.MULTILINE):
        found.append("These commands work: " + "; ".join(run[1].strip().splitlines()))
    rule = r"^\s*(?:[-•*]|--) +(?!Goal:|You can )(.+?)\s*$|^(?!Description|Goal|Run)([A-Z][\w ]+: .+?)\s*$"
    for bullet, line in re.findall(rule, text, re.MULTILINE):
        found.append(bullet or line)
    return found or [text.strip()]


def make_turn(name, text):
    """The turn of subtask "8.2": with a check and its solution, or with a rubric; no ground truth in it."""
    truth = re.search(r" *(?:ground truth|original huggingface dataset_id): *(.+?) *$", text, re.MULTILINE)
    task, n = name.split(".")
    program = GRADING["programs"].get(name) or GRADING["programs"].get(task)
    solution = HERE / "solutions" / f"{name}.sh"
    turn = {"query": text.replace(truth[0] if truth else "\0", "").strip()}
    if not program or name in GRADING["judged"]:
        also = GRADING["also"].get(task, [])
        turn["rubric"] = rubric(text) + [requirement.format(n=n) for requirement in also]
        if solution.exists():
            turn["solution"] = f"bash /private/solutions/{name}.sh"
        return turn
    limit = GRADING["limits"].get(name)
    answer = truth[1].replace("Geogre", "George") if truth else None  # their typing error
    turn["query"] = turn["query"].replace("smaller than .", f"smaller than {limit}.")
    if answer:
        turn["query"] += "\n\nEnd your answer with one line: Answer: NAME"
    for key, command in program.items():
        turn[key] = command.format(name=answer, limit=limit)
    return turn


def make_turns(number, path, judge):
    """(turns of a task that are graded, each subtask's grader: P a program, J a judge, - nobody)."""
    query = json.loads(path.read_bytes())["query"].removesuffix("Research Workflow")  # task 4: next heading
    before, *texts = re.split(r"^(?=Subtask \d)", query, flags=re.MULTILINE)
    turns = []
    letters = ""
    for n, text in enumerate(texts, 1):
        turn = make_turn(f"{number}.{n}", text)
        turn["query"] = before + turn["query"]
        before = ""
        if "rubric" in turn and not judge:
            letters += "-"
            before = turn["query"] + "\n\n"
        else:
            letters += "J" if "rubric" in turn else "P"
            turns.append(turn)
    return turns, letters
