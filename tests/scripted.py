"""What the tests of stage 4 say in the place of a model: messages, tasks, verdicts."""

import json
import re
from pathlib import Path


def say(text, **more):
    return {"content": text} | more


def call(name, /, **arguments):
    return calls((name, arguments))


def calls(*pairs):
    made = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": value if isinstance(value, str)
                                                         else json.dumps(value)}}
        for n, (name, value) in enumerate(pairs)
    ]  # fmt: skip
    return {"content": None, "tool_calls": made}


def raw(message):
    return f"<think>{message.get('reasoning', '')}</think>{message['content']}{json.dumps(message.get('tool_calls'))}"


def render(messages):
    """What a chat template makes of them: reasoning from before the last user message is left out."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    texts = [raw(m) if m["role"] == "assistant" and n > last else m["content"] for n, m in enumerate(messages)]
    return "".join(f"<{m['role']}>{text}" for m, text in zip(messages, texts))


def write_tasks(folder, *tasks):
    """A queries.jsonl; a task is (query_id, [(query, check), ...]) or a dict."""
    rows = [
        task if isinstance(task, dict)
        else {"query_id": task[0], "domain": "vibe_coding", "turns": [{"query": q, "check": c} for q, c in task[1]]}
        for task in tasks
    ]  # fmt: skip
    path = Path(folder, "queries.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tool_outputs(episode):
    return [message["content"] for message in episode["messages"] if message["role"] == "tool"]


def last_line(result):
    """The progress bar goes to stderr too."""
    result.stderr = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
    return result


def verdicts(*pairs):
    """A judge's answer to a request: one (evidence, passed) for each requirement, with the key that it was given."""

    def answer(body):
        key = re.search(r'"key": "(\w+)"', body["messages"][0]["content"])[1]
        rows = [{"requirement": n, "evidence": quote, "passed": good} for n, (quote, good) in enumerate(pairs, 1)]
        return say(json.dumps({"key": key, "verdicts": rows}))

    return answer
