"""How long a step of run.sh takes: calculated from the model's shape, never measured.

    python recipes/limi/cost.py qwen3-8b 1                    # recipe, nodes: the steps that need a GPU
    python recipes/limi/cost.py qwen3-8b 1 --step training    # only that one; what --plan prints below it

Training   26.5 million tokens: 78 rows of 42,400 in the mean (the paper's Fig. 4), 8 passes. 6 FLOP a weight
           and token, and causal attention over lengths whose squares have the mean 2.5e9 (assumed), at 25 %
           (dense) or 15 % (mixture of experts) of an H100's 990 TFLOP/s: assumed for several GPUs; a dense
           shape of 4 billion had 27 to 34 % on one (README).
Evaluation generated tokens at 1,000 a second from one server of the recipe's eval.yaml; how many a task takes
           is assumed (TOKENS). Loading the model, 10 minutes, is in it. A judge's time is not.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
ROWS, TOKENS_OF_A_ROW, PASSES, SQUARED = 78, 42_400, 8, 2.5e9
CARD = 990e12  # FLOP/s of an H100 in bf16
USED = {"dense": 0.25, "mixture": 0.15}
RATE = 1000  # generated tokens a second of one server
LOADING = 600  # seconds

# Conversations of one run, generated tokens of one: with tools, without
TOKENS = {
    "agencybench": (10 * 4, 50_000, 20_000),
    "humaneval": (164, 4_000, 1_000),
    "mbpp": (378, 4_000, 1_000),
    "ds1000": (1_000, 4_000, 1_000),
    "scicode": (288, 6_000, 2_000),
    "tau2-airline": (50 * 4, 6_000, 6_000),
    "tau2-retail": (114 * 4, 6_000, 6_000),
}


def count_weights(config: dict) -> tuple[int, int]:
    """(all, those that work on one token: not the embedding, the output layer, idle experts) of Qwen3 or
    GLM-4.5, without norms and biases."""
    width = config["hidden_size"]
    layers = config["num_hidden_layers"]
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    attention = layers * 2 * width * heads * config["head_dim"]
    embedding = config["vocab_size"] * width * (1 if config["tie_word_embeddings"] else 2)
    experts = config.get("n_routed_experts", 0)
    if not experts:
        dense = attention + layers * 3 * width * config["intermediate_size"]
        return dense + embedding, dense
    first = config["first_k_dense_replace"]
    expert = 3 * width * config["moe_intermediate_size"]
    everywhere = attention + first * 3 * width * config["intermediate_size"]
    everywhere += (layers - first) * (config["n_shared_experts"] * expert + experts * width)  # and the router
    active = everywhere + (layers - first) * config["num_experts_per_tok"] * expert
    return everywhere + (layers - first) * experts * expert + embedding, active


def training_hours(config: dict, gpus: int) -> float:
    _, active = count_weights(config)
    attention = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    flops = 6 * (active * TOKENS_OF_A_ROW + attention * SQUARED) * ROWS * PASSES
    used = USED["mixture" if "n_routed_experts" in config else "dense"]
    return flops / (gpus * used * CARD) / 3600


def evaluation_hours(benchmark: str, tools: bool) -> float:
    """Of one model, on one server."""
    conversations, with_tools, without = TOKENS[benchmark]
    generated = conversations * (with_tools if tools else without)
    return (generated / RATE + LOADING) / 3600


def server_gpus(recipe: str) -> int:
    arguments = yaml.safe_load((ROOT / "recipes" / recipe / "eval.yaml").read_text())["vllm_args"]
    found = re.search(r"--tensor-parallel-size (\d+)", arguments)
    return int(found[1]) if found else 1


def time_of(step: str, recipe: str, nodes: int) -> str:
    """What --plan prints below a step; "" where it is only a matter of the network or of seconds."""
    if step == "training":
        config = json.loads((ROOT / "recipes" / recipe / "config.json").read_text())
        gpus = 8 * nodes
        hours = training_hours(config, gpus)
        return told(hours, gpus)
    if found := re.fullmatch(r"(base|tuned)-(tools|no_tools)(?:-(.+))?", step):
        hours = evaluation_hours(found[3] or "agencybench", found[2] == "tools")
        gpus = server_gpus(recipe)
        return told(hours, gpus)
    return ""


def told(hours: float, gpus: int) -> str:
    time = f"{60 * hours:,.0f} min" if hours < 2 else f"{hours:,.1f} h"
    return f"about {time} on {gpus} H100, {hours * gpus:,.1f} GPU h, calculated"


def all_steps() -> list[str]:
    arms = ["base-tools", "base-no_tools", "tuned-tools", "tuned-no_tools"]
    others = [name for name in TOKENS if name != "agencybench"]
    steps = ["training", *arms]
    for arm in arms:
        steps += [f"{arm}-{name}" for name in others if "tau2" not in name or "no_tools" in arm]
    return steps


def main(options) -> None:
    if not (ROOT / "recipes" / options.recipe / "config.json").exists():
        print(f"cost.py: no recipes/{options.recipe}/config.json", file=sys.stderr)
        sys.exit(2)
    for step in [options.step] if options.step else all_steps():
        text = time_of(step, options.recipe, options.nodes)
        if text:
            print(text if options.step else f"{step:28} {text}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipe", help="a folder of recipes/, e.g. qwen3-8b")
    parser.add_argument("nodes", type=int, help="of 8 GPUs")
    parser.add_argument("--step", help="of run.sh")
    main(parser.parse_args())
