"""Texts -> vectors with a BERT-like encoder. Knows no Ray.

Shapes:  B texts of a forward pass, T tokens (padded to the longest of the pass), D width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_mi.core.errors import InputError, MissingDependencyError
from distributed_mi.text import source
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.pooling import pool


class TextEncoder:
    """Loads an encoder once; called with texts, gives un-normalised float32 vectors.

    A text's vector does not depend on the texts beside it (up to float32 rounding): padding is masked, texts are only
    sorted by length so that little of it is needed.

    Args:
        config: model, pooling, token limits, batch size.
        device: torch device. None: a GPU when one is visible, else the CPU.

    Raises:
        MissingDependencyError: transformers or the bundled model is not installed.
        InputError: the model cannot be found, has no safetensors weights, lacks weights, or wants its own code run.
    """

    def __init__(self, config: EmbedConfig, *, device: str | None = None) -> None:
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        where = source.locate(config)
        self.tokenizer, self.model = _load(where, config)
        self.model.to(self.device).eval()
        self.dim = int(self.model.config.hidden_size)
        self.token_limit = int(getattr(self.model.config, "max_position_embeddings", 1 << 20))
        self.revision = _revision(where, self.model)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Encode texts.

        Args:
            texts: any number; an empty text gives the vector of the special tokens alone.
            max_tokens: tokens read of each, special tokens included. None: `max_item_tokens`.
            on_batch: told the number of texts after each forward pass.

        Returns:
            `[len(texts), D]` float32, in the order of `texts`.
        """
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        if not len(texts):
            return vectors
        limit = min(max_tokens or self.config.max_item_tokens, self.token_limit)
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=limit, padding=False, return_attention_mask=False
        )["input_ids"]
        longest_first = sorted(range(len(texts)), key=lambda i: (-len(encoded[i]), i))
        for low in range(0, len(texts), self.config.batch_size):
            chosen = longest_first[low : low + self.config.batch_size]
            vectors[chosen] = self._forward([encoded[i] for i in chosen])
            if on_batch:
                on_batch(len(chosen))
        return vectors

    def _forward(self, token_ids: list[list[int]]) -> np.ndarray:
        batch = self.tokenizer.pad({"input_ids": token_ids}, padding=True, return_tensors="pt")
        batch = {k: v.to(self.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            out = self.model(**batch)
            vectors = pool(
                out.last_hidden_state,
                batch["attention_mask"],
                self.config.pooling,
                getattr(out, "pooler_output", None),
            )
        return vectors.to(torch.float32).cpu().numpy()


def _load(where: str, config: EmbedConfig) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig
        from transformers.utils import logging as transformers_logging
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            'the embed stage needs transformers: pip install "distributed_mi[text]"'
        ) from error
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    try:
        settings, _ = PreTrainedConfig.get_config_dict(where, revision=config.revision)
        source.refuse_code(settings, where)
        model_config = AutoConfig.from_pretrained(where, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model, report = AutoModel.from_pretrained(
            where,
            config=model_config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"embed.model: cannot load {where}: {_first_line(error)}") from error
    _check_complete(report, where, config.pooling)
    return tokenizer, model


def _check_complete(report: Any, where: str, pooling: str) -> None:
    """Weights that the files lack are random: refuse them unless nothing of them reaches the vectors."""
    missing = sorted(report["missing_keys"])
    if pooling != "pooler":
        missing = [m for m in missing if "pooler" not in m.split(".")]
    if missing:
        raise InputError(
            f"embed.model: {where} lacks {len(missing)} weights that pooling {pooling!r} needs, first {missing[0]}"
        )


def _revision(where: str, model: Any) -> str:
    if Path(where).is_dir():
        return source.content_revision(Path(where))
    return str(getattr(model.config, "_commit_hash", None) or "unknown")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
