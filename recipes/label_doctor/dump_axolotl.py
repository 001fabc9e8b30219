"""What axolotl trains (type chat_template): `dump_axolotl.py FOLDER ROWS [STOP,STOP...] > dump.jsonl`.

STOP: the `eot_tokens` of its YAML; without them its default, the tokenizer's eos token. Weights go over in
the field that `message_field_training` names.
"""

import json
import sys

from axolotl.prompt_strategies.chat_template import load
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer

folder, rows, *stops = sys.argv[1:]
settings = {"train_on_inputs": False, "sequence_len": 100000}
if stops:
    settings["eot_tokens"] = stops[0].split(",")
dataset = {
    "type": "chat_template",
    "chat_template": "tokenizer_default",
    "field_messages": "messages",
    "roles_to_train": ["assistant"],
    "message_field_training": "train",
}
tok = AutoTokenizer.from_pretrained(folder)
strategy = load(tok, DictDefault(settings), DictDefault(dataset))
for line in open(rows):
    row = json.loads(line)
    for message in row["messages"]:
        if "weight" in message:
            message["train"] = bool(message.pop("weight"))
    kept = {key: row[key] for key in ("messages", "tools") if row[key]}
    encoded = strategy.tokenize_prompt(kept)
    dumped = {
        "query_id": row["query_id"],
        "input_ids": list(encoded["input_ids"]),
        "labels": list(encoded["labels"]),
    }
    print(json.dumps(dumped))
