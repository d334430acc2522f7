"""Configuration of the embed stage."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from distributed_mi.core.config import ConfigModel, runtime

ItemField = Literal["title", "brand", "categories"]


class EmbedConfig(ConfigModel):
    """How item and user texts become vectors."""

    model: str | None = None
    """Hugging Face id or local directory of a BERT-like encoder with safetensors weights. None: the MiniLM-L6-v2
    (384 wide) that the extra `text` installs, without any network."""
    revision: str | None = None
    """Commit, branch or tag of a Hugging Face id. None: its default branch."""
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    """How token states become one vector: mean over real tokens, the first token's state, or the model's own pooler."""
    item_fields: tuple[ItemField, ...] = Field(default=("title",), min_length=1)
    """What an item's text is made of, in this order. The papers read titles only. An item without any of these takes
    its title, else its brand, else its categories, else the text "item <id>"; how often is in the manifest."""
    max_item_tokens: int = Field(default=64, ge=4)
    """Tokens of an item's text, or of an interest's, that are read; the rest is cut off."""
    user_vectors: Literal["mean", "sequence"] = "mean"
    """`mean`: mean of the vectors of a user's items, no further encoder pass. `sequence` (as in EIMF): the user's item
    texts, oldest first, as one text: one encoder pass for each user."""
    max_user_tokens: int = Field(default=256, ge=4)
    """Tokens of a user's text that are read when `user_vectors` is `sequence`."""
    rescale: bool = True
    """Multiply all vectors by one factor so that the median squared distance between a user and the nearest other is 3;
    there a preference of -10 makes about one user in twenty an exemplar, as in EIMF. False: as the encoder gives
    them."""
    batch_size: PositiveInt = runtime(64)
    """Texts in one forward pass, of similar length."""
    num_actors: PositiveInt | None = runtime(None)
    """Encoder actors. None: one on each node, with all its cores as threads, so that the weights are held once."""
    gpus_per_actor: NonNegativeFloat = runtime(0.0)
    """GPUs of each encoder actor; 0 runs on the CPU."""
