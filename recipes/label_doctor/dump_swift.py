"""What ms-swift trains: `dump_swift.py FOLDER ROWS MODEL_TYPE TEMPLATE > dump.jsonl`.

Its rows have no reasoning_content: a thought stands in the content, as <think>. Weights go over as "loss".
"""

import json
import sys

from swift.model import get_processor
from swift.template import get_template

folder, rows, model_type, template_type = sys.argv[1:]
processor = get_processor(folder, model_type=model_type)
template = get_template(processor, template_type=template_type)
template.set_mode("train")
form = "<think>{}</think>\n" if "glm" in template_type else "<think>\n{}\n</think>\n\n"
for line in open(rows):
    row = json.loads(line)
    for message in row["messages"]:
        if message["role"] == "assistant":
            message["loss"] = bool(message.pop("weight", 1))
        if thought := message.pop("reasoning_content", None):
            message["content"] = form.format(thought) + message["content"]
    encoded = template.encode({"messages": row["messages"], "tools": row["tools"]})
    dumped = {
        "query_id": row["query_id"],
        "input_ids": list(encoded["input_ids"]),
        "labels": list(encoded["labels"]),
    }
    print(json.dumps(dumped))
