"""What LLaMA-Factory trains (stage sft, formatting sharegpt): `dump_llamafactory.py FOLDER ROWS TEMPLATE`.

Its "openai" rows cannot hold arguments of different types in one file, its "sharegpt" rows can: calls are
JSON in the content, after a thought as <think>. Text before a call has no place, in neither, and is lost; nor
has a weight of 0.
"""

import json
import pathlib
import sys
import tempfile

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

RESULTS = "\n</tool_response>\n<tool_response>\n"  # between parallel results, as its converter does it
ROLES = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "function"}


def shared_rows(messages):
    """Messages as its rows have them: results of one turn joined, calls as JSON."""
    told = []
    for message in messages:
        content = message["content"]
        role = "function" if message.get("tool_calls") else message["role"]
        if role == "function":
            calls = [call["function"] for call in message["tool_calls"]]
            content = json.dumps(calls, ensure_ascii=False)
        if thought := message.get("reasoning_content"):
            content = f"<think>\n{thought}\n</think>\n\n{content}"
        if role == "tool" and told[-1]["role"] == "tool":
            told[-1]["content"] += RESULTS + content
        else:
            told.append({"role": role, "content": content})
    return told


folder, rows, template = sys.argv[1:]
data = pathlib.Path(tempfile.mkdtemp())
names = []
with open(data / "rows.jsonl", "w") as file:
    for line in open(rows):
        row = json.loads(line)
        names.append(row["query_id"])
        tools = json.dumps(row["tools"], ensure_ascii=False) if row["tools"] else ""
        messages = shared_rows(row["messages"])
        file.write(json.dumps({"messages": messages, "tools": tools}) + "\n")
tags = {f"{theirs}_tag": ours for theirs, ours in ROLES.items()}
tags |= {"role_tag": "role", "content_tag": "content", "system_tag": "system"}
columns = {"messages": "messages", "tools": "tools"}
info = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
(data / "dataset_info.json").write_text(json.dumps({"rows": info}))
settings = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "cutoff_len": 100000,
    "model_name_or_path": folder,
    "dataset": "rows",
    "dataset_dir": str(data),
    "template": template,
    "output_dir": str(data / "out"),
    "report_to": "none",
}
model_args, data_args, training_args, _, _ = get_train_args(settings)
tokens = load_tokenizer(model_args)
form = get_template_and_fix_tokenizer(tokens["tokenizer"], data_args)
given = get_dataset(form, model_args, data_args, training_args, stage="sft", **tokens)
for name, sample in zip(names, given["train_dataset"], strict=True):
    pair = {key: sample[key] for key in ("input_ids", "labels")}
    print(json.dumps({"query_id": name} | pair))
