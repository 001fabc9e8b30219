"""OpenTelemetry's spans of generative AI: a span with gen_ai.input.messages and gen_ai.output.messages."""
import json

KINDS = {"text": "message", "reasoning": "reasoning", "tool_call": "call", "tool_call_response": "result"}
NAMES = ("system_instructions", "input.messages", "output.messages")


def attributes_of(span):
    """The attributes of a span; a list of {"key", "value": {"stringValue"}} in OTLP's own JSON."""
    attributes = span["attributes"]
    if isinstance(attributes, dict):
        return attributes
    found = {}
    for item in attributes:
        found[item["key"]] = next(iter(item["value"].values()), None)
    return found


def fits(record):
    return "gen_ai.output.messages" in attributes_of(record)


def block_of(part):
    """A part in Anthropic's form."""
    kind = part["type"]
    if kind not in KINDS:
        raise ValueError(f"non_text_content: {kind}")
    if kind == "tool_call":
        call = {"type": "tool_use", "id": part.get("id"), "name": part["name"]}
        return call | {"input": part.get("arguments")}
    if kind == "tool_call_response":
        answer = part["response"] if "response" in part else part["result"]
        content = answer if isinstance(answer, str) else json.dumps(answer)
        return {"type": "tool_result", "tool_use_id": part.get("id"), "content": content}
    return {"type": kind, "text": part["content"]}


def read(span):
    attributes = attributes_of(span)
    given = {}
    for name in (*NAMES, "tool.definitions"):
        value = attributes.get(f"gen_ai.{name}") or []
        given[name] = json.loads(value) if isinstance(value, str) else value
    spoken = given["input.messages"] + given["output.messages"]
    if given["system_instructions"]:
        spoken = [{"role": "system", "parts": given["system_instructions"]}, *spoken]
    messages = []
    for message in spoken:
        blocks = [block_of(part) for part in message["parts"]]
        messages.append({"role": message["role"], "content": blocks})
    spoken_of = {f"gen_ai.{name}" for name in given}
    meta = {key: attributes[key] for key in attributes.keys() - spoken_of}
    meta |= {"name": span.get("name"), "model": attributes.get("gen_ai.request.model")}
    meta["finish_reason"] = (spoken or [{}])[-1].get("finish_reason")
    row = {"messages": messages, "meta": meta}
    row["tools"] = given["tool.definitions"] or None
    row["checked"] = [given[name] for name in NAMES]
    return row
