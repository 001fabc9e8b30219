"""mini-swe-agent: a *.traj.json of version 1 or 2, with tool calls, with Responses items, or in text mode."""

KINDS = {
    "system": "message", "user": "message", "assistant": "message", "tool": "result",
    "message": "message", "reasoning": "reasoning", "function_call": "call", "function_call_output": "result",
    "exit": "left out: the submission, told in meta",
}  # fmt: skip
LEFT_OUT = {
    "extra": "costs, and what was parsed from the message",
    "provider_specific_fields": "of the provider",
    "tools": "of a response: the one tool below",
    "instructions": "of a response: the system message once more",
}
# The one tool of its tool-calling models, as published; in text mode the model never sees a schema
COMMAND = {"type": "string", "description": "The bash command to execute"}
PARAMETERS = {"type": "object", "properties": {"command": COMMAND}, "required": ["command"]}
BASH = {"name": "bash", "description": "Execute a bash command", "parameters": PARAMETERS}


def fits(record):
    info = record.get("info") or {}
    is_named = str(record.get("trajectory_format")).startswith("mini-swe-agent") or "mini_version" in info
    return is_named and isinstance(record["messages"], list)


def messages_of(log):
    """The messages in order, the items of a response each by itself, without the submission at the end."""
    messages = []
    for message in log["messages"]:
        messages += message["output"] if message.get("object") == "response" else [message]
    submission = log["info"].get("submission")
    if submission and messages[-1] == {"role": "user", "content": submission}:  # version 1
        messages = messages[:-1]
    for message in messages:
        kind = message.get("role") or message.get("type")
        if kind not in KINDS:
            raise ValueError(f"unknown_kind: {kind}")
    return [message for message in messages if message.get("role") != "exit"]


def meta_of(log):
    info = log["info"]
    config = info.get("config") or {}
    meta = {key: log[key] for key in log.keys() - {"info", "messages"}}
    meta |= {key: info[key] for key in info.keys() - {"config", "model_stats"}}
    return meta | {"model": (config.get("model") or {}).get("model_name")}


def read(log):
    messages = messages_of(log)
    tools = None
    for message in messages:
        if message.get("tool_calls") or "call_id" in message:
            tools = [BASH]
    checked = [message for message in log["messages"] if message.get("role") != "exit"]
    return {"messages": messages, "tools": tools, "meta": meta_of(log), "checked": checked}
