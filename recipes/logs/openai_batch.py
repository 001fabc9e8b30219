"""The files of OpenAI's Batch API: half a conversation each, named, not read."""

KINDS = {"request": "left out: the log is rejected", "response": "left out: the log is rejected"}


def fits(record):
    is_batch = "custom_id" in record and not record.keys() & {"messages", "request"}
    return is_batch and ("body" in record or "body" in record["response"])


def read(record):
    if "body" in record:
        raise ValueError("not_supported: the input of an OpenAI batch, without answers")
    raise ValueError("not_supported: the output of an OpenAI batch, without the requests")
