"""Speed and memory of 03_sft.py beside plain TRL on the same rows, random weights, one device.

    python recipes/bench_sft.py --model_name_or_path Qwen/Qwen3-4B --lengths 8192 16384 32768 65536 125000
    python recipes/bench_sft.py --model_name_or_path outputs/demo/base --train_file data/demo/train.jsonl --steps 20

Plain TRL: SFTTrainer with assistant_only_loss, no cut at max_length, one sample a step, fp32 weights (bf16 compute on
a GPU) as here, otherwise TRL's own settings. Only the model's config.json and tokenizer are needed. Every row of the
table is a process of its own, so one that runs out of memory says so and the table goes on.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_row(tok, length):
    """A trajectory of about `length` tokens: calls of 60 tokens, outputs of 500, as in agent logs."""
    line = "def step(state, action): return state.apply(action)  # value 12345\n"
    output = line * (500 // len(tok(line)["input_ids"]))
    call = {"type": "function", "function": {"name": "read_file", "arguments": {"absolute_path": "/workspace/a.py"}}}
    turn = [{"role": "assistant", "content": "I read the file before I change it. " * 4, "tool_calls": [call]},
            {"role": "tool", "content": output, "tool_call_id": "call"}]  # fmt: skip
    size = len(tok(output + turn[0]["content"] + json.dumps(call))["input_ids"])
    messages = [{"role": "user", "content": "Repair it."}, *turn * max(1, length // size)]
    return {"query_id": str(length), "messages": [*messages, {"role": "assistant", "content": "Done."}], "tools": []}


def ours(sft, model, train_file, steps, folder):
    """Seconds of each step, from the log that 03_sft.py writes."""
    flags = ["--model_name_or_path", model, "--train_file", train_file, "--output_dir", folder, "--from_scratch",
             "--global_batch_size", 1, "--max_steps", steps, "--max_length", 10**6]  # fmt: skip
    sft.export = lambda *_: None  # writing the random model is not what is measured
    sft.main(*sft.make_parser().parse_args_and_config(args=[str(flag) for flag in flags]))
    log = json.loads(Path(folder, "recipe.json").read_text())["log"]
    return [row["seconds"] for row in log]


def plain(sft, model, train_file, steps, folder):
    """Seconds of each step of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

    class Clock(TrainerCallback):
        seconds = []

        def on_step_begin(self, *_, **__):
            self.started = time.monotonic()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.monotonic() - self.started)

    on_gpu = sft.torch.cuda.is_available()
    set_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=sft.torch.float32)
    rows = [{key: row[key] for key in ("messages", "tools")} for _, row in sft.read_jsonl(train_file)]
    args = sft.SFTConfig(
        output_dir=folder, assistant_only_loss=True, max_length=None, per_device_train_batch_size=1, max_steps=steps,
        bf16=on_gpu, use_cpu=not on_gpu, save_strategy="no", report_to="none", logging_steps=1,
    )  # fmt: skip
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    tok = AutoTokenizer.from_pretrained(model)
    sft.SFTTrainer(network, args, train_dataset=dataset, processing_class=tok, callbacks=[Clock()]).train()
    return Clock.seconds


def measure(which, model, train_file, steps):
    """One row of the table, as JSON on the last line of stdout."""
    sys.path.insert(0, str(ROOT))
    sft = importlib.import_module("03_sft")
    samples, _ = sft.tokenize(sft.load_tokenizer(model), sft.read_rows(train_file), 10**6)
    with tempfile.TemporaryDirectory() as folder:
        seconds = {"03_sft.py": ours, "plain TRL": plain}[which](sft, model, train_file, steps, folder)
    config = sft.AutoConfig.from_pretrained(model)
    pairs = [(len(sample["labels"]), sum(label != -100 for label in sample["labels"])) for sample in samples]
    active = sft.census(config)[1]
    step = statistics.mean(seconds[1:])  # the first one warms up
    row = {"tokens": statistics.mean(tokens for tokens, _ in pairs), "seconds": step}
    row["flops"] = statistics.mean(sft.sample_flops(config, active, *pair) for pair in pairs) / step
    if sft.torch.cuda.is_available():
        name = sft.torch.cuda.get_device_name()
        row["peak"] = next((peak for chip, peak in sft.PEAK_FLOPS.items() if chip in name), None)
        row["memory"] = sft.torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 125000])
    parser.add_argument("--train_file", help="rows to measure on, instead of made ones of --lengths")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--one", choices=["03_sft.py", "plain TRL"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return measure(options.one, options.model_name_or_path, options.train_file, options.steps)
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(options.model_name_or_path)
    print(f"{'rows':>10} {'by':<10} {'tokens':>8} {'s/step':>8} {'tokens/s':>9} {'MFU':>6} {'GB':>6}")
    for length in [None] if options.train_file else options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            path = options.train_file
            if length:
                path = Path(folder, "train.jsonl")
                path.write_text((json.dumps(make_row(tok, length)) + "\n") * options.steps)
            for which in ("03_sft.py", "plain TRL"):
                command = [sys.executable, __file__, "--one", which, "--steps", str(options.steps)]
                command += ["--model_name_or_path", options.model_name_or_path, "--train_file", str(path)]
                result = subprocess.run(command, capture_output=True, text=True)
                name = f"{length or Path(path).name:>10} {which:<10}"
                if result.returncode:
                    print(name, (result.stderr.strip().splitlines() or ["failed"])[-1][:80], flush=True)
                    continue
                row = json.loads(result.stdout.splitlines()[-1])
                mfu = f"{row['flops'] / row['peak']:.1%}" if row.get("peak") else "-"
                memory = f"{row['memory']:.1f}" if "memory" in row else "-"
                print(f"{name} {row['tokens']:8.0f} {row['seconds']:8.3f} {row['tokens'] / row['seconds']:9.0f} "
                      f"{mfu:>6} {memory:>6}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
