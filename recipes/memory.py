"""Memory that 03_sft.py needs on each device: a calculation from config.json, before any GPU is rented.

    python recipes/memory.py --config recipes/glm-4.5-air/sft.yaml --longest 125000
    python recipes/memory.py --model_name_or_path Qwen/Qwen3-4B --longest 42000 --bf16_master
    python recipes/memory.py --config recipes/glm-4.5/sft.yaml --longest 125000 --devices 128 --cp 8

Asks nobody: config.json is the model's folder's, the Hub cache's, or of a recipe of ours the copy beside its
sft.yaml; --train_file's longest sample counts unless --longest says it. Prints GB a device for the usual
layouts. Beside the peak of real runs on a CPU (tests/test_03_memory.py) it is within a tenth; for a long
sample, where the allocator keeps more or less from run to run, up to 13 % low.
"""

import argparse
import importlib
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ["HF_HUB_OFFLINE"] = "1"  # without a network the Hub's client would wait for minutes

USUAL = [(1, 1, False), (2, 1, True), (8, 1, True)]  # devices, context parallel, FSDP2?
USUAL += [(devices, 8, True) for devices in (8, 16, 32, 64)]


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
    gpu: bool = True  # layers' inputs go to the host's memory


def count_parameters(skeleton) -> tuple[int, float, int]:
    """(all, those that work on one token but for embedding and output layer, those of the largest layer)."""
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
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads * head


def sample_flops(config, active: float, tokens: int, trained: int) -> float:
    """Of one sample, forward and backward, without what checkpointing computes twice: 6 per weight and token,
    causal attention, the output layer for trained tokens only."""
    config = config.get_text_config()
    attention = config.num_hidden_layers * attention_width(config, config.num_attention_heads) * tokens**2
    return 6 * (active * tokens + config.vocab_size * config.hidden_size * trained + attention)


KEPT_FREE = 1.5  # on a CPU: glibc keeps freed pieces below 32 MB; as measured
PIECE = 2**22  # weights that RoundingAdamW takes at a time, with copies in fp32

# Bytes that a layer keeps for its backward pass, per token and unit of (the model's width, queries + keys +
# values, the MLP's width, a routed copy of the token): counted with saved_tensors_hooks on Qwen3 and GLM-4.5
KEPT = {
    "fp32": (24, 16, 16, 8),
    "autocast": (26, 10, 8, 4),  # fp32 weights, bf16 products
    "bf16": (16, 10, 8, 4),  # FSDP2's, or --bf16_master
}


def layer_activations(config, run: Run) -> float:
    """Bytes a token of one layer while it is being recomputed, with the gradients at its widest place."""
    hidden, attention, mlp, routed = KEPT[precision(run)]
    experts = getattr(config, "num_experts_per_tok", None) or 0
    width = config.intermediate_size
    if experts:
        width = (experts + 1) * getattr(config, "moe_intermediate_size", width)
    heads = attention_width(config, config.num_attention_heads + 2 * config.num_key_value_heads)
    kept = hidden * config.hidden_size + attention * heads + mlp * width
    kept += routed * experts * config.hidden_size
    gradients = 4 * config.hidden_size + mlp / 2 * width
    return kept + gradients


def precision(run: Run) -> str:
    if run.bf16_master or (run.fsdp and run.bf16):
        return "bf16"
    return "autocast" if run.bf16 else "fp32"


def memory(skeleton, run: Run) -> dict[str, float]:
    """GB of {"weights", "optimizer", "gradients", "activations", "host"} on the fullest device."""
    config = skeleton.config.get_text_config()
    total, _, layer = count_parameters(skeleton)
    size = 2 if run.bf16_master or (run.lora_parameters and run.bf16 and not run.fsdp) else 4
    shards = run.devices if run.fsdp else 1
    trained = 4 * run.lora_parameters or size * total / shards
    tokens = run.longest / run.cp
    residual = (2 if precision(run) == "bf16" else 4) * config.hidden_size
    kept = tokens * residual * config.num_hidden_layers
    activations = tokens * layer_activations(config, run)
    if not run.checkpointing:
        activations *= config.num_hidden_layers
    activations += gathered_weights(config, run, layer, size)
    activations += 6 * config.vocab_size * config.hidden_size  # output layer: bf16 weight, fp32 gradient
    host = kept * run.checkpointing  # inputs of the layers, offloaded from a GPU
    if not run.gpu:
        activations = KEPT_FREE * (activations + host)
        host = 0.0
    activations = max(activations, loss_buffers(config, run))  # one after the other
    copies = rounding_copies(skeleton, run)
    activations = max(activations, copies) if run.gpu else activations + copies  # glibc keeps both
    parts = {"weights": size * total / shards, "optimizer": 2 * trained, "gradients": trained}
    parts |= {"activations": activations, "host": host}
    return {name: part / 1e9 for name, part in parts.items()}


def loss_buffers(config, run: Run) -> float:
    """Bytes of TRL's output layer, which scores 4,096 tokens against 32,768 words at a time: on a GPU in
    place, on a CPU with eight copies in fp32 and a mask."""
    tokens = min(4096, run.longest / run.cp)
    if run.gpu:
        return tokens * 32_768 * (2 if run.bf16 else 4)
    return tokens * min(32_768, config.vocab_size) * 37


def rounding_copies(skeleton, run: Run) -> float:
    """Bytes of fp32 copies of the weights that RoundingAdamW takes at once; on a CPU what glibc keeps too."""
    if not run.bf16_master or run.lora_parameters:
        return 0.0
    largest = max(parameter.numel() for parameter in skeleton.parameters())
    return (60 if run.gpu else 150) * min(PIECE, largest)


def gathered_weights(config, run: Run, layer: int, size: int) -> float:
    """Bytes of weights that exist twice for a while: under FSDP2 two layers gathered in bf16 and one's
    gradient in fp32, else autocast's bf16 copy of one layer; a layer of experts with their adapters, and on a
    CPU, whose grouped product turns the weights and their gradient."""
    if run.fsdp:
        return (8 if run.lora_experts or not run.lora_parameters else 4) * layer
    copy = 2 * layer if run.bf16 and size == 4 else 0
    experts = bool(getattr(config, "num_experts_per_tok", None)) and not run.gpu
    return copy + (2 * size * layer if run.lora_experts or experts else 0)


def print_table(skeleton, runs: list[Run], card: float) -> None:
    """card: GB of the device."""
    total, active, _ = count_parameters(skeleton)
    print(f"{total / 1e9:.3g} billion parameters, {active / 1e9:.3g} active\n"
          f"GB per device, calculated, for a sample of {runs[0].longest:,} tokens:")
    for run in runs:
        parts = memory(skeleton, run)
        needed = sum(parts.values()) - parts["host"]
        listed = ", ".join(f"{name} {part:,.1f}" for name, part in parts.items())
        verdict = "" if needed < 0.9 * card else " does not fit"  # the allocator needs some room
        layout = f"{run.devices:3} device(s){', FSDP2' * run.fsdp}, {run.cp} at one sample"
        print(f"{layout}: {needed:,.1f} of {card:g} GB ({listed}){verdict}")


def adapter_parameters(sft, settings, config) -> int:
    from peft import get_peft_model

    model = get_peft_model(sft.model_without_weights(config), sft.lora_config(settings, config))
    return sum(part.numel() for part in model.parameters() if part.requires_grad)


def known_config(sft, model: str, longest: int):
    """The model's config from this machine. Raises InputError."""
    for place in (model, *ROOT.glob(f"recipes/{Path(model).name.lower()}/")):
        try:
            return sft.load_config(str(place), longest)
        except (OSError, ValueError) as error:
            if isinstance(error, sft.InputError):
                raise
    told = "its config.json is not on this machine; with a network: hf download"
    raise sft.InputError(f"{model}: {told} {model} config.json")


def main(sft) -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--longest", type=int, help="tokens of the longest sample, instead of --train_file's")
    parser.add_argument("--devices", type=int, help="only this layout: FSDP2 on so many devices")
    parser.add_argument("--cp", type=int, default=1, help="of them so many share a sample (default: 1)")
    parser.add_argument("--card", type=float, default=80, help="GB of a device (default: 80)")
    options, rest = parser.parse_known_args()
    settings, args = sft.read_settings(sft.make_parser(), rest)
    if options.cp != 1 and (options.cp < 1 or not options.devices or options.devices % options.cp):
        raise sft.InputError(f"--cp {options.cp} needs --devices, a multiple of it")
    longest = options.longest
    if not longest:
        tok = sft.load_tokenizer(settings.model_name_or_path, sft.read_switches(settings))
        longest = sft.load_samples(settings, args, tok)[1]["longest"]
    config = known_config(sft, settings.model_name_or_path, longest)
    skeleton = sft.model_without_weights(config)
    adapters = adapter_parameters(sft, settings, config) if settings.lora or settings.lora_experts else 0
    layouts = [(options.devices, options.cp, options.devices > 1)] if options.devices else USUAL
    common = dict(lora_parameters=adapters, lora_experts=settings.lora_experts)
    common |= dict(bf16_master=settings.bf16_master, checkpointing=args.gradient_checkpointing)
    runs = [Run(longest, *layout, **common) for layout in layouts]
    print_table(skeleton, runs, options.card)


if __name__ == "__main__":
    stage = importlib.import_module("03_sft")
    try:
        main(stage)
    except stage.InputError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        sys.exit(2)
