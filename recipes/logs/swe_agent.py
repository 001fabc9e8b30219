"""SWE-agent: a *.traj; its history, without the demonstrations. The tools are named there, not described."""

KINDS = {"system": "message", "user": "message", "assistant": "message", "tool": "result"}
LEFT_OUT = {"history.action": "the call once more, as a command"}


def fits(record):
    history = record["history"]
    return bool(history) and all("role" in message and "parts" not in message for message in history)


def read(log):
    messages = [message for message in log["history"] if not message.get("is_demo")]
    for message in messages:
        role = message["role"]
        if role not in KINDS:
            raise ValueError(f"unknown_kind: {role}")
    left = {"history", "trajectory", "replay_config", "info"}
    meta = {key: log[key] for key in log.keys() - left}
    meta |= log.get("info") or {}
    row = {"messages": messages, "tools": None, "meta": meta}
    row["checked"] = {"history": messages}
    return row
