"""OpenHands V1 (agent SDK): the events of a conversation, one a file (events/event-*.json) or one a line."""

KINDS = {
    "SystemPromptEvent": "message", "MessageEvent": "message", "ActionEvent": "call",
    "ObservationEvent": "result", "AgentErrorEvent": "result", "UserRejectObservation": "result",
}  # fmt: skip
STATES = """ConversationStateUpdateEvent ConversationErrorEvent PauseEvent TokenEvent LLMCompletionLogEvent
    CondensationRequest HookExecutionEvent StreamingDeltaEvent"""
KINDS |= dict.fromkeys(STATES.split(), "left out: state, not sent to the model")
COMPACTED = ("Condensation", "CondensationSummaryEvent")
LEFT_OUT = {
    "tools": "read as schemas",
    "action": "the call once more, as the tool takes it",
    "observation.command": "of the call",
    "observation.metadata": "of the shell",
    "observation.old_content": "for the screen",
    "observation.new_content": "for the screen",
}


def fits(record):
    return all({"kind", "source", "id"} <= event.keys() for event in record)


def reasoning_of(holder):
    """The reasoning of an event or message under each of its names."""
    item = holder.get("responses_reasoning_item") or {}
    summary = "\n".join([*(item.get("summary") or []), *(item.get("content") or [])])
    thoughts = {"reasoning_content": holder.get("reasoning_content") or summary}
    return thoughts | {"thinking_blocks": holder.get("thinking_blocks")}


def answer_of(event):
    call = event["tool_call"]
    function = {"name": call["name"], "arguments": call["arguments"]}
    answer = {"role": "assistant", "content": event["thought"]}
    answer["tool_calls"] = [{"id": call["id"], "function": function}]
    return answer | reasoning_of(event)


def result_of(event):
    observation = event.get("observation") or {}
    content = event.get("error") or event.get("rejection_reason")
    if event["kind"] == "ObservationEvent":
        content = observation["content"] if "content" in observation else observation["output"]
    return {"role": "tool", "tool_call_id": event["tool_call_id"], "content": content}


def message_of(event):
    if event["kind"] == "SystemPromptEvent":
        parts = [event["system_prompt"], event.get("dynamic_context")]
        return {"role": "system", "content": list(filter(None, parts))}
    if event["kind"] == "MessageEvent":
        message = event["llm_message"] | reasoning_of(event["llm_message"])
        message["content"] = [*message["content"], *(event.get("extended_content") or [])]
        return message
    return answer_of(event) if event["kind"] == "ActionEvent" else result_of(event)


def read(events):
    messages, answers, tools = [], {}, None
    # of a call: in its arguments, or made up by the tool
    summaries = [event.get("summary") for event in events]
    for event in events:
        kind = event["kind"]
        if kind not in KINDS:
            raise ValueError("compacted" if kind in COMPACTED else f"unknown_kind: {kind}")
        if KINDS[kind].startswith("left out"):
            continue
        message = message_of(event)
        if kind == "SystemPromptEvent":
            tools = event.get("tools")
        same = answers.get(event.get("llm_response_id")) if kind == "ActionEvent" else None
        if same and message["content"] in ([], same["content"]):  # several calls of one response
            same["tool_calls"] += message["tool_calls"]
            continue
        if kind == "ActionEvent" and event.get("llm_response_id"):
            answers[event["llm_response_id"]] = message
        messages.append(message)
    return {"messages": messages, "tools": tools, "meta": {}, "checked": events, "left_out": summaries}
