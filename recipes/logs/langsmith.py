"""LangSmith: a run as JSON: "inputs" and "outputs" with LangChain's messages, plain or serialised."""

KINDS = {"human": "message", "system": "message", "ai": "message", "tool": "result"}
LEFT_OUT = {"response_metadata": "of the provider", "usage_metadata": "counts"}


def fits(record):
    return {"run_type", "inputs", "outputs"} <= record.keys()


def plain(message):
    """A message of any of LangChain's forms: the object itself, or its serialised constructor."""
    if message.get("type") == "constructor":
        name = message["id"][-1].removesuffix("Chunk")
        name = name.removesuffix("Message")
        message = {"type": name.lower()} | message["kwargs"]
    elif isinstance(message.get("data"), dict):
        message = {"type": message["type"]} | message["data"]
    message = dict(message)
    extra = message.pop("additional_kwargs", None) or {}
    if extra.get("reasoning_content"):
        message["reasoning_content"] = extra["reasoning_content"]
    return message


def messages_of(side):
    """The messages of a run's inputs or outputs."""
    messages = side.get("messages") or []
    if "generations" in side:
        messages = side["generations"]
    elif "output" in side:
        messages = messages or [side["output"]]
    if messages and isinstance(messages[0], list):  # a batch of one
        messages = messages[0]
    if "generations" in side:
        messages = [messages[0]["message"]]
    return list(map(plain, messages))


def read(run):
    asked = messages_of(run["inputs"])
    answered = messages_of(run["outputs"] or {})
    texts = [message["content"] for message in asked]
    repeated = [message["content"] for message in answered]
    if texts == repeated[: len(texts)]:
        asked = []  # a graph's state holds what it was given
    extra = run.get("extra") or {}
    parameters = extra.get("invocation_params") or {}
    left = {"inputs", "outputs", "extra", "serialized", "events"}
    meta = {key: run[key] for key in run.keys() - left}
    meta["exit_status"] = "error" if run.get("error") else ""
    told = (answered or [{}])[-1].get("response_metadata") or {}
    meta["finish_reason"] = told.get("finish_reason")
    row = {"messages": asked + answered, "meta": meta}
    row["tools"] = parameters.get("tools")
    row["checked"] = [run["inputs"], run["outputs"]]
    return row
