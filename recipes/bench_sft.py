"""Speed and memory of 03_sft.py beside plain TRL on the same rows, random weights, one device.

    python recipes/bench_sft.py --model_name_or_path Qwen/Qwen3-4B --lengths 8192 42000 125000 --kernels
    python recipes/bench_sft.py --model_name_or_path outputs/demo/base --lengths 2000 --pairs 5   # on a CPU

Plain TRL: SFTTrainer with assistant_only_loss, no cut at max_length, one sample a step, fp32 weights (bf16
compute on a GPU) as here, otherwise TRL's own settings. Only the model's config.json and tokenizer are
needed. Every measurement is a process of its own, so one that runs out of memory says so and the table goes
on. On a CPU the figure is user CPU seconds, which other programs on the machine change little; the variants
run in turn, --pairs times. "GB calc." is recipes/memory.py's, GB what the device (on a CPU the process) held.
"""

import argparse
import contextlib
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "recipes"))

import memory  # noqa: E402

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}  # dense bf16, data sheets
PARAMETERS = {"type": "object", "properties": {"absolute_path": {"type": "string"}}}
FUNCTION = {"name": "read_file", "description": "Reads a file.", "parameters": PARAMETERS}
OURS = "03_sft.py"
OURS_BF16 = "03, bf16"  # with --bf16_master
THEIRS = "plain TRL"
VARIANTS = [OURS, OURS_BF16, THEIRS]


def make_row(tok, length: int) -> dict:
    """A trajectory of about `length` tokens: calls of 60 tokens, outputs of 500, as in agent logs."""
    line = "def step(state, action): return state.apply(action)  # value 12345\n"
    output = line * (500 // len(tok(line)["input_ids"]))
    function = {"name": "read_file", "arguments": {"absolute_path": "/workspace/a.py"}}
    call = {"id": "call", "type": "function", "function": function}
    turn = [
        {"role": "assistant", "content": "I read the file before I change it. " * 4, "tool_calls": [call]},
        {"role": "tool", "content": output, "tool_call_id": "call"},
    ]
    text = output + turn[0]["content"] + json.dumps(call)
    turns = max(1, length // len(tok(text)["input_ids"]))
    messages = [{"role": "user", "content": "Repair it."}]
    messages += turn * turns
    messages.append({"role": "assistant", "content": "Done."})
    tools = [{"type": "function", "function": FUNCTION}]
    return {"query_id": str(length), "messages": messages, "tools": tools}


def random_model(sft, model: str, folder: Path) -> str:
    """A folder with the model's config and tokenizer and random weights in bf16."""
    import torch

    sft.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    torch.manual_seed(0)
    config = sft.AutoConfig.from_pretrained(model)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = sft.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    return str(folder)


class Clock:
    """Wall and user CPU seconds of every step but the first, which warms up."""

    def __init__(self):
        self.wall = []
        self.user = []

    def begin(self):
        self.started = time.monotonic()
        self.used = user_seconds()

    def end(self):
        self.wall.append(time.monotonic() - self.started)
        self.user.append(user_seconds() - self.used)


def user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def clocked(sft, clock: Clock):
    class Timed(sft.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end()

    return Timed()


def ours(sft, options, folder: Path, clock: Clock) -> set[str]:
    """Trains, and returns the names of torch's attention that were taken."""
    flags = ["--model_name_or_path", options.model_name_or_path]
    flags += ["--train_file", options.train_file]
    flags += ["--output_dir", folder / "out", "--max_length", 10**6]
    flags += ["--global_batch_size", 1, "--max_steps", options.steps]
    flags += ["--gradient_checkpointing", "true"]
    if options.one == OURS_BF16:
        flags.append("--bf16_master")
    kernels = set()
    sft.export = lambda *_: None  # writing the random model is not what is measured
    start = sft.Trainer.start

    def start_clocked(trainer, *arguments):
        start(trainer, *arguments)
        trainer.kernels = kernels
        trainer.add_callback(clocked(sft, clock))

    sft.Trainer.start = start_clocked
    flags = [str(flag) for flag in flags]
    settings, args = sft.read_settings(sft.make_parser(), flags)
    sft.main(settings, args)
    return kernels


def plain(sft, options, folder: Path, clock: Clock) -> set[str]:
    on_gpu = sft.torch.cuda.is_available()
    model = options.model_name_or_path
    network = sft.AutoModelForCausalLM.from_pretrained(model, dtype=sft.torch.float32)
    rows = []
    for _, row in sft.read_jsonl(options.train_file):
        rows.append({"messages": row["messages"], "tools": row["tools"]})
    args = sft.SFTConfig(
        output_dir=str(folder / "out"),
        assistant_only_loss=True,
        max_length=None,
        per_device_train_batch_size=1,
        max_steps=options.steps,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    dataset = sft.Dataset.from_list(rows, on_mixed_types="use_json")
    trainer = sft.SFTTrainer(
        network,
        args,
        train_dataset=dataset,
        processing_class=sft.AutoTokenizer.from_pretrained(model),
        callbacks=[clocked(sft, clock)],
    )
    trainer.train()
    return set()


def measure(options) -> None:
    """One measurement, as JSON on the last line of stdout."""
    sft = importlib.import_module("03_sft")
    clock = Clock()
    run = plain if options.one == THEIRS else ours
    figures = {}
    with tempfile.TemporaryDirectory() as folder, profiled(sft, options) as profile:
        figures["attention"] = sorted(run(sft, options, Path(folder), clock))
    if options.kernels:
        figures["kernels"] = longest_kernels(profile)
    figures["wall"] = statistics.mean(clock.wall[1:])
    figures["user"] = statistics.mean(clock.user[1:])
    if sft.torch.cuda.is_available():
        figures["memory"] = sft.torch.cuda.max_memory_allocated() / 1e9
        figures["chip"] = sft.torch.cuda.get_device_name()
    else:
        figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(figures))


def profiled(sft, options):
    """The profiler of the device's kernels, or nothing."""
    if not options.kernels:
        return contextlib.nullcontext()
    profiler = sft.torch.profiler
    return profiler.profile(activities=[profiler.ProfilerActivity.CUDA])


def longest_kernels(profile) -> list[str]:
    """The ten kernels that took longest, with their share of the device's time."""
    events = profile.key_averages()
    total = sum(event.self_device_time_total for event in events)
    events = sorted(events, key=lambda event: event.self_device_time_total, reverse=True)
    return [f"{event.self_device_time_total / total:5.1%}  {event.key[:90]}" for event in events[:10]]


def sample_of(sft, options) -> tuple[int, int]:
    """(tokens, trained tokens) of the file's samples, on average."""
    rows, _ = sft.read_rows(options.train_file)
    tok = sft.load_tokenizer(options.model_name_or_path)
    samples, _, _ = sft.tokenize(tok, rows, 10**7)
    tokens = sum(len(sample["labels"]) for sample in samples)
    context = sum(sample["labels"].count(-100) for sample in samples)
    return tokens // len(samples), (tokens - context) // len(samples)


def run_one(which: str, options) -> dict | str:
    """Figures of a process of its own, or its last words."""
    command = [sys.executable, __file__, "--one", which, "--steps", str(options.steps)]
    command += ["--model_name_or_path", options.model_name_or_path]
    command += ["--train_file", options.train_file]
    command += ["--kernels"] * options.kernels
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last_words = ["failed", *result.stderr.strip().splitlines()]
        return last_words[-1][:80]
    return json.loads(result.stdout.splitlines()[-1])


def calculated_memory(skeleton, which: str, tokens: int, on_gpu: bool) -> str:
    """GB by recipes/memory.py; it knows nothing of plain TRL."""
    if which == THEIRS:
        return "-"
    run = memory.Run(tokens, bf16_master=which == OURS_BF16, bf16=on_gpu, gpu=on_gpu)
    parts = memory.memory(skeleton, run)
    return f"{sum(parts.values()) - parts['host']:.2f}"


def print_rows(sft, options, name: str) -> None:
    tokens, trained = sample_of(sft, options)
    config = sft.AutoConfig.from_pretrained(options.model_name_or_path)
    skeleton = sft.model_without_weights(config)
    active = memory.count_parameters(skeleton)[1]
    flops = memory.sample_flops(config, active, tokens, trained)
    user = {which: [] for which in options.by}
    for _ in range(options.pairs):
        for which in user:
            figures = run_one(which, options)
            if isinstance(figures, str):
                print(f"{name:>10} {which:<10} {figures}", flush=True)
                user[which].append(None)
                continue
            user[which].append(figures["user"])
            figures["calculated"] = calculated_memory(skeleton, which, tokens, sft.torch.cuda.is_available())
            print_figures(f"{name:>10} {which:<10}", tokens, flops, figures)
    if ratios := ratios_of(user.get(OURS, ()), user.get(THEIRS, ())):
        middle = statistics.median(ratios)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:>10} user CPU seconds, ours : theirs, {len(ratios)} pairs: {middle:.3f} ({spread})")


def ratios_of(mine, theirs) -> list[float]:
    """Of each pair in which both ran; a failed measurement is None."""
    return [own / other for own, other in zip(mine, theirs) if own and other]


def print_figures(name: str, tokens: int, flops: float, figures: dict) -> None:
    wall = figures["wall"]
    mfu = "-"
    for chip, peak in PEAK_FLOPS.items():
        if chip in figures.get("chip", ""):
            mfu = f"{flops / wall / peak:.1%}"
    speed = f"{wall:8.3f} {figures['user']:8.3f} {tokens / wall:9.0f} {mfu:>6}"
    held = f"{figures['memory']:7.2f} {figures['calculated']:>8}"
    print(name, f"{tokens:8}", speed, held, *figures["attention"], flush=True)
    for kernel in figures.get("kernels", []):
        print(" " * 22, kernel, flush=True)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--model_name_or_path", required=True)
    add("--lengths", type=int, nargs="+", default=[8192, 42000, 125000])
    add("--train_file", help="rows to measure on, instead of made ones of --lengths")
    add("--steps", type=int, default=4)
    add("--pairs", type=int, default=1, help="how often ours and theirs are run, in turn")
    add("--by", nargs="+", choices=VARIANTS, default=[OURS, THEIRS])
    add("--kernels", action="store_true", help="name the GPU's kernels that took longest")
    add("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return measure(options)
    sft = importlib.import_module("03_sft")
    heads = ("tokens", "s/step", "user s", "tokens/s", "MFU", "GB", "GB calc.")
    widths = (8, 8, 8, 9, 6, 7, 8)
    columns = [head.rjust(width) for head, width in zip(heads, widths)]
    print(f"{'rows':>10} {'by':<10}", *columns, "attention")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model_name_or_path
        if not list(Path(model).glob("*.safetensors")):
            model = random_model(sft, model, Path(folder, "model"))
            options.model_name_or_path = model
        if options.train_file:
            return print_rows(sft, options, Path(options.train_file).name)
        tok = sft.AutoTokenizer.from_pretrained(model)
        for length in options.lengths:
            path = Path(folder, f"{length}.jsonl")
            line = json.dumps(make_row(tok, length)) + "\n"
            path.write_text(line * options.steps)
            options.train_file = str(path)
            print_rows(sft, options, str(length))


if __name__ == "__main__":
    main()
