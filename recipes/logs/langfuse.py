"""Langfuse: a generation as JSON, or a trace with its observations: the generation that saw most."""

KINDS = {"system": "message", "user": "message", "assistant": "message", "tool": "result"}
LEFT_OUT = {"tools": "read as schemas"}


def fits(record):
    if isinstance(record.get("observations"), list):
        return True
    return record["type"] == "GENERATION" and {"input", "output"} <= record.keys()


def asked_of(generation):
    """The messages and the tools that a generation was given."""
    given = generation["input"]
    if isinstance(given, dict):
        return given["messages"], given.get("tools")
    return given, None


def answers_of(generation):
    output = generation["output"]
    if isinstance(output, str):
        return [{"role": "assistant", "content": output}]
    if isinstance(output, dict) and "choices" in output:
        output = output["choices"][0]["message"]
    return output if isinstance(output, list) else [output]


def read(record):
    generations = []
    for event in record.get("observations", [record]):
        generations += [event] if event["type"] == "GENERATION" else []
    if not generations:
        raise ValueError("no_assistant_message: a Langfuse trace without a generation")
    generation = max(generations, key=lambda generation: len(asked_of(generation)[0]))
    messages, tools = asked_of(generation)
    left = {"input", "output", "observations"}
    meta = {key: record[key] for key in record.keys() - left}
    checked = [generation["input"], generation["output"]]
    return {"messages": messages + answers_of(generation), "tools": tools, "meta": meta, "checked": checked}
