"""tau2-bench: the results file of a run; each of its simulations is a row."""

KINDS = {"system": "message", "user": "message", "assistant": "message", "tool": "result"}


def fits(record):
    return {"simulations", "tasks"} <= record.keys()


def split(record):
    return record["simulations"]


def read(simulation):
    meta = dict(simulation)
    messages = meta.pop("messages")
    for message in messages:
        if message["role"] not in KINDS:
            raise ValueError(f"unknown_kind: {message['role']}")
    return {"messages": messages, "tools": None, "meta": meta, "checked": messages}
