"""Folders of small tokenizers with the real chat templates of GLM-4.5, Qwen3 and Qwen2.5: no download.

    python recipes/label_doctor/make_tokenizers.py /tmp/tokenizers

The templates are those that TRL ships (its copies of the models' own); special tokens, the added ones that
are not special, stop tokens and the rule that cuts text into words are the models'; the vocabulary is up to
2,000 tokens learned from rows.jsonl beside this file. config.json is of a tiny model, for those who want one.
"""

import json
import sys
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROWS = Path(__file__).with_name("rows.jsonl")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CALLS = ["<tool_call>", "</tool_call>"]
THOUGHTS = ["<think>", "</think>", "<tool_response>", "</tool_response>"]
KEYS = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"]
GLM_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM_SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *GLM_ROLES]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MODELS = {
    "glm-4.5": {
        "template": "glm4moe.jinja",
        "digits": "{1,3}",
        "special": GLM_SPECIAL,
        "added": CALLS + THOUGHTS + KEYS,
        "stops": ["<|endoftext|>", "<|user|>", "<|observation|>"],
        "config": {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    },
    "qwen3": {
        "template": "qwen3.jinja",
        "digits": "",
        "special": QWEN_SPECIAL,
        "added": CALLS + THOUGHTS,
        "stops": ["<|im_end|>", "<|endoftext|>"],
        "config": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    },
    "qwen2.5": {
        "template": "qwen2_5.jinja",
        "digits": "",
        "special": QWEN_SPECIAL,
        "added": CALLS,
        "stops": ["<|im_end|>", "<|endoftext|>"],
        "config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    },
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
    "torch_dtype": "float32",
}


def learn(model, texts):
    """A tokenizers.Tokenizer: byte-level BPE with the model's special tokens."""
    bpe = Tokenizer(models.BPE())
    words = Regex(WORDS.replace("DIGITS", model["digits"]))
    parts = [
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    for token in model["special"]:
        bpe.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for token in model["added"]:
        bpe.add_tokens([AddedToken(token, special=False, normalized=False)])
    return bpe


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_folder(model, texts, folder):
    folder.mkdir(parents=True, exist_ok=True)
    bpe = learn(model, texts)
    bpe.save(str(folder / "tokenizer.json"))
    stops = [bpe.token_to_id(stop) for stop in model["stops"]]
    tokens = {"eos_token": model["stops"][0], "pad_token": "<|endoftext|>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", kind | tokens)
    size = {"vocab_size": bpe.get_vocab_size(), "eos_token_id": stops[0]}
    write_json(folder / "config.json", TINY | model["config"] | size)
    write_json(folder / "generation_config.json", {"eos_token_id": stops})
    template = files("trl").joinpath("chat_templates", model["template"]).read_text()
    (folder / "chat_template.jinja").write_text(template)


def main():
    if len(sys.argv) != 2:
        sys.exit("make_tokenizers.py: name one folder to write into")
    for name, model in MODELS.items():
        write_folder(model, ROWS.read_text().splitlines(), Path(sys.argv[1], name))
        print(Path(sys.argv[1], name))


if __name__ == "__main__":
    main()
