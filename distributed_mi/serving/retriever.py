"""Recommendations from behaviour alone: a history in, the best items out, each with the interest that found it.

Shapes:  K interests, L history, D width, n depth of each interest's list.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import CheckpointError, InputError, WorkspaceError
from distributed_mi.core.registry import resolve
from distributed_mi.models.base import HistoryBatch, Recommender
from distributed_mi.serving.catalogue import Catalogue, KnownUser, NamedItem, find_user
from distributed_mi.serving.indexes.base import ItemIndex, Vectors
from distributed_mi.serving.text import add_row, clean, table, to_text


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item_index: int
    item_id: str
    title: str
    score: float
    """Largest inner product over the interests; events in training for the popularity answer."""
    interest: int | None
    """Which interest gave that score, from 0; None for the popularity answer."""

    @property
    def name(self) -> str:
        """The title, or else the id."""
        return self.title or self.item_id


POPULARITY_RUN = "this is the popularity list: the same for every history, but for items that it has already"
"""What is said of a run whose model is not personal."""


@dataclass(frozen=True)
class Answer:
    """What a request gets."""

    run: str
    user_id: str | None
    split: str | None
    """Where the user's sequence stands, for a known user."""
    source: str
    """`model`, or `popularity` for a history without a known item and for runs that rank by popularity."""
    history: list[NamedItem]
    """The whole known history, newest last."""
    unknown_items: list[str]
    """Item ids of the request that the catalogue does not hold; they were skipped."""
    items: list[Recommendation]
    train_user_index: int | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: v for k, v in asdict(self).items() if k != "train_user_index"}


@dataclass(frozen=True)
class Interests:
    """What the model reads from one history."""

    vectors_KD: Vectors
    attention_KL: Vectors | None
    """Weights over `items`, rows summing to 1; None for a model without such weights."""
    items: list[int]
    """The part of the history that the model reads: its newest L items."""


class Retriever:
    """A trained run, ready to answer. Open it once and ask it often."""

    def __init__(
        self, workspace: Workspace, run_name: str, model: Recommender, catalogue: Catalogue, index: ItemIndex
    ) -> None:
        self.workspace, self.run_name = workspace, run_name
        self.model, self.catalogue, self.index = model, catalogue, index

    @classmethod
    def open(
        cls, workspace: Workspace, run_name: str, load: Callable[..., Recommender], *, index: str = "exact"
    ) -> Self:
        """Load a run into this process.

        Args:
            workspace: with complete prepare and `train/<run_name>` stages.
            run_name: which training run.
            load: `training.checkpoint.load_model`.
            index: registry name of the item index.

        Raises:
            WorkspaceError: a stage is missing, or the run was trained on other data.
            CheckpointError: model and catalogue do not have the same items.
            UnknownNameError: no such index.
        """
        prepare = workspace.stage("prepare").require()
        train = workspace.stage(f"train/{run_name}").require()
        if train.inputs.get("prepare") != prepare.identity:
            raise WorkspaceError(
                f"run {run_name} was trained on other data than the workspace now holds (prepare has run again "
                "since): run `distributed-mi train CONFIG` first"
            )
        catalogue = Catalogue.read(workspace)
        model = load(workspace.fs, workspace.stage(f"train/{run_name}").path("model")).eval()
        if model.items.num_rows != catalogue.num_items + 1:
            raise CheckpointError(
                f"run {run_name} has vectors for {model.items.num_rows - 1:,} items, the catalogue "
                f"{catalogue.num_items:,}: run `distributed-mi train CONFIG` again"
            )
        owner = resolve("index", index)
        made: ItemIndex = owner(owner.Config(), model.items.dim)
        ids, tensors = model.items.state()
        real = ids > 0
        made.add(ids[real].numpy(), tensors["weight"].detach()[real].numpy())
        return cls(workspace, run_name, model, catalogue, made)

    def recommend(
        self,
        *,
        user_id: str | None = None,
        item_ids: Sequence[str] | None = None,
        top: int = 10,
        exclude_seen: bool = True,
    ) -> Answer:
        """Recommend for a known user, whose whole sequence is the history, or for a history of raw item ids.

        Args:
            user_id: a user of any split.
            item_ids: a history instead, oldest first; unknown ids are skipped and reported.
            top: how many items.
            exclude_seen: leave out the items of the history.

        Raises:
            UnknownUserError: no such user; names near ones.
            InputError: neither or both of user and items, or top below 1.
        """
        if (user_id is None) == (item_ids is None):
            raise InputError("recommend: give either a user id or item ids")
        if top < 1:
            raise InputError(f"recommend: top is {top}, must be at least 1")
        if user_id is not None:
            user = find_user(self.workspace, user_id)
            return self._answer(user.items, top, exclude_seen, user=user)
        history, unknown = self.catalogue.find(list(item_ids or ()))
        return self._answer(history, top, exclude_seen, unknown=unknown)

    def _answer(
        self,
        history: list[int],
        top: int,
        exclude_seen: bool,
        *,
        user: KnownUser | None = None,
        unknown: Sequence[str] = (),
    ) -> Answer:
        items = self.rank(history, top, exclude_seen) if history else self._popular(top)
        return Answer(
            run=self.run_name,
            user_id=user.user_id if user else None,
            split=user.split if user else None,
            source="model" if history and self.model.personal else "popularity",
            history=[self.catalogue.item(i) for i in history],
            unknown_items=list(unknown),
            items=items,
            train_user_index=user.train_user_index if user else None,
        )

    def interests(self, history: Sequence[int]) -> Interests:
        """Encode one history.

        Args:
            history: item indices, newest last; at least one.
        """
        recent = list(history)[-self.model.max_history :]
        pad = self.model.max_history - len(recent)
        ids = torch.tensor([[0] * pad + recent], dtype=torch.int64)
        with torch.no_grad():
            state = self.model.encode(HistoryBatch(ids, ids > 0))
        attention = state.attention_BKL
        return Interests(
            vectors_KD=state.interests_BKD[0].float().numpy(),
            attention_KL=None if attention is None else attention[0, :, pad:].float().numpy(),
            items=recent,
        )

    def rank(self, history: Sequence[int], top: int, exclude_seen: bool) -> list[Recommendation]:
        """The `top` items with the largest inner product over the interests of a history.

        Lists as deep as `top` plus the seen items are merged by maximum, so the result is exact when the index is.
        """
        seen = set(history) if exclude_seen else set()
        vectors_KD = self.interests(history).vectors_KD
        scores_Kn, ids_Kn = self.index.search(vectors_KD, min(top + len(seen), self.index.num_items))
        interest_Kn = np.broadcast_to(np.arange(len(ids_Kn))[:, None], ids_Kn.shape)
        scores, ids, interests = scores_Kn.ravel(), ids_Kn.ravel(), interest_Kn.ravel()
        chosen: list[Recommendation] = []
        done = {0, *seen}
        for place in np.lexsort((interests, ids, -scores)):
            item_index = int(ids[place])
            if item_index not in done:
                done.add(item_index)
                item = self.catalogue.item(item_index)
                score = float(scores[place])
                interest = int(interests[place]) if self.model.personal else None
                chosen.append(Recommendation(item_index, item.item_id, item.title, score, interest))
        return chosen[:top]

    def _popular(self, top: int) -> list[Recommendation]:
        found = self.catalogue.most_popular(top, without=set())
        named = [(self.catalogue.item(i), events) for i, events in found]
        return [Recommendation(i.item_index, i.item_id, i.title, float(n), None) for i, n in named]


def render(answer: Answer, *, as_json: bool = False) -> str:
    """Text for the terminal, or JSON."""
    if as_json:
        return json.dumps(answer.to_dict(), indent=2)
    return to_text(*heading(answer), items_table(answer))


def heading(answer: Answer) -> list[str]:
    """Lines above the list: whose history, what was skipped, where the answer comes from."""
    who = (
        f"user {clean(answer.user_id)} ({answer.split} split)" if answer.user_id else "a history of item ids"
    )
    lines = [
        f"{len(answer.items)} items for {who}, run {answer.run}, {len(answer.history):,} items of history"
    ]
    if answer.history:
        lines.append("newest: " + "; ".join(clean(i.name, 50) for i in answer.history[-3:][::-1]))
    if answer.unknown_items:
        lines.append(
            "skipped, not in the catalogue: " + ", ".join(clean(i, 40) for i in answer.unknown_items)
        )
    if answer.source == "popularity":
        why = (
            POPULARITY_RUN
            if answer.history
            else "no known item in the history: these are the most popular items"
        )
        lines.append(why)
    return [*lines, ""]


def items_table(answer: Answer) -> Any:
    """The list as a rich table."""
    score = "events" if answer.source == "popularity" else "score"
    made = table("rank", "title", "item", score, "interest", numbers=("rank", score, "interest"))
    for rank, item in enumerate(answer.items, 1):
        interest = "" if item.interest is None else str(item.interest + 1)
        value = f"{item.score:.0f}" if answer.source == "popularity" else f"{item.score:.3f}"
        add_row(made, str(rank), clean(item.title) or "(no title)", clean(item.item_id, 40), value, interest)
    return made
