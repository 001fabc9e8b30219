"""What verl's SFT trains, by its MultiTurnSFTDataset: `dump_verl.py FOLDER ROWS > dump.jsonl`.

Each row is a Parquet file of its own: in one file every call would get every key of every tool. A weight of 0
is not passed on: verl has nothing for it. A row that verl or Parquet (no list of several types, no empty
object) refuses is told on standard error.
"""

import json
import sys
import tempfile

import pandas
from jinja2 import TemplateError
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

REFUSALS = (AssertionError, NotImplementedError, TemplateError, TypeError, ValueError)
folder, rows = sys.argv[1:3]
tok = AutoTokenizer.from_pretrained(folder)
settings = {"pad_mode": "no_padding", "max_length": 100000}
for line in open(rows):
    row = json.loads(line)
    name = row["query_id"]
    frame = pandas.DataFrame([{key: row[key] for key in ("messages", "tools") if row[key]}])
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        try:
            frame.to_parquet(file.name)
            sample = MultiTurnSFTDataset(file.name, tok, settings)[0]
        except REFUSALS as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
    ids = sample["input_ids"].tolist()
    mask = sample["loss_mask"].tolist()
    labels = [token if on else -100 for token, on in zip(ids, mask, strict=True)]
    print(json.dumps({"query_id": name, "input_ids": ids, "labels": labels}))
