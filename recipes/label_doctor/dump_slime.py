"""Labels of slime's SFT, by its own MultiTurnLossMaskGenerator: `dump_slime.py FOLDER ROWS FILE[:TYPE]`.

FILE: slime/utils/mask_utils.py of a clone of slime, or slime/slime/utils/mask_utils.py of GAIR-NLP/LIMI, its
copy with one line changed. TYPE: --loss-mask-type of slime, qwen (default) or qwen3.
"""

import json
import runpy
import sys

from transformers import AutoTokenizer

folder, rows, source = sys.argv[1:]
file, _, kind = source.partition(":")
Generator = runpy.run_path(file)["MultiTurnLossMaskGenerator"]
generator = Generator(AutoTokenizer.from_pretrained(folder), tokenizer_type=kind or "qwen")
for line in open(rows):
    row = json.loads(line)
    for message in row["messages"]:
        message["step_loss_mask"] = message.pop("weight", 1)
    ids, mask = generator.get_loss_mask(row["messages"], row["tools"])
    labels = [token if on else -100 for token, on in zip(ids, mask, strict=True)]
    dumped = {
        "query_id": row["query_id"],
        "input_ids": ids,
        "labels": labels,
    }
    print(json.dumps(dumped))
