"""Qwen Code: a session of ~/.qwen/projects/*/chats; a tree by parentUuid, messages in Gemini's parts.

(The dumps of `--openai-logging` hold the tools as well; 02 reads them by itself.)
"""
KINDS = {
    "user": "message", "assistant": "message", "tool_result": "result",
    "text": "message", "thought": "reasoning", "functionCall": "call", "functionResponse": "result",
    "system": "left out: telemetry, commands, titles; a rewind shows in the tree",
}  # fmt: skip
LEFT_OUT = {"toolCallResult": "a result once more, for the screen", "cwd": "of the working folder"}


def fits(record):
    lines = [line for line in record if "parentUuid" in line and isinstance(line.get("message"), dict)]
    return any("parts" in line["message"] for line in lines)


def branch_of(lines):
    """The lines that led to the last message; a parent that was never written is a gap: the line before."""
    places = {line["uuid"]: place for place, line in enumerate(lines)}
    spoken = [place for place, line in enumerate(lines) if line["type"] != "system"]
    branch = {}  # in the order of the walk
    place = max(spoken)
    while place is not None and place not in branch:
        branch[place] = True
        parent = lines[place].get("parentUuid")
        gap = place - 1 if place else None
        place = places.get(parent, gap) if parent else None
    kept = [lines[place] for place in reversed(branch)]
    if {line["sessionId"] for line in lines} - {line["sessionId"] for line in kept}:
        raise ValueError("several_sessions: give each a file of its own")
    return kept


def read(record):
    messages, meta = [], {}
    lines = branch_of(record)
    for line in lines:
        if line["type"] not in KINDS:
            raise ValueError(f"unknown_kind: {line['type']}")
        if line.get("subtype") == "chat_compression":
            raise ValueError("compacted")
        meta["query_id"] = line["sessionId"]
        meta |= {key: line[key] for key in ("model", "version", "cwd", "gitBranch") if line.get(key)}
        if KINDS[line["type"]].startswith("left out"):
            continue
        for part in line["message"]["parts"]:
            named = part.keys() & KINDS.keys()
            if not named or part.keys() - named - {"thoughtSignature"}:
                names = ", ".join(part)
                raise ValueError(f"non_text_content: {names}")
        messages.append(line["message"])
    return {"messages": messages, "tools": None, "meta": meta, "checked": lines}
