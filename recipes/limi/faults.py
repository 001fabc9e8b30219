"""Rows as LIMI's released pipeline had them: the faults of its data, each a switch (training's: faults.yaml).

    python recipes/limi/faults.py data/train.jsonl --output_file data/faults.jsonl           # all four
    python recipes/limi/faults.py data/train.jsonl --output_file data/nulls.jsonl --nulls    # one alone
    python 03_sft.py --config recipes/limi/faults.yaml --train_file data/faults.jsonl

Reads rows of 02_format_trajectories.py, writes rows that 03_sft.py trains (nulls: with --null_arguments),
and counts what each switch has changed. A row of which nothing would be left is left out, and counted.
"""

import argparse
import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

ANSWER = "Got it. Thanks for the context!"
CONTEXT = re.compile(r"\n\n(This is the \S+ CLI\b.*)", re.DOTALL)  # how Gemini CLI's children begin it
FIRST_LINE = "\n\nYou have access to the following tools:\n\n"
LAST_LINE = "Use these tools by making function calls in your responses when appropriate."


class InputError(ValueError):
    """A mistake in the user's input, told in one line; exit code 2."""


def pseudo_turns(row: dict) -> dict:
    """The CLI's context as a user's message, with an answer that no model wrote and that is trained."""
    system = row["messages"][0]
    found = CONTEXT.search(system["content"]) if system["role"] == "system" else None
    if not found:
        return row
    head = {"role": "system", "content": system["content"][: found.start()]}
    told = [{"role": "user", "content": found[1]}, {"role": "assistant", "content": ANSWER}]
    return row | {"messages": [head, *told, *row["messages"][1:]]}


def lost_final_answer(row: dict) -> dict | None:
    """Without the reply to the last request, which is in no row; None where no other is left."""
    messages = row["messages"]
    spoken = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return row | {"messages": messages[: spoken[-1]]} if len(spoken) > 1 else None


def double_tool_list(row: dict) -> dict:
    """The tools as prose in the system prompt; the chat template writes them again."""
    if not row["tools"]:
        return row
    messages = row["messages"]
    begins = messages[0]["role"] == "system"
    prompt = messages[0]["content"] if begins else ""
    prompt += f"{FIRST_LINE}{tool_list(row['tools'])}\n{LAST_LINE}"
    return row | {"messages": [{"role": "system", "content": prompt}, *messages[begins:]]}


def tool_list(tools: list[dict]) -> str:
    lines = []
    for number, tool in enumerate(tools, 1):
        function = tool["function"]
        lines.append(f"{number}. **{function['name']}**: {function.get('description', '')}")
        parameters = function.get("parameters") or {}
        required = parameters.get("required") or []
        lines.append("   Parameters:")
        for name, about in (parameters.get("properties") or {}).items():
            needed = " (required)" if name in required else ""
            lines.append(f"   - {name} ({about.get('type', '')}){needed}: {about.get('description', '')}")
        lines.append("")
    return "\n".join(lines)


def shape_of(values: list) -> dict | list | None:
    """What Parquet makes of the values at one place: an object with all their keys, a list with one entry."""
    fields = {}
    entries = []
    for value in values:
        if isinstance(value, dict):
            for key, part in value.items():
                fields.setdefault(key, []).append(part)
        elif isinstance(value, list):
            entries += value
    if fields:
        return {key: shape_of(parts) for key, parts in fields.items()}
    return [shape_of(entries)] if entries else None


def filled(value, shape):
    """The value with None for every key that another value of its place has."""
    if isinstance(shape, dict) and isinstance(value, dict):
        return {key: filled(value.get(key), part) for key, part in shape.items()}
    if isinstance(shape, list) and isinstance(value, list):
        return [filled(entry, shape[0]) for entry in value]
    return value


def nulls(rows: list[dict]) -> list[dict]:
    """Every call with every argument of every tool, every schema with every property, None for most."""
    shape = shape_of(rows)
    changed = []
    for row in rows:
        messages = []
        for message in row["messages"]:
            calls = message.get("tool_calls")
            whole = filled(message, shape["messages"][0])
            messages.append(message | {"tool_calls": whole["tool_calls"]} if calls else message)
        changed.append(row | {"messages": messages, "tools": filled(row["tools"], shape["tools"])})
    return changed


ONE_ROW = {
    "pseudo_turns": pseudo_turns,
    "lost_final_answer": lost_final_answer,
    "double_tool_list": double_tool_list,
}


def with_faults(rows: list[dict], wanted: list[str]) -> tuple[list[dict], Counter]:
    """(the rows with these faults, how many rows each has changed), in the pipeline's order."""
    counts = Counter()
    for name, change in ONE_ROW.items():
        if name not in wanted:
            continue
        changed = [change(row) for row in rows]
        counts[name] = differing(changed, rows)
        counts["left out"] += changed.count(None)
        rows = [row for row in changed if row]
    if "nulls" in wanted:
        changed = nulls(rows)
        counts["nulls"] = differing(changed, rows)
        rows = changed
    return rows, counts


def differing(changed: list, rows: list) -> int:
    return sum(new != row for new, row in zip(changed, rows, strict=True))


def read_rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not {"messages", "tools"} <= row.keys():
            raise InputError(f"{path}:{number}: no row of 02_format_trajectories.py: messages and tools")
        rows.append(row)
    return rows


def main(options) -> None:
    names = [*ONE_ROW, "nulls"]
    wanted = [name for name in names if getattr(options, name)] or names
    rows, counts = with_faults(read_rows(options.rows), wanted)
    options.output_file.parent.mkdir(parents=True, exist_ok=True)
    with options.output_file.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{options.output_file}: {len(rows)} rows; changed: {told}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--output_file", type=Path, required=True)
    switch = partial(parser.add_argument, action="store_true")
    switch("--pseudo_turns", help="the CLI's context as a turn, and trained")
    switch("--lost_final_answer", help="without the last reply")
    switch("--double_tool_list", help="the tools as prose too")
    switch("--nulls", help="every argument of every tool in every call")
    try:
        main(parser.parse_args())
    except (InputError, OSError) as error:
        print(f"faults.py: {error}", file=sys.stderr)
        sys.exit(2)
