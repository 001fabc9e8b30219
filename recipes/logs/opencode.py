"""opencode: the output of `opencode export SESSION`: messages of parts; a step-finish part ends one response.

`opencode run --format json` leaves out the prompt and the reasoning: it is named, not read.
"""
KINDS = {
    "text": "message", "reasoning": "reasoning", "tool": "call",
    "step-start": "left out: a mark", "step-finish": "left out: a mark",
    "patch": "left out: a commit for undoing", "snapshot": "left out: a commit for undoing",
    "agent": "left out: a mention, told in a text of its own", "retry": "left out: a failed request",
}  # fmt: skip
LEFT_OUT = {
    "state.metadata": "a result once more, for the screen",
    "state.title": "for the screen",
    "info.summary": "for the screen",
    "info.path": "of the working folder",
    "info.error": "told in meta",
    "parts.source": "where a prompt names a file",
    "parts.url": "of a file, whose text is a part of its own",
}
TEXT_FILES = ("text/plain", "application/x-directory")  # their text is a part of its own


def fits(record):
    if isinstance(record, list):
        return all({"type", "sessionID", "part"} <= line.keys() for line in record)
    entries = record["messages"]
    return bool(entries) and "info" in record and all({"info", "parts"} <= one.keys() for one in entries)


def kept_entries(log):
    """Without the reverted end, and without responses that failed: opencode does not send them again."""
    entries = log["messages"]
    revert = log["info"].get("revert")
    if revert:
        ids = [entry["info"].get("id") for entry in entries]
        place = ids.index(revert["messageID"])
        last = entries[place]
        entries = entries[:place]
        if revert.get("partID"):
            ids = [part.get("id") for part in last["parts"]]
            parts = last["parts"][: ids.index(revert["partID"])]
            entries.append(last | {"parts": parts})
    return [entry for entry in entries if entry is entries[-1] or not is_failed(entry["info"])]


def is_failed(info):
    return (info.get("error") or {}).get("name", "MessageAbortedError") != "MessageAbortedError"


def check_part(part, info):
    if part["type"] == "compaction" or info.get("summary") is True:
        raise ValueError("compacted")
    if part["type"] == "file" and part["mime"] in TEXT_FILES:
        return
    if part["type"] == "file" or (part.get("state") or {}).get("attachments"):
        raise ValueError(f"non_text_content: {part['type']}")
    if part["type"] not in KINDS:
        raise ValueError(f"unknown_kind: {part['type']}")


def responses_of(parts):
    """Yield the messages of one assistant entry, a response and its results at a time."""
    answer, results = [], []
    for part in [*parts, {"type": "step-finish"}]:
        kind = part["type"]
        if kind in ("text", "reasoning"):
            answer.append({"type": kind, "text": part["text"]})
        elif kind == "tool":
            state = part["state"]
            call = {"type": "tool_use", "id": part["callID"], "name": part["tool"]}
            answer.append(call | {"input": state["input"]})
            if state["status"] in ("completed", "error"):
                text = state.get("output") or state.get("error") or ""
                results.append({"role": "tool", "tool_call_id": part["callID"], "content": text})
        elif kind == "step-finish" and answer:
            yield from [{"role": "assistant", "content": answer}, *results]
            answer, results = [], []


def messages_of(info, parts):
    """The messages of one entry; what the user stopped is context."""
    if info["role"] == "user":
        return [{"role": "user", "content": [part["text"] for part in parts if part["type"] == "text"]}]
    messages = list(responses_of(parts))
    for message in messages:
        if info.get("error") and message["role"] == "assistant":
            message["weight"] = 0
    return messages


def read(log):
    if isinstance(log, list):
        raise ValueError("not_supported: opencode run --format json lacks the prompt; give `opencode export`")
    meta = {key: log[key] for key in log.keys() - {"info", "messages"}}
    meta["query_id"] = log["info"].get("id")
    meta["title"] = log["info"].get("title")
    messages, checked = [], []
    for entry in kept_entries(log):
        info = entry["info"]
        parts = [part for part in entry["parts"] if not part.get("ignored")]  # shown, not sent
        for part in parts:
            check_part(part, info)
        messages += messages_of(info, parts)
        checked.append(entry | {"parts": parts})
        meta["model"] = info.get("modelID")
        meta["exit_status"] = (info.get("error") or {}).get("name", "")
        meta["finish_reason"] = info.get("finish", "")
    return {"messages": messages, "tools": None, "meta": meta, "checked": checked}
