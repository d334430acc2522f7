"""A language model small enough for tests: a random Qwen2 with a byte-level BPE tokenizer, written as safetensors."""

import json
import random
import re
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = re.findall(
    r"\w+",
    "user likes space opera noir jazz cooking hiking items movies music games interests category history click "
    "sequence name item data preferences phrase strongest first describe support answer JSON",
)


def write_tiny_llm(directory: Path, *, seed: int = 0, max_length: int = 4096) -> Path:
    """Write model and tokenizer; returns the directory. The weights are random: only the schema makes answers valid."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    draw = random.Random(seed)
    corpus = [" ".join(draw.choices(WORDS, k=12)) for _ in range(300)]
    corpus += [
        json.dumps({"interests": [{"text": draw.choice(WORDS), "item_ids": [draw.randrange(100)]}]})
        for _ in range(300)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, safe_serialization=True)
    return directory


if __name__ == "__main__":
    import sys

    sys.stdout.write(f"{write_tiny_llm(Path(sys.argv[1]))}\n")
