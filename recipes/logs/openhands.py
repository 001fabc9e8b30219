"""OpenHands V0: {"history": [events]} of an output.jsonl, or a trajectory as a bare list of events.

A call and its result both repeat the model's whole response: what the model wrote is taken from there.
"""
KINDS = {
    "system": "message", "message": "message", "recall": "message", "error": "message",
    "change_agent_state": "left out: a state", "agent_state_changed": "left out: a state",
    "null": "left out: says nothing",
}  # fmt: skip
LEFT_OUT = {"tools": "read as schemas"}
# What of an event only the screen or the tool itself takes: a sentence about it, a call's arguments once more
HIDDEN = {
    "call": {"message", "args"},
    "result": {"message", "extras"},
    "recall": {"message", "content"},
    "error": {"message", "extras"},
    "message": {"message"},
    "system": {"message"},
}


def events_of(record):
    """The events in order; the oldest logs hold them as pairs of an action and its observation."""
    history = record["history"] if isinstance(record, dict) else record
    return sum(history, []) if isinstance(history[0], list) else history


def fits(record):
    events = events_of(record)
    return "source" in events[0] and all({"action", "observation"} & event.keys() for event in events)


def place_of(event):
    """call, result, or the kind of an event that is neither; None: it is left out."""
    kind = event.get("observation", event.get("action"))
    if event.get("tool_call_metadata"):
        return "result" if "observation" in event else "call"
    if "condensation" in str(kind):
        raise ValueError("compacted")
    if kind not in KINDS:
        raise ValueError(f"call_not_logged: {kind}, without what the model wrote")
    is_query = kind == "recall" and "action" in event
    return None if is_query or KINDS[kind].startswith("left out") else kind


def recalled(extras):
    """Instructions that were recalled and sent as the user's text: of the repository, of the skills."""
    texts = [extras.get("repo_instructions"), extras.get("additional_agent_instructions")]
    texts += [skill["content"] for skill in extras.get("microagent_knowledge") or []]
    return list(filter(None, texts))


def message_of(event, place):
    call = event.get("tool_call_metadata") or {}
    if place == "call":
        return call["model_response"]["choices"][0]["message"]
    if place == "result":
        return {"role": "tool", "tool_call_id": call["tool_call_id"], "content": event["content"]}
    if place == "recall":
        return {"role": "user", "content": recalled(event["extras"])}
    if place == "error":
        return {"role": "user", "content": event["content"]}
    if event["args"].get("image_urls"):
        raise ValueError("non_text_content: image_urls")
    role = "assistant" if event["source"] == "agent" else "user"
    return {"role": "system" if place == "system" else role, "content": event["args"]["content"]}


def read(record):
    columns = dict(record) if isinstance(record, dict) else {}
    columns.pop("history", None)
    columns["exit_status"] = "error" if columns.get("error") else ""
    messages, checked, tools, answered = [], [], None, set()
    for event in events_of(record):
        place = place_of(event)
        if place is None:
            continue
        checked.append({key: event[key] for key in event.keys() - HIDDEN[place]})
        message = message_of(event, place)
        if place == "system":
            tools = event["args"].get("tools")
        if place == "call":  # the calls of one response are an event each
            id = event["tool_call_metadata"]["model_response"]["id"]
            message = {"content": None} if id in answered else message
            answered.add(id)
        messages += [message] if message["content"] or message.get("tool_calls") or place == "result" else []
    return {"messages": messages, "tools": tools, "meta": columns, "checked": checked}
