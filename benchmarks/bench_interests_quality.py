"""Interests of the keyphrase backend beside those that GPT-3.5 and GPT-4 wrote for the same MovieLens users.

    $ python -m benchmarks.bench_interests_quality --data FOLDER

FOLDER holds `ml-100k`, `ml-1m`, `llm-text-ml-100k` and `llm-text-ml-1m`; `interests_panels.py` says how they are read,
`distributed_mi/interests/quality.py` what is measured. Three settings, because the models' texts were written without
regard to time:

    a  as they are: texts from the whole history, keyphrase from the whole history too; the later items were SEEN
    b  fair to keyphrase's user: keyphrase from the first 80 % of the events, targets from the rest; texts as in a, SEEN
    c  nobody saw the targets: both from the films that GPT-3.5 cites as its evidence, targets are all other films

Two results: `interests_quality` scores users with their own interests, `interests_transfer` members of clusters with
the interests of their exemplar (affinity propagation on the mean title vector of the earlier part, a tenth of the users
as exemplars). No text and no item of the data is written.

Shapes:  U users, T text width, V items.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks import interests_panels as panels
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
from distributed_mi.interests.resampling import (
    Difference,
    Estimate,
    Floats,
    Ints,
    estimates,
    paired_differences,
)
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.encoder import TextEncoder

EXEMPLAR_SHARE = 0.1
_METRIC = "rank_percentile"

QUALITY_NOTES = (
    "A user's interests are ranked among those of up to 99 random others of the panel, for each later item; chance: "
    "rank percentile 0.5, and at 99 others hit@1 0.01, hit@10 0.1, MRR 0.0519. Settings a (all saw everything), b "
    "(keyphrase from the first 80 %, the model's texts as they are) and c (nobody saw the targets): see the docstring "
    "of the benchmark. SEEN: the later items may have been part of what the interests were made from.\n\n"
    "Favours keyphrase: titles are matched by their words, and `keyphrase` and `20 titles` quote them; in a it quotes "
    "the later titles themselves, and had all films where `likes`, `tastes` and two of the GPT-4 panels had 10 to 30. "
    "Favours the models: in b they may have seen the later films and keyphrase did not; they were given ratings. Left "
    "in c: at most 5 films of a user that GPT-3.5 was shown and did not cite. `summaries` puts one sentence about each "
    "film in the place of its title, which no side can quote. MovieLens users rate most of their films in a few "
    'sittings, so that "later" is weak; films that a user disliked are targets like others. The GPT-4 profiles are cut '
    "at the first sentence that speaks of a dislike, by rule. Coverage: n/a where the texts name no items; for `likes` "
    "it is a share of the whole history, of which the model was shown 25 films at most."
)

TRANSFER_NOTES = (
    "Members of clusters, scored with the interests of their exemplar on their own later films, ranked among all "
    "exemplars (100 at most). Clusters: mean title vectors of the users' earlier films. Nothing here saw the member's "
    "later films: the texts are another user's, so that a and b differ only in how much of the exemplar's history "
    "keyphrase had. `random exemplar`: the same with the interests of a random other exemplar; `own - random`: the "
    "difference. Chance is a rank percentile of 0.5. Intervals and p-values draw the members of one exemplar together. "
    "Titles favour keyphrase, as in interests_quality."
)


@dataclass(frozen=True)
class Scored:
    """One side of a panel, measured."""

    side: Side
    table: InterestVectors
    own: dict[str, Floats]
    within: dict[str, Floats]

    def estimates(self) -> dict[str, Estimate]:
        """All scores over the users of the panel."""
        return estimates({**self.own, **self.within})


class Texts:
    """Each distinct text encoded once."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], what: str) -> None:
        distinct = list(dict.fromkeys(texts))
        with track(f"encode {what}", len(distinct), "texts") as bar:
            self.vectors = encoder(distinct, on_batch=bar.advance)
        self.row_of = {text: row for row, text in enumerate(distinct)}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors `[len(texts), T]`."""
        return self.vectors[[self.row_of[t] for t in texts]]

    def interests(self, side: Side, users: Sequence[int]) -> InterestVectors:
        """The interests of some users of a side."""
        pairs = [(u, i.text) for u in users for i in side.interests[u]]
        return InterestVectors.build(np.array([u for u, _ in pairs]), self([t for _, t in pairs]))


def score(panel: Panel, side: Side, texts: Texts, items_VT: np.ndarray, seed: int) -> Scored:
    """Every user of a panel with its own interests."""
    users = sorted(panel.later)
    table = texts.interests(side, users)
    later = LaterItems.build(users, users, [[i - 1 for i in panel.later[u]] for u in users])
    found = semantic_scores(table, later, items_VT, seed=seed)
    support = [{i for x in side.interests[u] for i in x.item_indices} for u in users]
    covered = coverage(support, [side.history[u] for u in users])
    within = {
        "coverage": covered if side.names_support else np.full(len(users), np.nan),
        **distinctness(table),
    }
    return Scored(side, table, found.own, within)


def cluster(panel: Panel, items_VT: np.ndarray) -> tuple[Ints, Ints]:
    """Users in ascending order, and the exemplar of each: a tenth of them."""
    users = np.array(sorted(panel.earlier))
    vectors_UT = np.stack([items_VT[np.array(panel.earlier[u]) - 1].mean(axis=0) for u in users])
    with LocalProblem(vectors_UT.astype(np.float32)) as problem:
        preference, _ = preference_for_share(problem, EXEMPLAR_SHARE)
    result = affinity_propagation(vectors_UT.astype(np.float32), preference, damping=0.7, max_iter=400)
    return users, users[result.exemplars_E.numpy()[result.labels_U.numpy()]]


def transfer(
    panel: Panel, side: Side, texts: Texts, items_VT: np.ndarray, clusters: tuple[Ints, Ints], seed: int
) -> tuple[SemanticScores, Ints]:
    """Members with the interests of their exemplar; also the exemplar of each member."""
    users, exemplars = clusters
    member = users != exemplars
    table = texts.interests(side, np.unique(exemplars).tolist())
    later = LaterItems.build(
        users[member].tolist(),
        exemplars[member].tolist(),
        [[i - 1 for i in panel.later[u]] for u in users[member].tolist()],
    )
    return semantic_scores(table, later, items_VT, seed=seed), exemplars[member]


def quality_rows(
    panel: Panel, name: str, texts: Texts, items_VT: np.ndarray, seed: int
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Formatted rows and unrounded numbers of a panel."""
    scored = {s.name: score(panel, s, texts, items_VT, seed) for s in panel.sides}
    differences = {
        setting: paired_differences(scored[reference].own, scored[panel.model].own, seed=seed)
        for setting, reference in panel.references.items()
    }
    rows, samples = [], []
    for side_name, x in scored.items():
        found = x.estimates()
        is_model = side_name == panel.model
        versus = [f"{setting}: {_difference(d[0])}" for setting, d in differences.items()] if is_model else []
        rows.append(
            [
                name,
                side_name,
                x.side.saw + (", SEEN" if x.side.saw_later else ""),
                f"{found[_METRIC].num_users:,}",
                f"{x.table.counts.mean():.1f}",
                *(_text(found[m]) for m in SEMANTIC),
                *(_text(found[m]) for m in x.within),
                "; ".join(versus),
            ]
        )
        samples.append(
            {
                "panel": name,
                "side": side_name,
                "saw_whole_history": x.side.saw_later,
                "saw": x.side.saw,
                "users_without_later_items": sum(not later for later in panel.later.values()),
                "interests_per_user": float(x.table.counts.mean()),
                "chance": chance(min(99, x.table.num_exemplars - 1)),
                "scores": {n: e.to_dict() for n, e in found.items()},
                "model_minus_reference": {
                    s: {d.metric: d.to_dict() for d in ds} for s, ds in differences.items() if is_model
                },
            }
        )
    return rows, samples


def transfer_rows(
    panel: Panel, texts: Texts, items_VT: np.ndarray, seed: int
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The same for members of clusters."""
    clusters = cluster(panel, items_VT)
    found = {s.name: transfer(panel, s, texts, items_VT, clusters, seed) for s in panel.sides}
    groups = found[panel.model][1]
    differences = {
        setting: paired_differences(found[reference][0].own, found[panel.model][0].own, groups, seed=seed)
        for setting, reference in panel.references.items()
    }
    rows, samples = [], []
    for side in panel.sides:
        scores, _ = found[side.name]
        own, random = (estimates(s, groups, seed=seed) for s in (scores.own, scores.random))
        over = paired_differences(scores.random, scores.own, groups, seed=seed)
        is_model = side.name == panel.model
        versus = [f"{s}: {_difference(d[0])}" for s, d in differences.items()] if is_model else []
        rows.append(
            [
                panel.name,
                side.name,
                side.saw,
                f"{scores.num_others + 1:,}",
                f"{own[_METRIC].num_users:,}",
                *(_text(own[m]) for m in SEMANTIC),
                _text(random[_METRIC]),
                _difference(over[0]),
                "; ".join(versus),
            ]
        )
        samples.append(
            {
                "panel": panel.name,
                "side": side.name,
                "exemplars": scores.num_others + 1,
                "chance": chance(scores.num_others),
                "scores": {n: e.to_dict() for n, e in own.items()},
                "random_exemplar": {n: e.to_dict() for n, e in random.items()},
                "over_random_exemplar": {d.metric: d.to_dict() for d in over},
                "model_minus_reference": {
                    s: {d.metric: d.to_dict() for d in ds} for s, ds in differences.items() if is_model
                },
            }
        )
    return rows, samples


def _text(e: Estimate) -> str:
    if e.value is None:
        return "n/a"
    return f"{e.value:.3f}" + (f" [{e.ci95[0]:.3f}, {e.ci95[1]:.3f}]" if e.ci95 else "")


def _difference(d: Difference) -> str:
    if d.difference is None or d.ci95 is None:
        return "n/a"
    return f"{d.difference:+.3f} [{d.ci95[0]:+.3f}, {d.ci95[1]:+.3f}], p {d.p_value:.4f}"


def build_panels(data: Path) -> dict[str, tuple[Log, list[Panel]]]:
    """Data set -> its log and panels."""
    small, large = Log(data / "ml-100k"), Log(data / "ml-1m")
    genres = panels.genre_texts(data, small)
    likes, tastes = (panels.written_texts(data, large, f"lehengthu-{s}") for s in ("like", "taste"))
    found = [
        panels.panel(large, "ml-1m likes", "GPT-3.5", "up to 25 films", likes, names_support=True),
        panels.panel(large, "ml-1m tastes", "GPT-3.5", "up to 25 films", tastes, names_support=False),
    ]
    for source in panels.GPT4_SOURCES:
        written = panels.written_texts(data, large, source)
        shown = {"tears-gpt4_10": "10 films", "tears-gpt4_30_new": "30 films"}.get(source, "whole history")
        name = f"ml-1m {source.removeprefix('tears-')}"
        found.append(panels.panel(large, name, "GPT-4", shown, written, names_support=False))
    found.append(panels.same_films(large, "ml-1m likes, cited films", "GPT-3.5", likes))
    by_genre = panels.panel(small, "ml-100k genres", "GPT-3.5", "whole history", genres, names_support=False)
    return {"ml-100k": (small, [by_genre]), "ml-1m": (large, found)}


def main() -> int:
    """Measure all panels and write both results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=7, help="of the others and of the resampling")
    parser.add_argument("--only", choices=("ml-100k", "ml-1m"), help="one data set instead of both")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encoder = TextEncoder(EmbedConfig(), device="cpu")
    quality: tuple[list[Any], list[Any]] = ([], [])
    members: tuple[list[Any], list[Any]] = ([], [])
    for data_set, (log, found) in build_panels(args.data).items():
        if args.only in (None, data_set):
            told = panels.summaries(args.data, log) if data_set == "ml-1m" else []
            written = [i.text for p in found for s in p.sides for x in s.interests.values() for i in x]
            texts = Texts(encoder, [*log.titles(), *told, *written], data_set)
            for p in found:
                print(p.name, flush=True)
                _extend(quality, quality_rows(p, p.name, texts, texts(log.titles()), args.seed))
                _extend(members, transfer_rows(p, texts, texts(log.titles()), args.seed))
                if told:
                    _extend(quality, quality_rows(p, f"{p.name}; summaries", texts, texts(told), args.seed))
    facts = {
        "encoder": f"MiniLM-L6-v2, {encoder.dim} wide, mean pooling, 64 tokens",
        "intervals": "95 %, 1,000 bootstrap resamples of users; p: two-sided, 10,000 sign flips, not corrected",
        "seed": args.seed,
    }
    write("interests_quality", quality, ["coverage", "distinctness", "near duplicates"], facts, args.out)
    write("interests_transfer", members, [], facts, args.out)
    return 0


def _extend(to: tuple[list[Any], list[Any]], found: tuple[list[Any], list[Any]]) -> None:
    for kept, new in zip(to, found, strict=True):
        kept += new


def write(
    name: str,
    found: tuple[list[Any], list[Any]],
    within: Sequence[str],
    facts: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write and print one of the two results."""
    scores = ["rank percentile", *SEMANTIC[1:]]
    if within:
        header = [
            "panel",
            "interests",
            "made from",
            "users",
            "per user",
            *scores,
            *within,
            "model - keyphrase",
        ]
        notes = QUALITY_NOTES
    else:
        header = ["panel", "interests", "made from", "exemplars", "members", *scores]
        header += ["random exemplar", "own - random", "model - keyphrase"]
        notes = TRANSFER_NOTES
    table = harness.Table(header, found[0], found[1], dict(facts))
    print(harness.write_table(name, table, notes=notes, folder=folder).read_text())


if __name__ == "__main__":
    sys.exit(main())
