"""The encoder pool on a local Ray: the vectors of one process for any number of actors; nothing lost or doubled."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distributed_mi.core.errors import InputError, StageError
from distributed_mi.text import stage
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.encoder import TextEncoder
from tests.tiny_bert import make_encoder

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def texts(count: int) -> list[str]:
    words = ["red", "soap", "nail", "blue", "stick"]
    return [" ".join(words[(i + j) % 5] for j in range(1 + i % 7)) + f" {i}" for i in range(count)]


@pytest.mark.parametrize("num_actors", [None, 2])
def test_pool_gives_what_one_process_gives(
    ray_local: None, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, num_actors: int | None
) -> None:
    monkeypatch.setattr(stage, "IN_PROCESS_TEXTS", 10)
    config = EmbedConfig(model=str(tiny_bert), num_actors=num_actors, batch_size=16)
    started: list[int] = []
    asked = [*texts(150), *texts(20)]
    found = stage.encode_texts(config, asked, scale=2.0, start_ray=lambda: started.append(1))
    assert started == [1]
    np.testing.assert_allclose(found, 2.0 * TextEncoder(config)(asked), atol=1e-5)


def test_an_error_of_an_actor_comes_out_as_itself(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_encoder(tmp_path / "headless", pooler=False)
    monkeypatch.setattr(stage, "IN_PROCESS_TEXTS", 10)
    with pytest.raises(InputError, match="lacks 2 weights"):
        stage.encode_texts(
            EmbedConfig(model=str(folder), pooling="pooler"), texts(20), scale=1.0, start_ray=lambda: None
        )


def test_the_shape_of_the_pool_fits_the_nodes(ray_local: None) -> None:
    assert stage._pool_shape(EmbedConfig()) == (1, 8)
    assert stage._pool_shape(EmbedConfig(num_actors=3)) == (3, 2)
    assert stage._pool_shape(EmbedConfig(num_actors=20)) == (20, 1)


@pytest.mark.parametrize(
    ("ids", "message"), [([0], "1 of 2 texts did not come back"), ([0, 1, 1], "1 came back more")]
)
def test_a_lost_or_doubled_text_stops_the_stage(ids: list[int], message: str) -> None:
    vectors = stage.vector_column(np.ones((len(ids), 3), dtype=np.float32))
    batch = pa.table({"text_id": ids, "vector": vectors, "revision": ["r"] * len(ids)})
    with pytest.raises(StageError, match=message):
        stage._collect(EmbedConfig(), [batch], 2, lambda count: None)
