"""Kimi CLI: a session's context.jsonl: OpenAI messages, and marks whose role starts with an underscore."""

MARK = "left out: a mark"
KINDS = {"_checkpoint": MARK, "_usage": MARK, "_system_prompt": "message"}
KINDS |= {"system": "message", "user": "message", "assistant": "message", "tool": "result"}


def fits(record):
    roles = {str(line.get("role")) for line in record}
    is_marked = any(role.startswith("_") for role in roles)
    return is_marked and bool(roles & {"user", "assistant"})


def read(record):
    messages, checked = [], []
    for line in record:
        role = line["role"]
        if role not in KINDS:
            raise ValueError(f"unknown_kind: {role}")
        if KINDS[role] == MARK:
            continue
        checked.append(line)
        messages.append(line | {"role": role.replace("_system_prompt", "system")})
    return {"messages": messages, "tools": None, "meta": {}, "checked": checked}
