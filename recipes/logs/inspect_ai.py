"""Inspect: a log in JSON, each of its samples a row, or one sample (samples/*.json of an .eval file)."""
import json
import re

KINDS = {
    "system": "message", "user": "message", "assistant": "message", "tool": "result",
    "text": "message", "reasoning": "reasoning",
}  # fmt: skip
LEFT_OUT = {
    "metadata": "of the evaluation",
    "view": "of a call, for the screen",
    "internal": "of the provider",
}
SCORES = dict.fromkeys(("C", "1", "1.0", "True"), True)
SCORES |= dict.fromkeys(("I", "0", "0.0", "False"), False)


def fits(record):
    is_sample = {"id", "epoch", "input", "messages"} <= record.keys()
    return is_sample or {"eval", "samples"} <= record.keys()


def split(record):
    return record.get("samples", [record])


def resolve(sample):
    """The messages with their attachments: long strings are stored beside them."""
    attachments = sample.get("attachments") or {}

    def stored(match):
        return json.dumps(attachments[match[1]])[1:-1]

    return json.loads(re.sub(r"attachment://(\w+)", stored, json.dumps(sample["messages"])))


def message_of(message):
    if message["role"] not in KINDS:
        raise ValueError(f"unknown_kind: {message['role']}")
    parts = []
    for part in message["content"] if isinstance(message["content"], list) else []:
        if part.get("redacted"):  # only the summary can be read
            part = {"type": "reasoning", "reasoning": part.get("summary") or ""}
        parts.append(part)
    error = message.get("error")
    content = error["message"] if error else parts or message["content"]
    return message | {"content": content}


def success_of(sample):
    """Whether the sample was solved; None without a score that says so, or with several that disagree."""
    scores = sample.get("scores") or {}
    found = {SCORES.get(str(score["value"])) for score in scores.values()}
    return found.pop() if len(found) == 1 else None


def read(sample):
    events = sample.get("events") or []
    calls = [event for event in events if event.get("event") == "model"]
    left = {"messages", "events", "attachments", "store", "input", "scores", "output"}
    meta = {key: sample[key] for key in sample.keys() - left}
    id, epoch = sample["id"], sample["epoch"]
    meta["query_id"] = f"{id}-{epoch}"
    success = success_of(sample)
    if success is not None:
        meta["success"] = success
    messages = resolve(sample)
    # the model saw the error in their place
    unsent = [message["content"] for message in messages if message.get("error")]
    return {"messages": [message_of(message) for message in messages], "meta": meta, "checked": messages,
            "tools": calls[-1].get("tools") if calls else None, "left_out": unsent}  # fmt: skip
