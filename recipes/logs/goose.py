"""Goose: the output of `goose session export --format json`, or a session's JSONL with a header line."""

KINDS = {
    "text": "message", "thinking": "reasoning", "toolRequest": "call", "frontendToolRequest": "call",
    "toolResponse": "result", "toolConfirmationRequest": "left out: a question of the screen",
    "systemNotification": "left out: for the screen",
}  # fmt: skip
LEFT_OUT = {"metadata": "who sees the message"}


def fits(record):
    header = record if isinstance(record, dict) else record[0]
    return "working_dir" in header and isinstance(messages_of(record)[0]["content"], list)


def messages_of(record):
    return record["conversation"] if isinstance(record, dict) else record[1:]


def parts_of(answer):
    value = answer["value"]
    return value["content"] if isinstance(value, dict) else value


def is_shown(part):
    """Whether a part of a result is for the screen alone."""
    audience = (part.get("annotations") or {}).get("audience")
    return bool(audience) and "assistant" not in audience


def block_of(block):
    """A block in Anthropic's form, which holds calls and results too."""
    kind = block["type"]
    if KINDS[kind] == "call":
        call = block["toolCall"]
        if "value" not in call:
            raise ValueError("call_not_logged: the model's call could not be parsed")
        arguments = call["value"].get("arguments") or {}
        return {"type": "tool_use", "id": block["id"], "name": call["value"]["name"], "input": arguments}
    if kind == "toolResponse":
        answer = block["toolResult"]
        content = answer.get("error") or [part for part in parts_of(answer) if not is_shown(part)]
        return {"type": "tool_result", "tool_use_id": block["id"], "content": content}
    return block


def read(record):
    messages, checked, left_out = [], [], []
    for message in messages_of(record):
        seen_by = message.get("metadata") or {}
        if seen_by.get("userVisible") is False:
            raise ValueError("compacted: what the model saw is a summary")
        if seen_by.get("agentVisible") is False:
            continue
        blocks = []
        for block in message["content"]:
            if block["type"] not in KINDS:
                raise ValueError(f"non_text_content: {block['type']}")
            if not KINDS[block["type"]].startswith("left out"):
                blocks.append(block_of(block))
            if "value" in block.get("toolResult", ()):
                left_out += filter(is_shown, parts_of(block["toolResult"]))
        checked.append(message)
        messages.append({"role": message["role"], "content": blocks})
    header = record if isinstance(record, dict) else record[0]
    meta = {key: header[key] for key in header.keys() - {"conversation"}}
    return {"messages": messages, "tools": None, "meta": meta, "checked": checked, "left_out": left_out}
