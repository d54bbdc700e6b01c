r"""Writes the untrained policy of the examples: a tokenizer and a random Qwen3 of 0.3 M parameters.

    python examples/workers/make_policy.py --out DIR [--seed 1]

As in the small world (examples/smallworld/make_tiny_model.py): byte-level BPE without a split into
words, plus one added token for every number, name, fixed phrase and line of a system prompt, so
that copying a number is a one-token operation and a prompt of a thousand letters costs a dozen
tokens.

Invariants:
* the role headers ("assistant\n") are tokens of their own, hence tokenizing a conversation turn by
  turn gives the same ids as tokenizing it at once;
* VOCAB_SIZE is odd, hence tensor parallelism has to pad the vocabulary.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import texts as tx

VOCAB_SIZE = 837
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

ENGLISH = (
    "The tool answered with an error because the arguments are not what it expects. Please call"
    " one of the tools that are listed above, with the right server, and try again. Traceback "
    "(most recent call last): NameError: name is not defined. ZeroDivisionError: division by zero."
    " You are a sub-agent that works on a part of a larger task. Give a detailed answer with the "
    "information that supports it, and keep the main task in mind. Select count sum from where and "
    "or order by limit group by; the query returned no rows, the table has these columns."
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    # About 1 / sqrt(hidden_size): at the usual 0.02 so narrow a model starts out too flat to learn.
    "initializer_range": 0.1,
}


def added_tokens() -> list[str]:
    """Every text that is one token: phrases, relations and names."""
    names = (*tx.NUMBERS, *tx.PRODUCTS, *tx.COMPANIES, *tx.CITIES, *tx.PEOPLE)
    return list(dict.fromkeys([*tx.prompt_pieces(), *tx.PHRASES, *names]))


def make_tokenizer():
    """Trains the BPE and adds the fixed tokens; returns a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    fixed = added_tokens()
    specials = [END_OF_TEXT, IM_START, IM_END]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    # What the added tokens leave over is mostly English: error replies, and prompts that a recipe
    # has changed.
    texts = [ENGLISH, *(text for name in tx.EXAMPLES for text in tx.system_prompts(name))]
    pieces = [piece for text in texts for piece in re.findall(r" ?\w+|[^\w]+", text)]
    bpe.train_from_iterator(
        pieces,
        trainers.BpeTrainer(
            # Digits are bytes as well.
            vocab_size=VOCAB_SIZE - sum(len(token) > 1 for token in fixed),
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in fixed])
    size = bpe.get_vocab_size()
    if size != VOCAB_SIZE:
        raise ValueError(
            f"the tokenizer has {size} entries, expected {VOCAB_SIZE}: adjust VOCAB_SIZE"
        )
    return bpe


def write_model(out: Path, seed: int) -> None:
    """Writes tokenizer and random weights below `out`."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), eos_token=IM_END, pad_token=END_OF_TEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **MODEL,
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters())} parameters in {out}")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_model(args.out, args.seed)


if __name__ == "__main__":
    main()
