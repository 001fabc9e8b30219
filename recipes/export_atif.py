#!/usr/bin/env python3
"""Episodes of 04_eval.py, or rows of 02_format_trajectories.py -> ATIF 1.7, the trajectory files of Harbor.

    python recipes/export_atif.py results/limi/episodes.jsonl atif   # a file an episode: QUERY_ID-RUN.json
    python 02_format_trajectories.py atif --output_file data/back.jsonl    # gives the same messages and tools

A step is a message; the results of its calls are its observation. weight 0 becomes is_copied_context, the
tokens of a vLLM ("served") the step's metrics; meta and rounds stand in "extra".
"""

import argparse
import json
import re
import sys
from pathlib import Path


def agent_step(message, served):
    """An assistant's message. served: {"prompt_token_ids", "token_ids"} of vLLM, or None."""
    step = {"source": "agent", "message": message["content"]}
    if message.get("reasoning_content"):
        step["reasoning_content"] = message["reasoning_content"]
    if message.get("weight") == 0:
        step["is_copied_context"] = True
    calls = []
    for call in message.get("tool_calls", []):
        function = call["function"]
        named = {"tool_call_id": call["id"], "function_name": function["name"]}
        calls.append(named | {"arguments": function["arguments"]})
    if calls:
        step["tool_calls"] = calls
        step["observation"] = {"results": []}
    if served:
        prompt = served["prompt_token_ids"]  # their number, where the next step's begin with them
        name = "prompt_tokens" if isinstance(prompt, int) else "prompt_token_ids"
        step["metrics"] = {name: prompt, "completion_token_ids": served["token_ids"]}
    return step


def steps_of(row):
    """The steps of a row. Raises ValueError: a result answers no call of the message before it."""
    assistants = [message for message in row["messages"] if message["role"] == "assistant"]
    served = row.get("served") or []
    if len(served) != len(assistants):  # the probe of a server that gives no ids
        served = [None] * len(assistants)
    tokens = iter(served)
    steps = []
    for number, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            steps.append(agent_step(message, next(tokens)))
        elif message["role"] == "tool":
            ids = [call["tool_call_id"] for call in (steps[-1] if steps else {}).get("tool_calls", [])]
            if message["tool_call_id"] not in ids:
                raise ValueError(f"messages[{number}].tool_call_id answers no call of the message before it")
            result = {"source_call_id": message["tool_call_id"], "content": message["content"]}
            steps[-1]["observation"]["results"].append(result)
        else:
            steps.append({"source": message["role"], "message": message["content"]})
    return [{"step_id": number} | step for number, step in enumerate(steps, 1)]


def trajectory(row):
    """The ATIF of a row."""
    meta = row.get("meta", {})
    agent = {"name": "limi", "version": "1"}
    if meta.get("model"):
        agent["model_name"] = meta["model"]
    if row.get("tools"):
        agent["tool_definitions"] = row["tools"]
    metrics = {}
    for name in ("prompt_tokens", "completion_tokens"):
        if name in meta:
            metrics[f"total_{name}"] = meta[name]
    atif = {"schema_version": "ATIF-v1.7", "session_id": name_of(row), "trajectory_id": row["query_id"]}
    atif |= {"agent": agent, "steps": steps_of(row)}
    if metrics:
        atif["final_metrics"] = metrics
    return atif | {"extra": {key: row[key] for key in ("meta", "rounds") if key in row}}


def name_of(row):
    name = f"{row['query_id']}-{row['run']}" if "run" in row else row["query_id"]
    return re.sub(r"[^\w.@#-]", "-", name)  # the rows of a log may have any id


def export(path, folder):
    """Write a file a row; returns how many. Raises ValueError naming file, line and field."""
    folder.mkdir(parents=True, exist_ok=True)
    names = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            name = name_of(row)
            text = json.dumps(trajectory(row), indent=1)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no row of 02 or 04: {error}") from None
        if name in names:  # several rows of one task
            name = f"{name}.{number}"
        names.add(name)
        folder.joinpath(f"{name}.json").write_text(text)
    return len(names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", type=Path, help="episodes.jsonl, or rows.")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        print(f"{options.folder}: {export(options.rows, options.folder)} trajectories")
    except (ValueError, OSError) as error:
        print(f"export_atif.py: {error}", file=sys.stderr)
        sys.exit(2)
