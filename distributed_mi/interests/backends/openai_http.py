"""Answers of any OpenAI-compatible server: `POST {base_url}/chat/completions`, many requests at a time.

It runs in the process of the stage (`in_process`): all it does is wait, and one event loop in a thread of its own waits
for hundreds of answers as well as for one. So `submit` returns at once, `concurrency` bounds the whole run and not an
actor's share of it, and the key does not leave this machine for other nodes.

What goes wrong, and what is done about it:

    no connection, connection lost, timeout, 408, 409, 429, 5xx    tried again, `max_attempts` times in all
    no connection at the last attempt                              the run stops
    anything else of these at the last attempt                     an error of this prompt
    400, 413, 422, no choice, refused or filtered content, and
    what nobody thought of                                         an error of this prompt
    401, 402, 403, 404, a redirect, an empty account (429),
    a 400 or 422 about a setting, no chat completion on 200        the run stops

Nothing is sent after the run has been stopped; answers that had come are given up first. A wait is drawn at random
below a bound that doubles up to `max_backoff_s` (full jitter); what `Retry-After` asks for is added, within
`max_backoff_s`. A request that waits keeps its place among the `concurrency`: a server in trouble is asked for less.

The key is read from the environment and sent to `base_url` alone: redirects are not followed, proxies and `.netrc` are
not looked at, and it is taken out of everything that the server says before that is logged or stored.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import queue
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import aiohttp
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from distributed_mi.core.config import ConfigModel, runtime
from distributed_mi.core.errors import ConfigError, InputError, StageError
from distributed_mi.interests.backends.base import (
    Backend,
    BackendContext,
    BackendDeadError,
    Request,
    Response,
)
from distributed_mi.interests.sanitize import printable

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 10_000_000
"""Longest answer that is read; a chat completion of a thousand tokens has a few kB."""
_MAX_ERROR_BYTES = 65_536
"""As much of an answer is read when it is only quoted."""
_EXCERPT_CHARS = 200
_CONNECT_TIMEOUT_S = 30.0
_SHORTEST_SECRET = 8
"""Characters of a key below which it is a placeholder ("EMPTY") that may well stand in an answer."""
_WARNING_INTERVAL_S = 10.0
"""Seconds between two lines about requests that are tried again."""
_TRANSIENT = frozenset({408, 409, 429})
_PROMPT_ERRORS = frozenset({400, 413, 422})
_SETTING_CODES = frozenset({"unknown_parameter", "unsupported_parameter", "unsupported_value"})
_SETTING_FIELDS = frozenset({"model", "response_format", "seed", "temperature", "top_p"})
"""Values of `error.code` and `error.param` that speak of what every request holds, not of one prompt."""
_OWN_FIELDS = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "n",
        "seed",
        "stream",
        "temperature",
        "top_p",
    }
)


class OpenAIHttpBackend(Backend):
    """A client of one server; see the module docstring."""

    in_process = True

    class Config(ConfigModel):
        """Server, model, sampling and patience."""

        base_url: str = runtime("http://127.0.0.1:8000/v1")
        """Address of the server up to and without `/chat/completions`. Another address of the same model pays for no
        answer again, so the name of a model has to tell it from others."""
        model: str = Field(min_length=1)
        """Name of the model, as the server knows it."""
        temperature: float = Field(0.0, ge=0.0, le=2.0)
        """0: the most probable token, so that a re-run gives much the same answers."""
        top_p: float = Field(1.0, gt=0.0, le=1.0)
        """Share of the probability that is sampled from; without effect at temperature 0."""
        seed: int = 0
        """Seed of the sampling; many servers promise no more than their best effort."""
        omit: tuple[Literal["temperature", "top_p", "seed"], ...] = ()
        """Fields that are not sent, for models that refuse them (reasoning models take no temperature)."""
        system_prompt: str = ""
        """Text of a system message before the prompt; empty: none."""
        structured: Literal["json_schema", "json_object", "none"] = "json_schema"
        """How the server is held to the answer's form: by its JSON schema, to any JSON object, or not at all."""
        extra_body: dict[str, Any] = Field({})
        """More fields of the request body, such as vLLM's `chat_template_kwargs`. They are stored with the results: no
        secrets here."""
        max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
        """Name under which the limit of the answer is sent; newer OpenAI models want `max_completion_tokens`."""
        api_key_env: str = runtime("OPENAI_API_KEY")
        """Name of the environment variable that holds the key, never the key itself; unset or empty: none is sent."""
        allow_insecure_http: bool = runtime(False)
        """Whether a key may go over plain http to another machine, where anybody on the way can read it."""
        concurrency: PositiveInt = runtime(32)
        """Requests under way at a time, in the whole run."""
        timeout_s: PositiveFloat = runtime(600.0)
        """Seconds for one attempt, from connecting to the last byte of the answer."""
        max_attempts: PositiveInt = runtime(8)
        """Attempts at one prompt before it is given up."""
        backoff_s: NonNegativeFloat = runtime(1.0)
        """Longest wait after the first attempt, in seconds; doubles with each one."""
        max_backoff_s: NonNegativeFloat = runtime(60.0)
        """Longest wait after any attempt, in seconds, also when the server asks for more."""

        # ConfigError is no ValueError, so pydantic lets it through; its own message would quote a password or key.

        @field_validator("base_url")
        @classmethod
        def _is_an_address(cls, value: str) -> str:
            url = _split(value)
            if url is None or url.scheme not in ("http", "https") or not url.hostname:
                raise ConfigError(
                    "base_url of backend openai_http must be an address such as http://127.0.0.1:8000/v1"
                )
            if "@" in url.netloc:
                raise ConfigError(
                    "base_url of backend openai_http must not hold a user name, password or key: it is stored and "
                    "logged. Put the key into an environment variable and name that in api_key_env."
                )
            if url.query or url.fragment:
                raise ConfigError(
                    "base_url of backend openai_http must not have a part behind `?` or `#`: it is stored and logged"
                )
            return value.rstrip("/").removesuffix("/chat/completions").rstrip("/")

        @field_validator("api_key_env")
        @classmethod
        def _is_a_name(cls, value: str) -> str:
            if not re.fullmatch(r"(?:[A-Z_][A-Z0-9_]*)?", value):
                raise ConfigError(
                    "api_key_env of backend openai_http must be the NAME of an environment variable (capital letters, "
                    "digits and _), not the key itself"
                )
            return value

        @field_validator("extra_body")
        @classmethod
        def _adds_only(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
            own = _OWN_FIELDS | ({"response_format"} if info.data.get("structured") != "none" else set())
            if taken := sorted(own & value.keys()):
                raise ValueError(f"must not hold {', '.join(taken)}, which other fields decide")
            json.dumps(value, allow_nan=False)  # raises ValueError or TypeError, which pydantic reports
            return value

    def __init__(self, config: Config, context: BackendContext) -> None:
        super().__init__(config, context)
        # Only the loop's thread touches `_server`, `_tasks`, `_halted`; only the caller's `_users` and `_stopped`.
        self._server = _Server(config, context, read_key(config), sleep=self.sleep, now=self.now)
        self._tasks: set[asyncio.Task[Response]] = set()
        self._halted = False
        self._done: queue.SimpleQueue[Response | StageError] = queue.SimpleQueue()
        self._users: set[int] = set()
        self._stopped: StageError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai_http", daemon=True)
        self._thread.start()
        # Also called when the interpreter ends; the thread does not hold the backend.
        self.close = weakref.finalize(self, _close, self._loop, self._thread, self._server)
        """Ends the thread and the connections; what is under way is dropped."""

    @classmethod
    def model_of(cls, config: Config) -> str:
        """The model's name."""
        return config.model

    @property
    def window(self) -> int:
        """Twice the requests under way, so that the next one is at hand when an answer comes."""
        return 2 * self.config.concurrency

    @property
    def retries(self) -> int:
        """Attempts beyond the first, over all requests so far."""
        return self._server.retries

    def submit(self, request: Request) -> None:
        """Hand one prompt to the event loop; returns at once."""
        self._users.add(request.user_index)
        self._loop.call_soon_threadsafe(self._begin, request)

    def collect(self) -> list[Response]:
        """Answers that have come, once there is one.

        Raises:
            StageError: no request can be answered; says why and what to do. Every later call raises it too.
            BackendDeadError: the thread is gone.
        """
        if not self._users:
            return []
        outcomes = [] if self._stopped else [self._next()]
        with contextlib.suppress(queue.Empty):
            while True:
                outcomes.append(self._done.get_nowait())
        responses = [o for o in outcomes if isinstance(o, Response)]
        self._users -= {r.user_index for r in responses}
        self._stopped = next((o for o in outcomes if isinstance(o, StageError)), self._stopped)
        if self._stopped is not None and not responses:
            raise StageError(*self._stopped.args)
        return responses

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Answer a batch and wait for all of it; `StageError` as in `collect`."""
        for request in requests:
            self.submit(request)
        found: dict[int, Response] = {}
        while len(found) < len(requests):
            found.update((r.user_index, r) for r in self.collect())
        return [found[r.user_index] for r in requests]

    def _next(self) -> Response | StageError:
        while True:
            try:
                return self._done.get(timeout=5.0)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise BackendDeadError("the thread that waits for answers has ended") from None

    def _begin(self, request: Request) -> None:
        """In the loop: start one request."""
        if self._server.stopped:
            return
        task = self._loop.create_task(self._server.answer(request))
        self._tasks.add(task)
        task.add_done_callback(self._deliver)

    def _deliver(self, task: "asyncio.Task[Response]") -> None:
        """In the loop: every request leaves one outcome, except those that are cancelled by the stop of another."""
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._done.put(task.result())
            return
        if self._halted:
            return
        self._halted = True
        self._done.put(StageError(str(error)))  # made anew: the old one's frames hold the request and its key
        for other in self._tasks:
            other.cancel()

    @staticmethod
    async def sleep(seconds: float) -> None:
        """The wait between two attempts; tests put their own here."""
        await asyncio.sleep(seconds)

    @staticmethod
    def now() -> float:
        """Seconds since 1970, to which a date in `Retry-After` is compared."""
        return time.time()

    @classmethod
    def ray_actor_options(cls, config: Any) -> dict[str, Any]:
        """Hardly any CPU, where somebody puts it into an actor nevertheless."""
        return {"num_cpus": 0.1}


def read_key(config: OpenAIHttpBackend.Config) -> str:
    """The key in the environment, or "".

    Raises:
        InputError: it cannot stand in a header, or would go over plain http to another machine.
    """
    key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
    if not key:
        return ""
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(
            f"the environment variable {config.api_key_env} (interests.backend.api_key_env) must hold one key, "
            "printable ASCII without spaces"
        )
    url = urlsplit(config.base_url)
    if url.scheme == "http" and not _is_loopback(url.hostname or "") and not config.allow_insecure_http:
        raise InputError(
            f"the key in {config.api_key_env} would go over plain http to {url.hostname}, where anybody on the way can "
            "read it. Use https in interests.backend.base_url, or set interests.backend.api_key_env to an empty "
            "string if the server wants no key, or interests.backend.allow_insecure_http=true."
        )
    return key


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None when it is none, or has characters that browsers and servers read differently."""
    if re.search(r"[^!-~]|\\", url):
        return None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises ValueError when it is no number
    except ValueError:
        return None
    return parts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, server: "_Server") -> None:
    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await server.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is thread:  # collected as garbage there: nobody may wait for himself
        return
    thread.join(timeout=10.0)
    if not thread.is_alive():
        loop.close()
    if server.retries:
        logger.info("backend openai_http sent %d requests again", server.retries)


class _TryAgainError(Exception):
    """This attempt failed, another may not."""

    def __init__(self, reason: str, *, retry_after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.retry_after, self.unreachable = retry_after, unreachable


class _Server:
    """The other end: one request at a time in, one response out, with every attempt that it takes."""

    def __init__(
        self,
        config: OpenAIHttpBackend.Config,
        context: BackendContext,
        key: str,
        *,
        sleep: Callable[[float], Awaitable[None]],
        now: Callable[[], float],
    ) -> None:
        self._config, self._context = config, context
        self._url = f"{config.base_url}/chat/completions"
        self._key, self._sleep, self._now = key, sleep, now
        self._slots = asyncio.Semaphore(config.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._random = random.Random()
        self._warned = -_WARNING_INTERVAL_S
        self.retries = 0
        self.stopped = False
        """Whether a request failed for a reason that concerns all; no other is sent."""

    async def answer(self, request: Request) -> Response:
        """The response to a request; `StageError` when no request can be answered."""
        async with self._slots:
            if self.stopped:
                raise StageError(f"{self._url} is asked no more")
            try:
                return await self._answer(request)
            except StageError:
                self.stopped = True  # before the place is free for the next one
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {self._quote(str(error))}"
                logger.warning("%s: user %d failed: %s", self._url, request.user_index, text)
                return self._error(request, text)

    async def _answer(self, request: Request) -> Response:
        for attempt in count(1):
            try:
                return await self._attempt(request)
            except _TryAgainError as error:
                failed = error
            if attempt >= self._config.max_attempts:
                break
            wait = self._wait(attempt, failed.retry_after)
            self.retries += 1
            self._warn(attempt, wait, failed)
            await self._sleep(wait)
        attempts = f"after {attempt} attempt{'s' if attempt > 1 else ''}"
        if failed.unreachable:
            raise StageError(
                f"{self._url} cannot be reached {attempts}: {failed}. Start the server, or set "
                "interests.backend.base_url to where it listens."
            )
        return self._error(request, f"{failed} ({attempts})")

    async def close(self) -> None:
        """End the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout_s = self._config.timeout_s
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            headers["Accept-Encoding"] = "identity"  # answers are small, and what is not packed cannot burst
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=self._config.concurrency),
                timeout=aiohttp.ClientTimeout(
                    total=timeout_s, sock_connect=min(_CONNECT_TIMEOUT_S, timeout_s / 2)
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    async def _attempt(self, request: Request) -> Response:
        """Send once. Errors of aiohttp end here: theirs hold the headers of the request, the key among them."""
        data = json.dumps(self._body(request)).encode()
        try:
            async with self._open().post(self._url, data=data, allow_redirects=False) as reply:
                body = await self._read(reply)
                status, reason, headers = reply.status, reply.reason or "", reply.headers
        except aiohttp.ClientConnectorCertificateError as error:
            raise StageError(
                f"{self._url}: the server's certificate is not trusted: {self._quote(str(error))}"
            ) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _TryAgainError(self._quote(str(error)), unreachable=True) from None
        except TimeoutError:
            raise _TryAgainError(f"no answer in {self._config.timeout_s:g} s") from None
        except aiohttp.ClientResponseError as error:  # what came is not HTTP
            raise StageError(
                f"{self._url} does not speak HTTP: {self._quote(error.message)}. Check host, port and http or https in "
                "interests.backend.base_url."
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _TryAgainError(f"connection lost ({type(error).__name__})") from None
        if status == 200:
            return self._completion(request, body)
        return self._refusal(request, status, reason, headers, body)

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        """The body, cut behind the longest that is of use; more is not read."""
        limit = MAX_BODY_BYTES if reply.status == 200 else _MAX_ERROR_BYTES
        body = bytearray()
        async for chunk in reply.content.iter_any():
            body += chunk
            if len(body) > limit:
                reply.close()
                break
        return bytes(body[: limit + 1])

    def _body(self, request: Request) -> dict[str, Any]:
        config = self._config
        messages = [{"role": "user", "content": request.prompt}]
        if config.system_prompt:
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        body: dict[str, Any] = {"model": config.model, "messages": messages, "stream": False}
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
        body |= {name: value for name, value in sampling.items() if name not in config.omit}
        body[config.max_tokens_field] = request.max_answer_tokens
        if config.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif config.structured == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": self._context.answer_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body | config.extra_body

    def _wait(self, attempt: int, retry_after: float | None) -> float:
        longest = self._config.max_backoff_s
        drawn = self._random.uniform(0.0, min(longest, self._config.backoff_s * 2.0 ** min(attempt - 1, 60)))
        return drawn if retry_after is None else min(longest, retry_after + drawn)

    def _warn(self, attempt: int, wait: float, why: _TryAgainError) -> None:
        if time.monotonic() - self._warned < _WARNING_INTERVAL_S:
            return
        self._warned = time.monotonic()
        logger.warning(
            "%s: %s; attempt %d of %d, the next in %.1f s (%d requests sent again so far)",
            self._url,
            why,
            attempt,
            self._config.max_attempts,
            wait,
            self.retries,
        )

    def _completion(self, request: Request, body: bytes) -> Response:
        """Read a chat completion."""
        if len(body) > MAX_BODY_BYTES:
            return self._error(request, f"the answer has more than {MAX_BODY_BYTES:,} bytes")
        text = body.decode("utf-8-sig", "replace")
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            if text.lstrip().startswith("{"):
                raise _TryAgainError(f"broken JSON: {self._quote(text)}") from None
            value = None
        error = value.get("error") if isinstance(value, dict) else None
        if not isinstance(value, dict) or ("choices" not in value and not error):
            raise StageError(
                f"{self._url} answered with something that is no chat completion: {self._quote(text) or 'nothing'}. "
                "Is it an OpenAI-compatible server? Check interests.backend.base_url."
            )
        choices, usage = value.get("choices"), value.get("usage")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return self._choice(request, choices[0], usage)
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and (code in _TRANSIENT or 500 <= code < 600):
            raise _TryAgainError(f"error {code} inside of a 200: {self._quote(text)}")
        return self._error(request, f"the server gave no answer: {self._quote(text)}", usage)

    def _choice(self, request: Request, choice: Mapping[str, Any], usage: Any) -> Response:
        reason, message = choice.get("finish_reason"), choice.get("message")
        message = message if isinstance(message, dict) else {}
        text = _content(message.get("content"))
        if reason == "content_filter":
            return self._error(request, "the server's content filter stopped the answer", usage)
        if not text and isinstance(message.get("refusal"), str):
            return self._error(request, f"the model refused: {self._quote(message['refusal'])}", usage)
        return Response(
            request.user_index,
            text=self._without_key(text),
            finish_reason="length" if reason == "length" else "stop",
            **_token_counts(usage),
        )

    def _refusal(
        self, request: Request, status: int, reason: str, headers: Mapping[str, str], body: bytes
    ) -> Response:
        """Sort a status other than 200; see the table in the module docstring."""
        text = body.decode("utf-8-sig", "replace")
        code, field = _error_details(text)
        said = f"{status} {self._quote(reason)}: {self._quote(text) or 'nothing'}"
        quota = code == "insufficient_quota"
        if (status in _TRANSIENT or status >= 500) and not quota:
            raise _TryAgainError(said, retry_after=seconds_to_wait(headers.get("Retry-After"), self._now()))
        about_setting = code in _SETTING_CODES or field in _SETTING_FIELDS | self._config.extra_body.keys()
        is_page = text.lstrip().startswith("<")
        if status in _PROMPT_ERRORS and not about_setting and not (is_page and status != 413):
            return self._error(request, said)
        raise StageError(
            f"{self._url} answered {said}\n  {self._advice(status, headers, quota=quota, setting=about_setting)}"
        )

    def _advice(self, status: int, headers: Mapping[str, str], *, quota: bool, setting: bool) -> str:
        config = self._config
        if quota or status == 402:
            return "The account behind the key has no credit left."
        if status in (401, 403):
            if self._key:
                return f"The key in the environment variable {config.api_key_env} is not accepted."
            return (
                f"No key was sent: put it into the environment variable {config.api_key_env or 'of your choice'} "
                "(interests.backend.api_key_env)."
            )
        if status == 404:
            return (
                f"Either the server has no model {config.model!r} (interests.backend.model; {config.base_url}/models "
                "lists them), or interests.backend.base_url lacks a part of its path, often /v1."
            )
        if setting:
            return (
                f"The server refuses a setting that every request holds (model {config.model!r}). Change "
                "interests.backend.model, .structured, .omit, .max_tokens_field or .extra_body."
            )
        if 300 <= status < 400:
            target = _split(headers.get("Location", ""))
            place = f" (to {self._quote(target.hostname)})" if target and target.hostname else ""
            return f"Redirects{place} are not followed; set interests.backend.base_url to the final address."
        return "Is it an OpenAI-compatible server? Check interests.backend.base_url."

    def _error(self, request: Request, text: str, usage: Any = None) -> Response:
        return Response(request.user_index, finish_reason="error", error=text, **_token_counts(usage))

    def _quote(self, text: str) -> str:
        """The beginning of what somebody else said, visible and without the key."""
        return printable(
            self._without_key(printable(text[:_MAX_ERROR_BYTES], _MAX_ERROR_BYTES)), _EXCERPT_CHARS
        )

    def _without_key(self, text: str) -> str:
        """Also fit for storing: half of a surrogate pair, which JSON may hold, cannot be written as UTF-8."""
        text = text.encode("utf-8", "replace").decode()
        if len(self._key) >= _SHORTEST_SECRET:
            for form in (self._key, self._key.replace("/", "\\/")):
                text = text.replace(form, "[key]")
        return text


def seconds_to_wait(retry_after: str | None, now: float) -> float | None:
    """Seconds that a header `Retry-After` asks for: a number, or a date; None without one that can be read.

    Args:
        retry_after: value of the header.
        now: seconds since 1970.
    """
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _content(content: Any) -> str:
    """Text of a message; some servers give it in parts."""
    if isinstance(content, list):
        parts = (p.get("text") for p in content if isinstance(p, dict))
        return "".join(p for p in parts if isinstance(p, str))
    return content if isinstance(content, str) else ""


def _token_counts(usage: Any) -> dict[str, Any]:
    """Token fields of a `Response`; 0 where the server does not tell."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    found = {
        "num_prompt_tokens": usage.get("prompt_tokens"),
        "num_answer_tokens": usage.get("completion_tokens"),
        "num_cached_tokens": details.get("cached_tokens"),
    }
    return {name: v if isinstance(v, int) and 0 < v < 1 << 31 else 0 for name, v in found.items()}


def _error_details(text: str) -> tuple[str, str]:
    """`code` and `param` of an error in OpenAI's form, "" where they are missing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "", ""
    error = value.get("error", value) if isinstance(value, dict) else None
    found = (error.get("code"), error.get("param")) if isinstance(error, dict) else ("", "")
    code, field = (v if isinstance(v, str) else "" for v in found)
    return code, field


BACKEND = OpenAIHttpBackend
