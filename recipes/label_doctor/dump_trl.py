"""What TRL's SFTTrainer trains with assistant_only_loss: `dump_trl.py FOLDER ROWS > dump.jsonl`.

FOLDER: tokenizer and config.json of a small model. A weight of 0 is not passed on: TRL has nothing for it.
"""

import json
import sys

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, rows = sys.argv[1:3]
tok = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
given = load_dataset("json", data_files=rows, split="train")
names = given["query_id"]
settings = SFTConfig(
    output_dir="/tmp/trl",
    assistant_only_loss=True,
    max_length=None,
    use_cpu=True,
    report_to="none",
)
kept = given.select_columns(["messages", "tools"])
trainer = SFTTrainer(model, settings, train_dataset=kept, processing_class=tok)
for name, example in zip(names, trainer.train_dataset, strict=True):
    batch = trainer.data_collator([example])
    sample = {key: batch[key][0].tolist() for key in ("input_ids", "labels")}
    print(json.dumps({"query_id": name} | sample))
