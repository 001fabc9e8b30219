"""Download the data set of task 5, DynToM, into workspace/data: every file that the hub lists for it."""

import json
import os
import urllib.request
from pathlib import Path
from urllib.parse import quote

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
NAME = "YangXiao-nlp/DynToM"

with urllib.request.urlopen(f"{HUB}/api/datasets/{NAME}/tree/main?recursive=true") as reply:
    entries = json.load(reply)
for entry in entries:
    if entry["type"] == "file":
        target = Path("workspace/data", entry["path"])
        target.parent.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(f"{HUB}/datasets/{NAME}/resolve/main/{quote(entry['path'])}", target)
        print(target)
