"""Gemini CLI: a recorded session (JSON, or JSONL with rewrites and rewinds), a `/chat save` or a checkpoint.

A session stores each answer with its calls and their results; the other two hold the contents that were sent.
"""
SCREEN = "left out: told on the screen, not sent to the model"
KINDS = {
    "user": "message", "gemini": "message", "qwen": "message", "text": "message",
    "thought": "reasoning", "functionCall": "call", "functionResponse": "result",
    "info": SCREEN, "warning": SCREEN, "error": SCREEN,
}  # fmt: skip
LEFT_OUT = {
    "resultDisplay": "a result once more, for the screen",
    "displayContent": "a prompt once more, for the screen",
    "toolCalls.description": "of the tool, for the screen",
    "toolCalls.displayName": "of the tool, for the screen",
}


def contents_of(record):
    """The contents of a save or a checkpoint; None for a session."""
    if isinstance(record, dict):
        record = record.get("clientHistory") or record.get("history")
    is_content = record and all(isinstance(content.get("parts"), list) for content in record)
    return record if is_content and all(content["role"] in ("user", "model") for content in record) else None


def fits(record):
    header = record if isinstance(record, dict) else record[0]
    return {"sessionId", "projectHash"} <= header.keys() or bool(contents_of(record))


def check_parts(parts):
    """The parts; an image, a file or an unknown kind rejects the log by its name."""
    for part in parts:
        named = part.keys() & KINDS.keys()
        if not named or part.keys() - named - {"thoughtSignature"}:
            raise ValueError(f"non_text_content: {', '.join(part)}")
    return parts


def messages_of_session(entries):
    """The messages that stand, each in its last version; a state may list all of them anew."""
    latest = {}
    if len({entry["sessionId"] for entry in entries if "sessionId" in entry}) > 1:
        raise ValueError("several_sessions: give each a file of its own")
    for entry in entries:
        state = entry.get("$set", entry)
        if "$rewindTo" in entry:
            ids = list(latest)
            place = ids.index(entry["$rewindTo"]) if entry["$rewindTo"] in ids else 0  # unknown: to the start
            latest = {id: latest[id] for id in ids[:place]}
        elif "messages" in state:
            latest = {message["id"]: message for message in state["messages"]}
        elif state is entry and "sessionId" not in entry:
            latest[entry["id"]] = entry
    return list(latest.values())


def read_entry(entry):
    """One message of a session -> its content and the results of its calls, as contents of the API."""
    content = entry["content"]
    parts = [{"text": content}] if isinstance(content, str) else check_parts(content)
    if entry["type"] == "user":
        texts = [part for part in parts if "functionResponse" not in part]  # they stand beside their calls
        return [{"role": "user", "parts": texts}] if texts else []
    thoughts = [f"{thought['subject']}\n{thought['description']}" for thought in entry.get("thoughts") or []]
    calls, results = [], []
    for call in entry.get("toolCalls") or []:
        calls.append({"functionCall": {"id": call["id"], "name": call["name"], "args": call["args"]}})
        results += check_parts(call.get("result") or [])
    thought = {"text": "\n\n".join(thoughts), "thought": True}
    answer = {"role": "model", "parts": [thought, *parts, *calls]}
    return [answer, {"role": "user", "parts": results}][: 2 if results else 1]


def read(record):
    contents = contents_of(record)
    if contents:
        for content in contents:
            check_parts(content["parts"])
        return {"messages": contents, "tools": None, "meta": {}, "checked": contents}
    header = record if isinstance(record, dict) else record[0]
    entries = messages_of_session([record] if record is header else record)
    messages = []
    meta = {key: header[key] for key in header.keys() - {"messages"}}
    for entry in entries:
        if entry["type"] not in KINDS:
            raise ValueError(f"unknown_kind: {entry['type']}")
        if KINDS[entry["type"]] == "message":
            messages += read_entry(entry)
            meta |= {"model": entry["model"]} if "model" in entry else {}
    return {"messages": messages, "tools": None, "meta": meta, "checked": entries}
