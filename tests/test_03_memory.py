"""recipes/memory.py: parameters and operations by hand, and the memory of real runs on a CPU beside the calculation."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def memory():
    sys.path.insert(0, str(ROOT / "recipes"))
    return importlib.import_module("memory")


@pytest.fixture(scope="session")
def air():
    """GLM-4.5-Air's config.json."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(vocab_size=151552, hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408,
                         num_hidden_layers=46, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
                         n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=1,
                         attention_bias=True)  # fmt: skip


def test_parameters_of_glm_air(stage, memory, air):
    """By hand: 106.85 billion parameters, 2.34 in a layer; 12.18 at work on a token beside the 1.24 of embedding and
    output layer: 45 x (8 + 1) experts of 3 x 4096 x 1408, attention 4096 x 128 x (2 x 96 + 2 x 8), ..."""
    sft = stage("03_sft")
    total, active, layer = memory.count_parameters(sft.model_without_weights(air))
    attention, expert, router = 4096 * 128 * (2 * 96 + 2 * 8) + 128 * (96 + 2 * 8), 3 * 4096 * 1408, 128 * 4096
    everywhere = 46 * (attention + 2 * 4096) + 45 * (expert + router) + 3 * 4096 * 10944
    assert total == everywhere + 45 * 128 * expert + 2 * 151552 * 4096 + 4096
    assert active == everywhere + 45 * 8 * expert
    assert layer == attention + 2 * 4096 + 129 * expert + router


def test_floating_point_operations_by_hand(memory):
    """6 for each weight and token; attention forward: 2 products of n x n / 2 x heads x head_dim, 2 each."""
    from transformers import Glm4MoeConfig

    config = Glm4MoeConfig(vocab_size=277, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    attention = 3 * 2 * (2 * 2 * 100 * 100 / 2 * 2 * 32)  # layers 2, heads 2 x 32; backward is twice forward
    expected = 6 * 1000 * 100 + 6 * 30 * 277 * 32 + attention
    assert memory.sample_flops(config, 1000, 100, 30) == pytest.approx(expected)


def tabled(sft, memory, monkeypatch, *flags):
    """The runs that the table of these flags would show."""
    tables = []
    monkeypatch.setattr(memory, "print_table", lambda skeleton, runs, card: tables.append(runs))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--model_name_or_path", "Qwen/Qwen3-4B", "--longest", "9000", *flags])
    memory.main(sft)
    return tables[0]


def test_flags_of_a_layout_are_calculated_or_refused(stage, memory, monkeypatch):
    sft = stage("03_sft")
    (run,) = tabled(sft, memory, monkeypatch, "--devices", "16", "--cp", "8", "--gradient_checkpointing", "false")
    assert run == memory.Run(9000, devices=16, cp=8, fsdp=True, checkpointing=False)
    for flags in (["--cp", "8"], ["--cp", "8", "--devices", "12"], ["--cp", "0", "--devices", "8"]):
        with pytest.raises(sft.InputError, match=f"--cp {flags[1]} needs --devices, a multiple of it"):
            tabled(sft, memory, monkeypatch, *flags)


# Shapes of which one part of the memory is large each: weights, activations, experts, the rounding of bf16 weights
SHAPES = {
    "weights": dict(kind="qwen", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, tokens=400),
    "a long sample": dict(kind="qwen", hidden_size=512, intermediate_size=2048, num_hidden_layers=2, tokens=4000),
    "experts": dict(kind="glm", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=3, tokens=2000),
    "a large vocabulary": dict(kind="qwen", hidden_size=128, intermediate_size=512, num_hidden_layers=2, vocab_size=32768,
                               tokens=600),
    "weights in bf16": dict(kind="qwen", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, tokens=400,
                            flags=["--bf16_master"]),
}
# Each run is a fork of one process that has imported everything
RUNS = """
import importlib, json, os, re, sys
sys.path.insert(0, ".")
sft = importlib.import_module("03_sft")

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def run(flags):
    load = sft.load_model
    before = []
    def watched(*arguments):
        before.append(status("RssAnon"))
        return load(*arguments)
    sft.load_model = watched
    sft.export = lambda *_: None
    sft.main(*sft.read_settings(sft.make_parser(), flags))
    files = status("RssFile")  # libraries, which a fork maps anew as it needs them, and the base's weights
    print("MEASURED", json.dumps([before[0] + files, status("VmHWM")]), flush=True)

for flags in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(flags)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def make_base(make_model, folder, kind, **shape):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    tok = make_model.make_tokenizer(["a"], vocab_size=277)
    if kind == "glm":
        config = make_model.make_config(tok)
        config.update(dict(n_routed_experts=16, head_dim=64) | shape)
    else:
        heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False)
        shape = dict(vocab_size=len(tok)) | shape
        config = Qwen3Config(max_position_embeddings=16384, eos_token_id=[263, 265],
                             pad_token_id=256, **heads, **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)


@pytest.fixture(scope="session")
def measured(make_model, tmp_path_factory):
    """{shape: (folder, resident memory without the model, at the peak)}; two updates of one sample."""
    runs = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp("memory")
        tokens = shape["tokens"]
        make_base(make_model, folder / "base", **{key: shape[key] for key in shape if key not in ("tokens", "flags")})
        talk = [{"role": "user", "content": "U" * (tokens - 60)}, {"role": "assistant", "content": "D" * 52}]
        (folder / "t.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        flags = ["--model_name_or_path", folder / "base", "--train_file", folder / "t.jsonl", "--max_steps", 2]
        flags += ["--output_dir", folder / "out", "--global_batch_size", 1, *shape.get("flags", [])]
        runs[folder] = [str(flag) for flag in flags]
    command = [sys.executable, "-c", RUNS, json.dumps(list(runs.values()))]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=one_thread, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = [line.split(" ", 1)[1] for line in result.stdout.splitlines() if line.startswith("MEASURED")]
    return dict(zip(SHAPES, zip(runs, map(json.loads, lines), strict=True), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_takes_what_was_calculated(stage, memory, measured, name):
    sft, (folder, (before, peak)) = stage("03_sft"), measured[name]
    skeleton = sft.model_without_weights(sft.AutoConfig.from_pretrained(folder / "base"))
    bf16_master = "flags" in SHAPES[name]
    run = memory.Run(longest=SHAPES[name]["tokens"], bf16_master=bf16_master, bf16=False, gpu=False)
    calculated = 1e9 * sum(memory.memory(skeleton, run).values())
    print(f"{name}: {peak - before:,} measured, {calculated:,.0f} calculated, libraries {before:,}")
    varies = name == "a long sample"  # what glibc keeps of it differs from run to run by a tenth of a GB
    assert before + calculated == pytest.approx(peak, rel=0.2 if varies else 0.1)
