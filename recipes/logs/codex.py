"""Codex: a rollout of ~/.codex/sessions: lines of type and payload, or (until 2025) bare items.

The items are those of the Responses API, several a response; tools are stored nowhere.
"""
import json

AGAIN = "left out: says what a response_item says, for the screen"
STATE = "left out: settings and state; what the model saw of them is in messages"
KINDS = {
    "session_meta": "message", "response_item": "message", "message": "message", "agent_message": "message",
    "reasoning": "reasoning", "function_call": "call", "custom_tool_call": "call",
    "local_shell_call": "call", "tool_search_call": "call",
    "function_call_output": "result", "custom_tool_call_output": "result", "tool_search_output": "result",
    "ghost_snapshot": "left out: a commit for undoing, never sent",
    "compacted": "left out, with what follows: the model saw a summary from there on",
    "event_msg": AGAIN, "turn_context": STATE, "world_state": STATE, "token_usage_record": STATE,
    "inter_agent_communication_metadata": STATE, "security_risk_score": STATE,
}  # fmt: skip
NAMED = {
    "web_search_call": "unsupported_call: web_search_call, its result is in no log",
    "image_generation_call": "unsupported_call: image_generation_call",
    "compaction": "compacted: compaction",
    "context_compaction": "compacted: context_compaction",
    "thread.started": "not_supported: codex exec --json, without prompt and calls; give ~/.codex/sessions",
}
ENDS = {"turn_aborted": "turn_aborted", "task_complete": "completed"}
LEFT_OUT = {
    "dynamic_tools": "not all schemas of the session: --tools has them",
    "git": "of the working folder",
    "runtime_workspace_roots": "of the working folder",
    "annotations": "of a text, for the screen",
}
# What the tool itself says in the user's name: it is no turn that could be rolled back
CONTEXT = ("<environment_context>", "<user_instructions>", "# AGENTS.md", "<turn_aborted>", "<skill",
           "<user_shell_command>", "<subagent_notification>", "<permissions")  # fmt: skip


def fits(record):
    first = record[0]
    kinds = {str(line.get("type")) for line in record if "payload" in line}
    is_old = not {"type", "role"} & first.keys() and {"id", "timestamp"} <= first.keys()
    is_old = is_old and any("type" in line for line in record[1:])
    return is_old or first.get("type") == "thread.started" or bool(kinds & KINDS.keys())


def known(kind):
    if kind not in KINDS:
        raise ValueError(NAMED.get(kind, f"unknown_kind: {kind}"))
    return kind


def items_of(record):
    """Yield (line, its kind, its item); the lines of old rollouts are the items."""
    for line in record:
        if "payload" in line:
            yield line, known(line["type"]), line["payload"]
        elif "type" in line:
            known(line["type"])
            yield line, "response_item", line
        elif "record_type" not in line:
            yield line, "session_meta", line


def system_of(item):
    base = item.get("base_instructions") or {"text": item.get("instructions")}
    return {"role": "system", "content": base["text"]}


def message_of(item):
    """One item as a message; one that was never sent has no content."""
    kind = known(item["type"])
    if kind == "ghost_snapshot":
        return {"role": "assistant", "reasoning_content": ""}
    if KINDS[kind] == "call":
        return {"role": "assistant", "tool_calls": [call_of(item)]}
    if KINDS[kind] == "result":
        content = item["output"] if "output" in item else json.dumps(item["tools"])
        return {"role": "tool", "tool_call_id": item["call_id"], "content": content}
    if kind == "reasoning":  # encrypted for OpenAI's models: then the summary is all there is
        parts = item.get("content") or item.get("summary") or []
        return {"role": "assistant", "reasoning_content": "\n".join(part["text"] for part in parts)}
    content = item["content"] if "content" in item else item["text"]
    return {"role": item.get("role", "user"), "content": content}


def call_of(item):
    name = item.get("name") or item["type"].removesuffix("_call")
    arguments = item.get("arguments", item.get("action"))
    if item["type"] == "custom_tool_call":
        arguments = {"input": item["input"]}
    return {"id": item["call_id"], "function": {"name": name, "arguments": arguments}}


def roll_back(pairs, turns):
    """Take the last turns back, each from its prompt on: they were undone."""
    prompts = []
    for number, (_, message) in enumerate(pairs):
        content = message.get("content")
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or []]
        if message["role"] == "user" and not any(text.lstrip().startswith(CONTEXT) for text in texts):
            prompts.append(number)
    del pairs[(prompts[-turns:] if turns else [len(pairs)])[0] :]


def meta_of(record):
    meta = {}
    for _, kind, item in items_of(record):
        if kind == "session_meta" and not meta:
            meta = {"query_id": item.get("id"), "version": item.get("cli_version"), "cwd": item.get("cwd")}
        if kind == "turn_context":
            meta["model"] = item.get("model")
        if item.get("type") in ENDS:
            meta["exit_status"] = ENDS[item["type"]]
    return meta


def check_session(record):
    """A fork has its parents' ids before its first item; one that comes later is another session's."""
    ids, begun = [], False
    for _, kind, item in items_of(record):
        if kind == "session_meta" and begun and item.get("id") not in ids:
            raise ValueError("several_sessions: give each a file of its own")
        ids += [item.get("id")] if kind == "session_meta" else []
        begun = begun or kind == "response_item"


def read(record):
    check_session(record)
    pairs, again = [], []  # a line and its message; what an item says twice
    for line, kind, item in items_of(record):
        if kind == "compacted":
            break
        if kind == "session_meta":
            pairs += [] if pairs else [(line, system_of(item))]  # a fork repeats its parent's
        elif kind == "response_item":
            pairs.append((line, message_of(item)))
            again.append(item.get("tools") or item.get("content") and item.get("summary"))
        elif item.get("type") == "thread_rolled_back":
            roll_back(pairs, item["num_turns"])
    messages = [message for _, message in pairs if message.get("reasoning_content") != ""]
    return {"messages": messages, "tools": None, "meta": meta_of(record),
            "checked": [line for line, _ in pairs], "left_out": again}  # fmt: skip
