"""Langfuse: a generation as JSON, or a trace with its observations: the generation that saw most.

Generations that begin alike must be in the row too; what begins otherwise is another agent's, and left out.
"""

KINDS = {"system": "message", "user": "message", "assistant": "message", "tool": "result"}
LEFT_OUT = {"tools": "read as schemas"}


def fits(record):
    if record.get("observations"):
        return all("type" in observation.keys() for observation in record["observations"])
    return record["type"] == "GENERATION" and {"input", "output"} <= record.keys()


def asked_of(generation):
    """The messages and the tools that a generation was given."""
    given = generation["input"]
    if isinstance(given, dict):
        return given["messages"], given.get("tools")
    return given, None


def opening_of(generation):
    """What a generation was given, up to the first word of the user."""
    opening = []
    for message in asked_of(generation)[0]:
        opening.append(message)
        if message.get("role") == "user":
            break
    return opening


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
    checked = []
    for other in generations:
        checked += [other["input"], answers_of(other)] if opening_of(other) == opening_of(generation) else []
    return {"messages": messages + answers_of(generation), "tools": tools, "meta": meta, "checked": checked}
