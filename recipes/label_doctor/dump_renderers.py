"""Labels of renderers, as prime-rl's SFT asks for them: `dump_renderers.py FOLDER ROWS NAME > dump.jsonl`.

NAME: glm-4.5, qwen3, or default (any other model: its own chat template and a mask by role)
"""

import json
import sys

from renderers import base, configs
from transformers import AutoTokenizer

KINDS = {
    "glm-4.5": configs.GLM45RendererConfig,
    "qwen3": configs.Qwen3RendererConfig,
    "default": configs.DefaultRendererConfig,
}
folder, rows, name = sys.argv[1:]
renderer = base.create_renderer(AutoTokenizer.from_pretrained(folder), KINDS[name]())
by_role = (lambda message: message["role"] == "assistant") if name == "default" else None
for line in open(rows):
    row = json.loads(line)
    weights = [message.pop("weight", 1) for message in row["messages"]]
    masks = {"role_to_mask": by_role, "message_loss_mask": weights, "ensure_final_stop": True}
    sample = base.build_training_sample(renderer, row["messages"], tools=row["tools"] or [], **masks)
    labels = [token if on else -100 for token, on in zip(sample.token_ids, sample.loss_mask)]
    dumped = {
        "query_id": row["query_id"],
        "input_ids": list(sample.token_ids),
        "labels": labels,
    }
    print(json.dumps(dumped))
