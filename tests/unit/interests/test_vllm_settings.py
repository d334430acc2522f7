"""What the vLLM backend asks of the engine, on a stand-in for the library that keeps its arguments."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distributed_mi.core.errors import InputError
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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError(
                "To serve at least one request with the models's max seq len (4096), (8.00 GiB KV cache is needed, "
                "which is larger than the available KV cache memory (4.00 GiB). Based on the available memory, the "
                "estimated maximum model length is 2048."
            ),
            ["estimated maximum model length is 2048", "max_model_len (now 4096)", "kv_cache_gib"],
        ),
        (
            ValueError("No available memory for the cache blocks. Try increasing gpu_memory_utilization"),
            ["No available memory", "max_num_seqs (now 64)"],
        ),
        (OSError("nowhere is not a local folder and is not a valid model identifier"), ["Downloads are off"]),
        (OSError("You are trying to access a gated repo.\nMake sure"), ["gated", "HF_TOKEN"]),
        (RuntimeError("something else"), ["something else"]),
    ],
)
def test_an_engine_that_does_not_start_says_what_to_do(
    engines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["vllm"], "LLM", fail)
    with pytest.raises(InputError) as caught:
        VllmBackend(VllmBackend.Config(model="nowhere"), BackendContext({}, 20, 120))
    for word in ["nowhere", *words]:
        assert word in str(caught.value)
