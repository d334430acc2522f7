"""The tiny encoder, made once."""

from pathlib import Path

import pytest

from tests.tiny_bert import make_encoder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")
