"""A tiny BERT with random weights and its tokenizer, made on the spot: no network, a fraction of a second."""

from pathlib import Path

WORDS = (
    "red",
    "green",
    "blue",
    "lip",
    "stick",
    "shampoo",
    "soap",
    "nail",
    "polish",
    "item",
    "user",
    ".",
    ",",
    "the",
    "of",
)


def make_encoder(folder: Path, *, hidden: int = 32, pooler: bool = True) -> Path:
    """Save a two-layer BERT of `hidden` width with a WordPiece vocabulary of a few words and all letters and digits."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *WORDS, *letters, *(f"##{c}" for c in letters)]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder, safe_serialization=True)
    return folder
