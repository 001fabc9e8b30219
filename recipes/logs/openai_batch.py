"""The files of OpenAI's Batch API: half a conversation each, named, not read."""

KINDS = {"request": "left out: the log is rejected", "response": "left out: the log is rejected"}


def fits(record):
    return "custom_id" in record and ("body" in record or "response" in record)


def read(record):
    if "body" in record:
        raise ValueError("not_supported: the input of an OpenAI batch, without answers")
    raise ValueError("not_supported: the output of an OpenAI batch, without the requests")
