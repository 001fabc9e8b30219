"""aider's .aider.chat.history.md: named, not read."""

KINDS = {"#### ": "left out: the log is rejected"}


def fits(record):
    return isinstance(record, str) and record.lstrip().startswith("# aider chat started at")


def read(record):
    raise ValueError("not_supported: aider's chat history, where answers, files and output look alike; "
                     "give what a proxy logs")  # fmt: skip
