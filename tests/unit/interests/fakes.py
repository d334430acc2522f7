"""Backends with a script instead of a model, and a workspace with the stages that the interests stage reads."""

import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pyarrow as pa

from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.config import ConfigModel, runtime
from distributed_mi.core.registry import resolve
from distributed_mi.interests.backends.base import (
    Backend,
    BackendContext,
    BackendDeadError,
    Request,
    Response,
)

NUM_ITEMS = 40


class ScriptedBackend(Backend):
    """Names the first two items of each prompt as one interest, except for the users in `Config`."""

    in_process = True

    class Config(ConfigModel):
        """Users whose prompts go wrong, and how."""

        poison: tuple[int, ...] = ()
        """An exception for the whole batch."""
        kill: tuple[int, ...] = ()
        """SIGKILL to the own process."""
        kill_once_at: int = runtime(-1)
        """User at whom the process is killed, but only the first time."""
        dead: tuple[int, ...] = ()
        """`BackendDeadError`."""
        prose: tuple[int, ...] = ()
        """An answer that is not JSON, unless the history is short."""
        always_prose: tuple[int, ...] = ()
        """An answer that is not JSON."""
        truncate: tuple[int, ...] = ()
        """A truncated answer with one complete interest, unless the budget is the larger one."""
        always_truncate: tuple[int, ...] = ()
        """A truncated answer with one complete interest."""
        refuse: tuple[int, ...] = ()
        """A response with an error, unless the history is short."""
        none: tuple[int, ...] = ()
        """An empty list of interests."""
        hang: tuple[int, ...] = ()
        """No answer for a minute, the first time."""
        always_hang: tuple[int, ...] = ()
        """No answer for a minute."""
        too_long: tuple[int, ...] = ()
        """A response with an error."""
        delay_s: float = runtime(0.0)
        """Seconds that each batch takes."""
        log: str = runtime("")
        """Directory in which every answered user leaves a file with one `x` for each answer."""

    calls: list[list[int]]

    def __init__(self, config: Config, context: BackendContext) -> None:
        super().__init__(config, context)
        self.calls = []

    @classmethod
    def model_of(cls, config: Config) -> str:
        return "scripted-1"

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        users = [r.user_index for r in requests]
        self.calls.append(users)
        c = self.config
        if set(users) & set(c.kill):
            os.kill(os.getpid(), signal.SIGKILL)
        if c.kill_once_at in users and self._first_time("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if set(users) & set(c.dead):
            raise BackendDeadError("the engine is gone")
        if set(users) & set(c.poison):
            raise ValueError("bad prompt in the batch")
        if set(users) & set(c.hang) and self._first_time("hung"):
            time.sleep(60)
        if set(users) & set(c.always_hang):
            time.sleep(60)
        time.sleep(c.delay_s)
        if c.log:
            for user in users:
                with open(Path(c.log) / f"{user}.user", "a", encoding="utf-8") as stream:
                    stream.write("x")
        return [self._respond(r) for r in requests]

    def _first_time(self, what: str) -> bool:
        """Whether no process has been here before; remembers it on disk."""
        try:
            (Path(self.config.log) / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _respond(self, request: Request) -> Response:
        c, user = self.config, request.user_index
        ids = [i.item_index for i in request.exemplar.history[:2]]
        interests = [
            {"text": f"interest of {user}", "item_ids": ids},
            {"text": "second", "item_ids": [ids[0]]},
        ]
        text, finish = json.dumps({"interests": interests}), "stop"
        short = len(request.exemplar.history) <= 3
        if user in c.too_long or (user in c.refuse and not short):
            return Response(user, num_prompt_tokens=9, finish_reason="error", error="prompt too long")
        if user in c.always_prose or (user in c.prose and not short):
            text = "I would say that this person likes things."
        elif user in c.none:
            text = '{"interests": []}'
        elif user in c.always_truncate or (user in c.truncate and request.max_answer_tokens < 1000):
            text, finish = text[: text.index("second") + 3], "length"
        return Response(user, text, num_prompt_tokens=10, num_answer_tokens=5, finish_reason=finish)  # type: ignore[arg-type]


class RemoteScriptedBackend(ScriptedBackend):
    """The same on Ray actors."""

    in_process = False

    @classmethod
    def ray_actor_options(cls, config: ScriptedBackend.Config) -> dict[str, float]:
        return {"num_cpus": 0.5}


SCRIPTED = "tests.unit.interests.fakes:ScriptedBackend"
REMOTE = "tests.unit.interests.fakes:RemoteScriptedBackend"


def encode(texts: Sequence[str]) -> np.ndarray:
    """Vectors of length and first letter: equal texts get equal vectors."""
    return np.array([[len(t), ord(t[0]), 1.0] for t in texts], dtype=np.float32).reshape(-1, 3)


def no_ray() -> None:
    """For runs that must not start Ray."""
    raise AssertionError("Ray was started")


def make_workspace(path: Path, *, num_users: int = 10, history: int = 6) -> Workspace:
    """A workspace whose stages prepare, embed and exemplars are complete; every second user is an exemplar.

    Histories of several items differ, of single ones they repeat after `NUM_ITEMS` users.
    """
    workspace = Workspace(str(path))
    prepare = workspace.stage("prepare").open(StageKey("prepare", {}, {"n": num_users}))
    items = [
        {
            "item_index": i,
            "item_id": f"B{i:03d}",
            "title": None
            if i == 7
            else f"{['jazz', 'noir', 'space'][i % 3]} album number {'abcdefghij'[i % 10]}",
            "brand": None,
            "categories": ["Shop", ["Music", "Books", "Film"][i % 3]] if i % 5 else [],
            "num_events": 5,
            "num_train_events": 5,
        }
        for i in range(1, NUM_ITEMS + 1)
    ]
    users = [
        {
            "user_index": u,
            "user_id": f"U{u}",
            "item_indices": [1 + (u + (3 + u // NUM_ITEMS) * j) % NUM_ITEMS for j in range(history)],
            "timestamps": list(range(history)),
            "num_history": history,
        }
        for u in range(num_users)
    ]
    prepare.write_table("catalogue/part-0.parquet", _table(items, "catalogue"), "catalogue")
    prepare.write_table("sequences/train/part-0.parquet", _table(users, "sequences"), "sequences")
    prepare.commit(rows={"items": NUM_ITEMS, "train": num_users})
    workspace.stage("embed").open(StageKey("embed", {}, {})).commit(rows={})
    chosen = users[::2]
    rows = [
        {"cluster": c, "user_index": u["user_index"], "user_id": u["user_id"], "num_users": 2}
        for c, u in enumerate(chosen)
    ]
    exemplars = workspace.stage("exemplars").open(StageKey("exemplars", {}, {"n": num_users}))
    exemplars.write_table("exemplars/part-0.parquet", _table(rows, "exemplars"), "exemplars")
    exemplars.commit(rows={"exemplars": len(rows)})
    return workspace


def _table(rows: list[dict], name: str) -> pa.Table:
    return pa.Table.from_pylist(rows, schema.TABLES[name])


def answers_per_user(log: Path) -> dict[int, int]:
    """How often `ScriptedBackend` answered each user, over all processes that wrote to `log`."""
    return {int(p.stem): len(p.read_text()) for p in log.glob("*.user")}


class BrokenBackend(RemoteScriptedBackend):
    """Cannot be made."""

    def __init__(self, config: ScriptedBackend.Config, context: BackendContext) -> None:
        raise OSError("no weights here")


class HugeBackend(RemoteScriptedBackend):
    """Fits on no machine."""

    @classmethod
    def ray_actor_options(cls, config: ScriptedBackend.Config) -> dict[str, float]:
        return {"num_cpus": 1000}


_HELD: dict[str, Backend] = {}


class InOtherProcess:
    """A backend in a process of its own: an engine leaves threads, environment and a process group behind."""

    def __init__(self, name: str, config: ConfigModel, context: BackendContext, process: Executor) -> None:
        self.config, self._process = config, process
        values = config.model_dump(mode="json")
        self.model_id, self.identity = process.submit(_hold, name, values, context).result(timeout=300)

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        return self._process.submit(_ask, requests).result(timeout=300)


def _hold(name: str, values: dict, context: BackendContext) -> tuple[str, dict]:
    cls = resolve("backend", name)
    _HELD["backend"] = backend = cls(cls.Config(**values), context)
    return backend.model_id, backend.identity


def _ask(requests: Sequence[Request]) -> list[Response]:
    return _HELD["backend"].generate(requests)
