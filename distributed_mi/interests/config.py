"""Configuration of the interests stage."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from distributed_mi.core.config import Component, ConfigModel, runtime


class BackendChoice(Component):
    """Which backend answers, with its own fields beside the name."""

    kind: ClassVar[str] = "backend"

    name: str = "keyphrase"
    """`keyphrase` (no language model, always available), `vllm` (an engine in every actor), `openai_http` (any
    OpenAI-compatible server) or `precomputed` (answers from a file)."""


class InterestsConfig(ConfigModel):
    """How the interests of the exemplar users are asked for, checked and stored."""

    backend: BackendChoice = BackendChoice()
    """What answers the prompts; the other keys of the table are the fields of the chosen backend."""
    template: Literal["paper"] = "paper"
    """Wording of the prompt; `paper` has EIMF's three parts (announcement, list of items, task)."""
    max_interests: int = Field(default=20, ge=1, le=100)
    """Interests kept per exemplar; EIMF keeps 20."""
    max_interest_chars: int = Field(default=120, ge=8)
    """Longest text of one interest, in characters; part of the schema that the answer is held to."""
    max_items_per_interest: PositiveInt = 10
    """Item ids that an interest may cite as support in a model's answer."""
    max_history: PositiveInt = 50
    """Items of the history in the prompt, newest last; a repeated item stands once, at its latest place."""
    short_history: PositiveInt = 10
    """Items in the prompt of the retry with a shorter history."""
    max_title_chars: int = Field(default=100, ge=8)
    """Longest item title in a prompt, in characters."""
    max_answer_tokens: PositiveInt = 500
    """Tokens an answer may have at first."""
    larger_answer_tokens: PositiveInt = 1024
    """Tokens an answer may have in the retry of a truncated one."""
    max_retries: int = Field(default=2, ge=0, le=2)
    """Retries by the model (larger budget, shorter history) before the keyphrase backend answers instead."""
    max_failed_fraction: float = runtime(0.01, ge=0.0, le=1.0)
    """Share of exemplars, 0 to 1, that may end in the keyphrase fallback; above it the stage stops."""
    commit_every: PositiveInt = runtime(64)
    """Exemplars per committed shard, which is also what one engine answers at a time; a killed run loses at
    most the shards under way."""
    num_actors: PositiveInt = runtime(1)
    """Ray actors, each with its own backend. Not used by backends that run in this process (keyphrase)."""
    in_flight: PositiveInt = runtime(2)
    """Shards sent to an actor at a time; 2 keeps it busy while the driver writes the one before."""
    max_actor_restarts: int = runtime(10, ge=0)
    """Actors that may die and be replaced in one run before the stage stops."""
    start_timeout_s: PositiveFloat = runtime(900.0)
    """Seconds to wait for a first actor to be placed and to load its model before the stage stops."""
    answer_timeout_s: PositiveFloat = runtime(3600.0)
    """Seconds for one shard; an actor that takes longer is replaced and the shard is sent again."""
