"""What the vLLM backend asks of the engine, on a stand-in for the library that keeps its arguments."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distributed_mi.interests.backends.base import BackendContext
from distributed_mi.interests.backends.vllm import VllmBackend


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments of every engine that is started."""
    started: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, model: str, **settings: Any) -> None:
            started.append({"model": model, **settings})

        llm_engine = None

        def get_tokenizer(self) -> None:
            return None

    vllm, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.LLM, vllm.SamplingParams = LLM, object  # type: ignore[attr-defined]
    sampling.StructuredOutputsParams = object  # type: ignore[attr-defined]
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    # The real variables would stay in this process, OMP_NUM_THREADS among them.
    monkeypatch.setattr(VllmBackend, "environment", classmethod(lambda cls, config: {}))
    return started


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"revision": "abc"},
        {"gpus_per_engine": 1.0, "allow_download": True},
        {"gpus_per_engine": 2.0, "tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_only_safetensors_are_read_and_no_code_of_a_model_is_run(
    engines: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    config = VllmBackend.Config(model="org/model", **settings)
    VllmBackend(config, BackendContext({}, 20, 100, []))
    [engine] = engines
    assert engine["model"] == "org/model"
    assert engine["load_format"] == "safetensors"
    assert engine["trust_remote_code"] is False
    # The tokenizer of another revision could bring other files than those that were looked at.
    assert engine["revision"] == engine["tokenizer_revision"] == settings.get("revision")


def test_no_setting_can_ask_for_the_code_of_a_model() -> None:
    assert not {"trust_remote_code", "load_format"} & VllmBackend.Config.model_fields.keys()


def test_downloads_are_off_unless_asked_for() -> None:
    offline, online = (
        VllmBackend.environment(VllmBackend.Config(model="m", allow_download=allowed))
        for allowed in (False, True)
    )
    assert (offline["HF_HUB_OFFLINE"], online["HF_HUB_OFFLINE"]) == ("1", "0")
