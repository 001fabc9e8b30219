"""tau2-bench: the results file of a run, if it holds one simulation.

Of many, each is a row by itself, after `jq -c '.simulations[]' results.json > simulations.jsonl`.
"""

KINDS = {"system": "message", "user": "message", "assistant": "message", "tool": "result"}


def fits(record):
    return {"simulations", "tasks"} <= record.keys()


def read(record):
    simulations = record["simulations"]
    if len(simulations) != 1:
        raise ValueError(f"not_supported: tau2 results of {len(simulations)} simulations; one a line")
    meta = dict(simulations[0])
    messages = meta.pop("messages")
    for message in messages:
        if message["role"] not in KINDS:
            raise ValueError(f"unknown_kind: {message['role']}")
    return {"messages": messages, "tools": None, "meta": meta, "checked": messages}
