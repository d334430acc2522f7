"""Why these items: behaviour interests, their items, their names, and where the names come from.

The model reads behaviour only. A behaviour interest is named afterwards: the text vectors of the items it reads
(weighted by its attention) and of the items it recommends are compared with the text vectors of all semantic interests
that the language side wrote, and with those of the user's own exemplar, which the user's training loss saw. One
exemplar rarely covers every interest of a user, so the two can differ, and both are shown. The chain user -> cluster ->
exemplar -> prompt -> answer -> evidence items is shown so that a name can be checked.

Shapes:  K behaviour interests, M semantic interests, L history that the model reads, T text width.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distributed_mi.serving.catalogue import NamedItem
from distributed_mi.serving.indexes.base import Vectors
from distributed_mi.serving.retriever import (
    Answer,
    Interests,
    Recommendation,
    Retriever,
    heading,
    items_table,
)
from distributed_mi.serving.semantics import Exemplar, SemanticInterest, Semantics, cosine, naming_vector
from distributed_mi.serving.text import add_row, clean, table, to_text

_NAMES_SHOWN = 3
"""Semantic interests listed for a behaviour interest."""
_ITEMS_SHOWN = 5
"""History or recommended items printed for a behaviour interest; JSON has all."""
_ANSWER_CHARS = 600
"""Characters of a stored answer that are printed; JSON has all."""


@dataclass(frozen=True)
class HistoryItem:
    """A history item that belongs to a behaviour interest."""

    item: NamedItem
    attention: float
    """Share of the interest that comes from this item."""


@dataclass(frozen=True)
class Name:
    """A semantic interest near a behaviour interest."""

    exemplar_user_index: int
    """Exemplar for whom it was written."""
    interest_index: int
    text: str
    similarity: float
    """Cosine of the text vectors, -1 to 1; below about 0.3 the name hardly fits."""


@dataclass(frozen=True)
class BehaviourInterest:
    """One of the model's K interests."""

    number: int
    """From 0."""
    share: float
    """Share of the recommended items that come from it."""
    names: list[Name]
    """Nearest semantic interests of all exemplars, nearest first; none without the language side."""
    own_names: list[Name]
    """Nearest semantic interests of the user's own exemplar."""
    history: list[HistoryItem]
    """Items that this interest attends to more than the others do, most attended first."""
    recommended: list[Recommendation]


@dataclass(frozen=True)
class Evidence:
    """A semantic interest with the items that support it."""

    interest_index: int
    text: str
    items: list[NamedItem]


@dataclass(frozen=True)
class Chain:
    """Where the names come from."""

    assigned_by: str
    cluster: int
    num_users: int
    exemplar_user_id: str
    similarity: float
    prompt_hash: str
    backend: str
    model: str
    step: str
    answer: str
    evidence: list[Evidence]


@dataclass(frozen=True)
class Explanation:
    """An answer with its reasons."""

    answer: Answer
    interests: list[BehaviourInterest]
    has_attention: bool
    """False when the model has no attention; the history then counts in equal parts."""
    chain: Chain | None
    note: str
    """Why there are no names, if there are none."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "answer": self.answer.to_dict()}


def explain(
    retriever: Retriever,
    *,
    user_id: str | None = None,
    item_ids: Sequence[str] | None = None,
    top: int = 10,
    exclude_seen: bool = True,
) -> Explanation:
    """Recommend and explain; see `Retriever.recommend` for arguments and errors."""
    answer = retriever.recommend(user_id=user_id, item_ids=item_ids, top=top, exclude_seen=exclude_seen)
    if not answer.history:
        return Explanation(answer, [], False, None, "nothing to explain: the history has no known item")
    if answer.source == "popularity":
        return Explanation(answer, [], False, None, "nothing to explain: the run knows no interests")
    found = retriever.interests([i.item_index for i in answer.history])
    weights_KL = _weights(found)
    semantics, note = Semantics.open(retriever.workspace)
    exemplar: Exemplar | None = None
    names: list[list[Name]] = [[] for _ in weights_KL]
    own_names = names
    if semantics is not None:
        exemplar = _exemplar(semantics, answer)
        behaviour_KT = _behaviour_vectors(semantics, answer, found, weights_KL)
        names = _nearest(behaviour_KT, *semantics.all_interests())
        own_names = _nearest(behaviour_KT, exemplar.interests, exemplar.vectors_MT)
    interests = [
        _interest(k, answer, found, weights_KL, (names[k], own_names[k]), retriever)
        for k in range(len(weights_KL))
    ]
    chain = None if exemplar is None else _chain(exemplar, retriever)
    return Explanation(answer, interests, found.attention_KL is not None, chain, note)


def _weights(found: Interests) -> Vectors:
    if found.attention_KL is not None:
        return found.attention_KL
    shape = (len(found.vectors_KD), len(found.items))
    return np.full(shape, 1.0 / len(found.items), dtype=np.float32)


def _exemplar(semantics: Semantics, answer: Answer) -> Exemplar:
    if answer.train_user_index is not None:
        return semantics.exemplar_of(answer.train_user_index)
    vectors = semantics.text_vectors([i.item_index for i in answer.history])
    return semantics.nearest_exemplar(vectors.mean(axis=0))


def _behaviour_vectors(
    semantics: Semantics, answer: Answer, found: Interests, weights_KL: Vectors
) -> Vectors:
    """A text vector for each behaviour interest, `[K, T]`."""
    history_LT = semantics.text_vectors(found.items)
    recommended_nT = semantics.text_vectors([i.item_index for i in answer.items])
    source_n = np.array([i.interest for i in answer.items])
    return np.stack(
        [naming_vector(history_LT, w, recommended_nT[source_n == k]) for k, w in enumerate(weights_KL)]
    )


def _nearest(
    behaviour_KT: Vectors, interests: Sequence[SemanticInterest], vectors_MT: Vectors
) -> list[list[Name]]:
    """For each behaviour interest the nearest semantic ones with different texts."""
    if not interests:
        return [[] for _ in behaviour_KT]
    names = []
    for row in cosine(behaviour_KT, vectors_MT):
        by_text: dict[str, Name] = {}
        for m in np.argsort(-row, kind="stable"):
            found = interests[m]
            if found.text not in by_text:
                by_text[found.text] = Name(
                    found.exemplar_user_index, found.interest_index, found.text, float(row[m])
                )
            if len(by_text) == _NAMES_SHOWN:
                break
        names.append(list(by_text.values()))
    return names


def _interest(
    number: int,
    answer: Answer,
    found: Interests,
    weights_KL: Vectors,
    names: tuple[list[Name], list[Name]],
    retriever: Retriever,
) -> BehaviourInterest:
    """An item belongs to the interest that attends to it most; an interest that is second everywhere shows its best."""
    weights = weights_KL[number]
    own = np.flatnonzero(weights_KL.argmax(axis=0) == number)
    if not len(own):
        own = np.array([int(weights.argmax())])
    order = own[np.argsort(-weights[own], kind="stable")]
    recommended = [i for i in answer.items if i.interest == number]
    return BehaviourInterest(
        number=number,
        share=len(recommended) / max(len(answer.items), 1),
        names=names[0],
        own_names=names[1],
        history=[HistoryItem(retriever.catalogue.item(found.items[p]), float(weights[p])) for p in order],
        recommended=recommended,
    )


def _chain(exemplar: Exemplar, retriever: Retriever) -> Chain:
    evidence = [
        Evidence(i.interest_index, i.text, [retriever.catalogue.item(x) for x in i.item_indices])
        for i in exemplar.interests
    ]
    return Chain(
        assigned_by=exemplar.assigned_by,
        cluster=exemplar.cluster,
        num_users=exemplar.num_users,
        exemplar_user_id=exemplar.user_id,
        similarity=exemplar.similarity,
        prompt_hash=exemplar.prompt_hash,
        backend=exemplar.backend,
        model=exemplar.model,
        step=exemplar.step,
        answer=exemplar.answer,
        evidence=evidence,
    )


def render(explanation: Explanation, *, as_json: bool = False) -> str:
    """Text for the terminal, or JSON."""
    if as_json:
        return json.dumps(explanation.to_dict(), indent=2)
    parts: list[Any] = [*heading(explanation.answer), items_table(explanation.answer), ""]
    for interest in explanation.interests:
        parts += _interest_lines(interest, explanation.has_attention)
    if explanation.note:
        parts.append(explanation.note)
    if explanation.chain is not None:
        parts += _chain_lines(explanation.chain, explanation.answer)
    return to_text(*parts)


def _interest_lines(interest: BehaviourInterest, has_attention: bool) -> list[Any]:
    names = [f"{clean(n.text)} ({n.similarity:.2f})" for n in interest.names]
    title = f"Interest {interest.number + 1}: {names[0] if names else 'unnamed'}"
    made = table("", "", "")
    for n, item in enumerate(interest.history[:_ITEMS_SHOWN]):
        weight = f"attention {item.attention:.2f}" if has_attention else "equal parts"
        add_row(made, "  from" if n == 0 else "", clean(item.item.name), weight)
    for n, recommended in enumerate(interest.recommended[:_ITEMS_SHOWN]):
        add_row(made, "  gives" if n == 0 else "", clean(recommended.name), f"score {recommended.score:.3f}")
    lines: list[Any] = [f"{title}, {interest.share:.0%} of the list", made]
    if names[1:]:
        lines.append(f"  next nearest names: {'; '.join(names[1:])}")
    if interest.own_names:
        own = interest.own_names[0]
        lines.append(f"  nearest of the user's own exemplar: {clean(own.text)} ({own.similarity:.2f})")
    return [*lines, ""]


def _chain_lines(chain: Chain, answer: Answer) -> list[Any]:
    who = f"user {clean(answer.user_id)}" if answer.user_id else "this history"
    answered = (
        f"backend {clean(chain.backend)}, model {clean(chain.model) or 'none'}, step {clean(chain.step)}"
    )
    made = table("", "semantic interest", "evidence in the exemplar's history")
    for e in chain.evidence:
        items = "; ".join(clean(i.name, 60) for i in e.items[:_ITEMS_SHOWN]) or "none"
        add_row(made, str(e.interest_index + 1), clean(e.text), items)
    return [
        "Where the names come from (the model itself read no text)",
        f"  {who} -> cluster {chain.cluster} ({chain.num_users:,} training users, by {chain.assigned_by}, "
        f"similarity {chain.similarity:.2f})",
        f"  -> exemplar user {clean(chain.exemplar_user_id)} -> prompt {clean(chain.prompt_hash)[:16]} ({answered})",
        f"  -> {clean(chain.answer, _ANSWER_CHARS)}",
        "",
        made,
    ]
