"""Pi's sessions (~/.pi/agent/sessions) and the STS form of agent traces: a "session" line, then entries.

The entries of Pi make a tree by id and parentId; those of STS follow each other.
"""
KINDS = {"message": "message", "custom_message": "message", "branch_summary": "message"}
STATES = """session model_change thinking_level_change fast_mode_change service_tier_change session_state
    session_info label custom"""
KINDS |= dict.fromkeys(STATES.split(), "left out: state, not sent to the model")
KINDS["compaction"] = "left out, with what follows: the model saw a summary from there on"
LEFT_OUT = {
    "details": "of a result, for the screen",
    "thinkingSignature": "of a thinking, encrypted",
    "textSignature": "of a text, encrypted",
}


def fits(record):
    return record[0]["type"] == "session" and any("message" in entry for entry in record)


def branch_of(entries):
    """The entries that led to the last one; a parent that was never written is a gap: the entry before it."""
    places = {entry["id"]: place for place, entry in enumerate(entries) if "id" in entry}
    branch = {}  # in the order of the walk
    place = len(entries) - 1
    while place is not None and place not in branch:
        branch[place] = True
        before = place - 1 if place else None
        is_root = entries[place].get("parentId", "") is None
        place = None if is_root else places.get(entries[place].get("parentId"), before)
    return [entries[place] for place in reversed(branch)]


def message_of(entry):
    """The message of an entry in a chat form; None for what was never sent."""
    message = entry.get("message") or entry
    role = message.get("role", "custom")
    if message.get("excludeFromContext") or message.get("stopReason") in ("aborted", "error"):
        return None
    if role == "bashExecution":
        return {"role": "user", "content": [message["command"], message["output"]]}
    if "summary" in message:
        return {"role": "user", "content": message["summary"]}
    return message if role != "custom" else {"role": "user", "content": message["content"]}


def ids_of(message):
    """The ids of the calls of a message that was never sent."""
    blocks = message.get("content") or []  # what the user ran has none
    return {block.get("id") for block in blocks if isinstance(block, dict)}


def read(record):
    entries = []
    if "session" in [entry["type"] for entry in record[1:]]:
        raise ValueError("several_sessions: give each a file of its own")
    for entry in branch_of(record[1:]):
        if entry["type"] not in KINDS:
            raise ValueError(f"unknown_kind: {entry['type']}")
        if entry["type"] == "compaction":
            break
        entries += [entry] if KINDS[entry["type"]] == "message" else []
    messages, checked, stopped = [], [], set()
    for entry in entries:
        message = message_of(entry)
        if message is None:  # the user stopped it, or it failed: Pi sends it no more
            stopped |= ids_of(entry.get("message") or entry)
        elif message.get("toolCallId", "") not in stopped:
            messages.append(message)
            checked.append(entry)
    session = record[0]
    meta = {"query_id": session.get("id"), "harness": session.get("harness", "pi"), "cwd": session.get("cwd")}
    meta["stop_reason"] = (messages or [{}])[-1].get("stopReason")
    return {"messages": messages, "tools": None, "meta": meta, "checked": checked}
