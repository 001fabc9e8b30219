"""The check of a turn that asks for a name: is NAME what the last line "Answer: ..." of /answer.md says?

    python3 -I answer.py NAME [FILE]
"""

import re
import sys


def plain(name):
    """The name without what differs between spellings: "United Health Group" is "UnitedHealth Group Inc."."""
    legal = r"\b(inc|incorporated|corp|corporation|group|company|co|ltd|plc)\b|[\W_]"
    return re.sub(legal, "", name.lower())


name, path = [*sys.argv[1:], "/answer.md"][:2]
with open(path, encoding="utf-8") as file:
    answers = re.findall(r"^[ *_#>]*Answer[ *_]*:(.*)$", file.read(), re.MULTILINE | re.IGNORECASE)
right = bool(answers) and plain(answers[-1]) == plain(name)
print(f"{'ok' if right else 'not ok'} - the last line 'Answer: NAME' names the right one")
sys.exit(not right)
