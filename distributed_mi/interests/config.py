"""Configuration of the interests stage."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from distributed_mi.core.config import Component, ConfigModel, runtime


class BackendChoice(Component):
    """Which backend answers, with its own fields beside the name."""

    kind: ClassVar[str] = "backend"

    name: str = "keyphrase"
    """`keyphrase` (no language model, always available), `vllm` (an engine in every actor), `openai_http` (any
    OpenAI-compatible server) or `precomputed` (answers from a file)."""


class Prices(ConfigModel):
    """Prices in one currency; what is not given costs nothing."""

    input_per_million: NonNegativeFloat = 0.0
    """A million tokens of prompts."""
    cached_input_per_million: NonNegativeFloat | None = None
    """A million tokens of prompts that the backend had cached. None: as other tokens of prompts."""
    output_per_million: NonNegativeFloat = 0.0
    """A million tokens of answers."""
    engine_hour: NonNegativeFloat = 0.0
    """An hour of one engine (actor), loading and idling included."""
    kilowatt_hour: NonNegativeFloat = 0.0
    """A kilowatt-hour, where the device reports its energy."""
    currency: str = "USD"
    """Name of the currency."""


class InterestsConfig(ConfigModel):
    """How the interests of the exemplar users are asked for, checked and stored."""

    backend: BackendChoice = BackendChoice()
    """What answers the prompts; the other keys of the table are the fields of the chosen backend."""
    template: Literal["paper", "categories", "language"] = "paper"
    """Wording of the prompt. `paper` has EIMF's three parts (announcement, list of items, task), `categories` also asks
    for the category of each interest, `language` says which language the interests are to be written in."""
    language: str = Field(default="English", pattern=r"^[A-Za-z][A-Za-z ()-]{0,39}$")
    """Language of the interests with the template `language`."""
    max_interests: int = Field(default=20, ge=1, le=100)
    """Interests kept per exemplar; EIMF keeps 20."""
    max_interest_chars: int = Field(default=120, ge=8)
    """Longest text of one interest, in characters; part of the schema that the answer is held to."""
    same_script: bool = True
    """Leave out interests in a script that neither a title of the history nor Latin is written in. Without effect with
    the template `language`."""
    max_items_per_interest: PositiveInt = 10
    """Item ids that an interest may cite as support in a model's answer."""
    max_history: PositiveInt = 50
    """Items of the history in the prompt, newest last; a repeated item stands once, at its latest place."""
    short_history: PositiveInt = 10
    """Items in the prompt of the retry with a shorter history."""
    max_title_chars: int = Field(default=100, ge=8)
    """Longest item title in a prompt, in characters."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt, in tokens: the oldest items are left out until it fits. None: only `max_history` limits it."""
    max_answer_tokens: PositiveInt = 500
    """Tokens an answer may have at first."""
    larger_answer_tokens: PositiveInt = 1024
    """Tokens an answer may have in the retry of a truncated one."""
    max_retries: int = Field(default=3, ge=0, le=3)
    """Retries by the model (continued, larger budget, shorter history) before the keyphrase backend answers instead."""
    max_failed_fraction: float = runtime(0.01, ge=0.0, le=1.0)
    """Share of exemplars, 0 to 1, that may end in the keyphrase fallback; above it the stage stops."""
    commit_every: PositiveInt = runtime(64)
    """Answers per committed shard; a killed run loses at most these and those in flight."""
    num_actors: PositiveInt | tuple[PositiveInt, PositiveInt] = runtime(1)
    """Ray actors, each with its own backend; [least, most]: more start while prompts wait and the cluster has room. Not
    used by backends that run in this process (keyphrase)."""
    in_flight: PositiveInt | None = runtime(None)
    """Exemplars in an actor at a time. None: as many as its backend needs to stay busy."""
    max_actor_restarts: int = runtime(10, ge=0)
    """Actors that may die one after the other, without an answer in between, before the stage stops."""
    cache: str | None = runtime(None)
    """Directory or URL of an answer cache that workspaces share: no prompt is paid for twice. None: none."""
    prices: Prices = runtime(Prices())
    """What tokens and engines cost, for the ledger."""
    start_timeout_s: PositiveFloat = runtime(900.0)
    """Seconds to wait for a first actor to be placed and to load its model before the stage stops."""
    answer_timeout_s: PositiveFloat = runtime(3600.0)
    """Seconds without an answer after which an actor is replaced and what it had is sent again."""
