"""What `bench_interests_quality` measures of a panel, as formatted rows and unrounded numbers.

Shapes:  U users, T text width, V items.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.interests_panels import Log, Panel, Side
from distributed_mi.core.progress import track
from distributed_mi.exemplars.affinity import affinity_propagation
from distributed_mi.exemplars.preference import preference_for_share
from distributed_mi.exemplars.problem import LocalProblem
from distributed_mi.interests.quality import (
    SEMANTIC,
    InterestVectors,
    LaterItems,
    SemanticScores,
    chance,
    coverage,
    distinctness,
    semantic_scores,
)
from distributed_mi.interests.resampling import Difference, Estimate, Ints, estimates, paired_differences
from distributed_mi.text.encoder import TextEncoder

EXEMPLAR_SHARE = 0.1

_METRIC, _LIFT = "rank_percentile", "rank_percentile_lift"
_ENCODED_AT_ONCE = 4096

Rows = list[list[str]]
Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Targets:
    """What stands for the items."""

    name: str
    vectors_VT: np.ndarray
    known_V: np.ndarray
    """Items that have such a text, bool."""

    def rows(self, items: Iterable[int]) -> list[int]:
        """Rows of `vectors_VT` of the items that have a text."""
        return [i - 1 for i in items if self.known_V[i - 1]]


class Texts:
    """Each distinct text encoded once.

    Args:
        encoder: of the embed stage, with its defaults.
        texts: all that will be asked for.
        what: shown beside the progress.
        cache: folder in which vectors are kept by the hash of their text, so that another run encodes nothing.
    """

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], what: str, cache: Path | None) -> None:
        by_key = {hashlib.sha256(t.encode()).hexdigest(): t for t in texts}
        self.vector_of: dict[str, np.ndarray] = {}
        for path in sorted(cache.glob("*.npz")) if cache else ():
            with np.load(path) as stored:
                self.vector_of |= dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))
        missing = sorted(k for k in by_key if k not in self.vector_of)
        with track(f"encode {what}", len(missing), "texts") as bar:
            for low in range(0, len(missing), _ENCODED_AT_ONCE):
                keys = missing[low : low + _ENCODED_AT_ONCE]
                vectors = encoder([by_key[k] for k in keys], on_batch=bar.advance)
                self.vector_of |= dict(zip(keys, vectors, strict=True))
                if cache:
                    cache.mkdir(parents=True, exist_ok=True)
                    np.savez(cache / f"{keys[0][:16]}.npz", keys=np.array(keys), vectors=vectors)
        self.key_of = {t: k for k, t in by_key.items()}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors `[len(texts), T]`."""
        return np.stack([self.vector_of[self.key_of[t]] for t in texts])

    def interests(self, side: Side, users: Sequence[int]) -> InterestVectors:
        """The interests of some users of a side."""
        pairs = [(u, i.text) for u in users for i in side.interests[u]]
        return InterestVectors.build(np.array([u for u, _ in pairs]), self([t for _, t in pairs]))


def later_of(
    panel: Panel, log: Log, users: Sequence[int], exemplars: Sequence[int], targets: Targets
) -> LaterItems:
    """Later items of some users of a panel."""
    rows, known = ([targets.rows(side[u]) for u in users] for side in (panel.later, log.events))
    return LaterItems.build(users, exemplars, rows, known)


def cluster(panel: Panel, items_VT: np.ndarray) -> tuple[Ints, Ints]:
    """Users in ascending order, and the exemplar of each: a tenth of them."""
    users = np.array(sorted(panel.earlier))
    vectors_UT = np.stack([items_VT[np.array(panel.earlier[u]) - 1].mean(axis=0) for u in users])
    with LocalProblem(vectors_UT.astype(np.float32)) as problem:
        preference, _ = preference_for_share(problem, EXEMPLAR_SHARE)
    result = affinity_propagation(vectors_UT.astype(np.float32), preference, damping=0.7, max_iter=400)
    return users, users[result.exemplars_E.numpy()[result.labels_U.numpy()]]


def quality_rows(panel: Panel, log: Log, texts: Texts, titles: Targets, seed: int) -> tuple[Rows, Samples]:
    """Formatted rows and unrounded numbers of a panel, every user with its own interests."""
    users = sorted(panel.later)
    later = later_of(panel, log, users, users, titles)
    scores, within, counts = {}, {}, {}
    for side in panel.sides:
        table = texts.interests(side, users)
        scores[side.name] = semantic_scores(table, later, titles.vectors_VT, seed=seed)
        support = [{i for x in side.interests[u] for i in x.item_indices} for u in users]
        covered = coverage(support, [side.history[u] for u in users])
        covered = covered if side.names_support else np.full(len(users), np.nan)
        within[side.name] = {"coverage": covered, **distinctness(table)}
        counts[side.name] = float(table.counts.mean())
    differences = _versus(panel, scores, None, seed)
    rows, samples = [], []
    for side in panel.sides:
        s = scores[side.name]
        found = estimates({**s.own, **s.lift, **within[side.name]}, seed=seed)
        is_model = side.name == panel.model
        rows.append(
            [
                panel.name,
                side.name,
                _made_from(side),
                f"{found[_METRIC].num_users:,}",
                f"{counts[side.name]:.1f}",
                *(_text(found[m]) for m in (_METRIC, _LIFT, *SEMANTIC[1:], *within[side.name])),
                _listed(differences) if is_model else "",
            ]
        )
        samples.append(
            {
                "panel": panel.name,
                "side": side.name,
                "saw_whole_history": side.saw_later,
                "made_from": side.saw,
                "users_without_later_items": int((later.counts == 0).sum()),
                "interests_per_user": counts[side.name],
                "chance": chance(s.num_others),
                "scores": {n: e.to_dict() for n, e in found.items()},
                "model_minus_reference": _as_dicts(differences) if is_model else {},
            }
        )
    return rows, samples


def target_rows(
    panel: Panel, log: Log, texts: Texts, kinds: Sequence[Targets], seed: int
) -> tuple[Rows, Samples]:
    """The lift with other texts of the items."""
    users = sorted(panel.later)
    cells: dict[str, list[str]] = {s.name: [] for s in panel.sides}
    samples: Samples = []
    labels = {k: f"{panel.model} - {reference} ({k})" for k, reference in panel.references.items()}
    cells |= {label: [] for label in labels.values()}
    for kind in kinds:
        later = later_of(panel, log, users, users, kind)
        scores = {
            s.name: semantic_scores(texts.interests(s, users), later, kind.vectors_VT, seed=seed)
            for s in panel.sides
        }
        lifts = {name: estimates(s.lift, seed=seed) for name, s in scores.items()}
        differences = _versus(panel, scores, None, seed)
        for name, found in lifts.items():
            cells[name].append(_text(found[_LIFT]))
        for k, label in labels.items():
            cells[label].append(_difference(differences[k][_LIFT]))
        samples.append(
            {
                "panel": panel.name,
                "targets": kind.name,
                "lift": {n: {m: e.to_dict() for m, e in f.items()} for n, f in lifts.items()},
                "model_minus_reference": _as_dicts(differences),
            }
        )
    seen = {s.name: _made_from(s) for s in panel.sides}
    return [[panel.name, name, seen.get(name, ""), *row] for name, row in cells.items()], samples


def transfer_rows(panel: Panel, log: Log, texts: Texts, titles: Targets, seed: int) -> tuple[Rows, Samples]:
    """Members of clusters with the interests of their exemplar."""
    users, exemplars = cluster(panel, titles.vectors_VT)
    member = users != exemplars
    groups = exemplars[member]
    later = later_of(panel, log, users[member].tolist(), groups.tolist(), titles)
    tables = {s.name: texts.interests(s, np.unique(exemplars).tolist()) for s in panel.sides}
    scores = {n: semantic_scores(t, later, titles.vectors_VT, seed=seed) for n, t in tables.items()}
    differences = _versus(panel, scores, groups, seed)
    rows, samples = [], []
    for side in panel.sides:
        s, table = scores[side.name], tables[side.name]
        own, random = (estimates(x, groups, seed=seed) for x in (s.own, s.random))
        lift = {d.metric: d for d in paired_differences(s.swapped, s.own, groups, seed=seed)}
        is_model = side.name == panel.model
        rows.append(
            [
                panel.name,
                side.name,
                side.saw,
                f"{table.num_exemplars:,}",
                f"{own[_METRIC].num_users:,}",
                _text(own[_METRIC]),
                f"{lift[_METRIC].value_a:.3f}",
                f"{random[_METRIC].value:.3f}",
                _difference(lift[_METRIC]),
                _listed(differences) if is_model else "",
            ]
        )
        samples.append(
            {
                "panel": panel.name,
                "side": side.name,
                "made_from": side.saw,
                "exemplars": table.num_exemplars,
                "interests_per_exemplar": float(table.counts.mean()),
                "interests_per_member": float(table.counts[table.places(groups)].mean()),
                "chance": chance(s.num_others),
                "scores": {n: e.to_dict() for n, e in own.items()},
                "lift": {n: d.to_dict() for n, d in lift.items()},
                "random_exemplar": {n: e.to_dict() for n, e in random.items()},
                "model_minus_reference": _as_dicts(differences) if is_model else {},
            }
        )
    return rows, samples


def _versus(
    panel: Panel, scores: Mapping[str, SemanticScores], groups: Ints | None, seed: int
) -> dict[str, dict[str, Difference]]:
    """Setting -> metric -> the model minus the side that it is compared with."""
    model = scores[panel.model]
    return {
        setting: {
            d.metric: d
            for d in paired_differences(
                {**scores[reference].own, **scores[reference].lift},
                {**model.own, **model.lift},
                groups,
                seed=seed,
            )
        }
        for setting, reference in panel.references.items()
    }


def _made_from(side: Side) -> str:
    return side.saw + (", SEEN" if side.saw_later else "")


def _listed(differences: Mapping[str, Mapping[str, Difference]]) -> str:
    return "; ".join(f"{setting}: {_difference(d[_LIFT])}" for setting, d in differences.items())


def _as_dicts(differences: Mapping[str, Mapping[str, Difference]]) -> dict[str, Any]:
    return {s: {m: d.to_dict() for m, d in ds.items()} for s, ds in differences.items()}


def _text(e: Estimate) -> str:
    if e.value is None:
        return "n/a"
    return f"{e.value:.3f}" + (f" [{e.ci95[0]:.3f}, {e.ci95[1]:.3f}]" if e.ci95 else "")


def _difference(d: Difference) -> str:
    if d.difference is None or d.ci95 is None:
        return "n/a"
    return f"{d.difference:+.3f} [{d.ci95[0]:+.3f}, {d.ci95[1]:+.3f}], p {d.p_value:.4f}"
