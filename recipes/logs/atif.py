"""ATIF 1.x (Harbor): {"schema_version", "agent", "steps"} Terminus-2 in its modes and continuations.

Terminus-2 answers the calls of a step with one observation that names none of them, or has no calls at all.
"""
KINDS = {"system": "message", "user": "message", "agent": "message"}
LEFT_OUT = {
    "extra": "of the tool that wrote the log",
    "subagent_trajectory_ref": "another agent's log",
}


def fits(record):
    return str(record.get("schema_version")).startswith("ATIF") and isinstance(record["steps"], list)


def texts_of(step):
    """{id of a call, None where a result names none: the parts of its results}."""
    texts = {}
    observation = step.get("observation") or {}
    for result in observation.get("results") or []:
        content = result.get("content") or ""
        parts = texts.setdefault(result.get("source_call_id"), [])
        parts += content if isinstance(content, list) else [content]
    return texts


def results_of(step):
    """The results of a step, one a call; or the user's text where the step has no call."""
    calls = [call["tool_call_id"] for call in step.get("tool_calls") or []]
    texts = texts_of(step)
    free = texts.pop(None, [])
    if free and not calls:
        return [{"role": "user", "content": free}]
    waiting = [id for id in calls if id not in texts]
    if free:
        texts = dict.fromkeys(waiting, []) | texts
        last = (waiting or calls)[-1]
        texts[last] = texts[last] + free  # what the screen shows after the last of them
    results = []
    for id, parts in texts.items():
        result = {"role": "tool", "tool_call_id": id}
        results.append(result | {"content": parts})
    return results


def message_of(step):
    if step["source"] not in KINDS:
        raise ValueError(f"unknown_kind: {step['source']}")
    if step["source"] != "agent":
        return {"role": step["source"], "content": step["message"]}
    message = {"role": "assistant", "tool_calls": []}
    message["content"] = step["message"]
    message["reasoning_content"] = step.get("reasoning_content")
    for call in step.get("tool_calls") or []:
        function = {"name": call["function_name"], "arguments": call["arguments"]}
        message["tool_calls"].append({"id": call["tool_call_id"], "function": function})
    if step.get("is_copied_context") or step.get("llm_call_count") == 0:
        message["weight"] = 0  # trained where it was said; or no model said it
    return message


def meta_of(log):
    agent = log["agent"]
    left = {"steps", "agent", "subagent_trajectories", "final_metrics"}
    meta = {key: log[key] for key in log.keys() - left}
    meta["query_id"] = log.get("trajectory_id") or log.get("session_id")
    return meta | {"model": agent.get("model_name"), "agent": agent["name"], "version": agent.get("version")}


def read(log):
    messages = []
    for step in log["steps"]:
        messages += [message_of(step), *results_of(step)]
    tools = log["agent"].get("tool_definitions")
    return {"messages": messages, "tools": tools, "meta": meta_of(log), "checked": log["steps"]}
