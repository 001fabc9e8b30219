"""Memory that 03_sft.py needs on each device: a calculation from config.json, before any GPU is rented.

    python recipes/memory.py --config recipes/glm-4.5-air/sft.yaml --longest 125000
    python recipes/memory.py --model_name_or_path Qwen/Qwen3-4B --longest 42000 --bf16_master

Reads the model's config.json, and --train_file's longest sample unless --longest says it. Prints GB a device for the
usual layouts. Checked against the peak of real runs on a CPU by tests/test_03_memory.py.
"""

import argparse
import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CARD = 80  # GB of the device that the table is about
USUAL = [(1, 1, False), (2, 1, True), (8, 1, True), (8, 8, True), (16, 8, True), (32, 8, True), (64, 8, True)]


@dataclass
class Run:
    """What the memory depends on, beside the model."""

    longest: int  # tokens of the longest sample
    devices: int = 1
    cp: int = 1  # devices that share a sample
    fsdp: bool = False
    lora_parameters: int = 0
    lora_experts: bool = False
    bf16_master: bool = False
    bf16: bool = True  # the precision of the computation
    checkpointing: bool = True  # else every layer's activations are kept
    gpu: bool = True  # its output layer scores trained tokens in tiles, a CPU's all of them
    trained: int = 0  # tokens of that sample that carry loss


def count_parameters(skeleton) -> tuple[int, float, int]:
    """(all, those that work on one token without embedding and output layer, those of the largest layer)."""
    experts = getattr(skeleton.config.get_text_config(), "num_experts_per_tok", None)
    layers = Counter()
    active = 0
    for name, parameter in skeleton.named_parameters():
        if ".layers." not in name:
            continue
        layers[name.split(".layers.")[1].split(".")[0]] += parameter.numel()
        share = experts / parameter.shape[0] if ".experts." in name else 1
        active += share * parameter.numel()
    return skeleton.num_parameters(), active, max(layers.values())


def attention_width(config, heads: int) -> int:
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def sample_flops(config, active: float, tokens: int, trained: int) -> float:
    """Of one sample, forward and backward, without what checkpointing computes twice: 6 per weight and token, causal
    attention, the output layer for trained tokens only."""
    attention = config.num_hidden_layers * attention_width(config, config.num_attention_heads) * tokens**2
    return 6 * (active * tokens + config.vocab_size * config.hidden_size * trained + attention)


def layer_activations(config, run: Run) -> float:
    """Bytes a token of what one layer keeps for its backward pass while it is being recomputed."""
    half = 2 if run.bf16 or run.bf16_master else 4  # bytes of a value that matrix products see
    residual = (2 if run.fsdp or run.bf16_master else 4) if run.bf16 or run.bf16_master else 4
    experts = getattr(config, "num_experts_per_tok", None) or 0
    width = config.intermediate_size
    if experts:
        width = (experts + 1) * getattr(config, "moe_intermediate_size", config.intermediate_size)
    heads = attention_width(config, config.num_attention_heads + 2 * config.num_key_value_heads)
    norms = 5 * residual * 2 * config.hidden_size / 2  # two norms' inputs and outputs, the stream, its gradient
    norms *= 2
    attention = 4 * half * heads / 2 * 2  # queries, keys, values, before and after the rotation, their gradients
    mlp = 5 * half * width  # gate, up, their product, its gradient
    routed = 2 * half * experts * config.hidden_size  # a token's copies for its experts, and what comes back
    return norms + attention + mlp + routed


def memory(skeleton, run: Run) -> dict[str, float]:
    """GB of {"weights", "optimizer", "gradients", "activations", "host"} on the fullest device."""
    config = skeleton.config.get_text_config()
    total, _, layer = count_parameters(skeleton)
    size = 2 if run.bf16_master or (run.lora_parameters and run.bf16 and not run.fsdp) else 4
    shards = run.devices if run.fsdp else 1
    trained = 4 * run.lora_parameters or size * total / shards
    tokens = run.longest / run.cp
    residual = (2 if run.bf16 or run.bf16_master else 4) * config.hidden_size
    kept = tokens * residual * config.num_hidden_layers
    activations = tokens * layer_activations(config, run)
    if not run.checkpointing:
        activations *= config.num_hidden_layers
    activations += 6 * config.vocab_size * config.hidden_size  # output layer: weight in bf16, gradient in fp32
    activations += gathered_weights(run, total, layer, size)
    host = 0.0
    if run.gpu:
        host = kept * run.checkpointing  # inputs of the layers, offloaded
    else:
        activations += kept * run.checkpointing
    parts = dict(weights=size * total / shards, optimizer=2 * trained, gradients=trained, activations=activations)
    parts["host"] = host
    return {name: part / 1e9 for name, part in parts.items()}


def gathered_weights(run: Run, total: int, layer: int, size: int) -> float:
    """Bytes of weights that exist twice for a while: under FSDP2 two layers gathered in bf16 and one's gradient in
    fp32, else autocast's copy in bf16 of one layer's fp32 weights; a layer of experts with their adapters added."""
    if run.fsdp:
        return (8 if run.lora_experts or not run.lora_parameters else 4) * layer
    copy = 2 * layer if run.bf16 and size == 4 else 0
    return copy + (2 * size * layer if run.lora_experts else 0)


def print_table(skeleton, runs: list[Run]) -> None:
    total, active, _ = count_parameters(skeleton)
    print(f"{total / 1e9:.3g} billion parameters, {active / 1e9:.3g} active\n"
          f"GB per device, calculated, for a sample of {runs[0].longest:,} tokens:")
    for run in runs:
        parts = memory(skeleton, run)
        needed = sum(parts.values()) - parts["host"]
        listed = ", ".join(f"{name} {part:,.1f}" for name, part in parts.items())
        verdict = "" if needed < 0.9 * CARD else " does not fit"  # the allocator needs some room
        layout = f"{run.devices:3} device(s){', FSDP2' * run.fsdp}, context parallel {run.cp}"
        print(f"{layout}: {needed:,.1f} of {CARD} ({listed}){verdict}")


def main() -> None:
    sft = importlib.import_module("03_sft")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, help="tokens of the longest sample, instead of --train_file's")
    options, rest = parser.parse_known_args()
    settings, args = sft.read_settings(sft.make_parser(), rest)
    longest = options.longest
    if not longest:
        tok = sft.load_tokenizer(settings.model_name_or_path, sft.read_switches(settings))
        longest = sft.load_samples(settings, args, tok)[1]["longest"]
    config = sft.load_config(settings.model_name_or_path, longest)
    skeleton = sft.model_without_weights(config)
    settings.lora |= settings.lora_experts
    adapters = 0
    if settings.lora:
        adapters = sft.adapter_parameters(settings, config)
    common = dict(longest=longest, lora_parameters=adapters, lora_experts=settings.lora_experts,
                  bf16_master=settings.bf16_master)
    print_table(skeleton, [Run(devices=devices, cp=cp, fsdp=fsdp, **common) for devices, cp, fsdp in USUAL])


if __name__ == "__main__":
    main()
