"""Interests of the keyphrase backend beside those that GPT-3.5 and GPT-4 wrote for the same MovieLens users.

    $ python -m benchmarks.bench_interests_quality --data FOLDER

FOLDER holds `ml-100k`, `ml-1m`, `llm-text-ml-100k` and `llm-text-ml-1m`; `interests_panels.py` says how they are read,
`distributed_mi/interests/quality.py` what is measured. Three settings, because the models' texts were written without
regard to time:

    a  as they are: texts from the whole history, keyphrase from the whole history too; the later items were SEEN
    b  fair to keyphrase's user: keyphrase from the first 80 % of the events, targets from the rest; texts as in a, SEEN
    c  nobody saw the targets: both from the films that GPT-3.5 cites as its evidence, targets are all other films

Three results: `interests_quality` scores users with their own interests; `interests_targets` does so also with other
texts of the items than their titles; `interests_transfer` scores members of clusters with the interests of their
exemplar (affinity propagation on the mean title vector of the earlier part, a tenth of the users as exemplars). No text
and no item of the data is written.

Shapes:  U users, T text width, V items.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks import interests_panels as panels
from benchmarks.interests_panels import Log, Panel
from benchmarks.interests_rows import (
    Rows,
    Samples,
    Targets,
    Texts,
    quality_rows,
    target_rows,
    transfer_rows,
)
from distributed_mi.interests.quality import SEMANTIC
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.encoder import TextEncoder
from distributed_mi.text.templates import item_text

FIELDS = ("title", "categories")
"""`embed.item_fields` of the targets `titles and genres`."""

QUALITY_NOTES = (
    "A user's interests are ranked among those of up to 99 random others of the panel, for each later item; chance: "
    "rank percentile 0.5, and at 99 others hit@1 0.01, hit@10 0.1, MRR 0.0519. Lift: rank percentile minus that of the "
    "same interests for another user's later items; chance 0, and the number to compare by. Settings a (all saw "
    "everything), b (keyphrase from the first 80 %, the model's texts as they are) and c (nobody saw the targets): see "
    "the docstring of the benchmark. SEEN: the later items may have been part of what the interests were made from.\n\n"
    "Favours keyphrase: titles are matched by their words, and `keyphrase` and `20 titles` quote them; in a it quotes "
    "the later titles themselves, and had all films where `likes`, `tastes` and two of the GPT-4 panels had 10 to 30. "
    "Favours the models: in b they may have seen the later films and keyphrase did not; they were given ratings. Left "
    "in c: at most 5 films of a user that GPT-3.5 was shown and did not cite. MovieLens users rate most of their films "
    'in a few sittings, so that "later" is weak; films that a user disliked are targets too. GPT-4 profiles are '
    "cut at the first sentence that speaks of a dislike, by rule. Coverage: n/a where the texts name no items; for "
    "`likes` it is a share of the whole history, of which the model was shown 25 films at most."
)

TARGETS_NOTES = (
    "Lift, as in interests_quality, when a film is represented by its title, by title and genres (which favours "
    "keyphrase, whose interests begin with a genre), and by one sentence about it that a model wrote without any user "
    "(which no side can quote; of MovieLens-100K only films that MovieLens-1M has under the same title). Rows `A - B` "
    "are differences of the lifts, user by user."
)

TRANSFER_NOTES = (
    "Members of clusters, scored with the interests of their exemplar on their own later films, ranked among all "
    "exemplars (100 at most). Clusters: mean title vectors of the users' earlier films. Nothing here saw the member's "
    "later films: the texts are another user's, so that a and b differ only in how much of the exemplar's history "
    "keyphrase had. The raw rank percentile is above 0.5 without any knowledge where exemplars of large clusters have "
    "more interests than others; `swapped` is that level (the same interests for another user's later films), `lift` "
    "what is left. `random`: interests of a random other exemplar for the member's own films. Intervals and p-values "
    "draw the members of one exemplar together. Titles favour keyphrase, as in interests_quality."
)


_SIDE = ("panel", "interests", "made from")
_WITHIN = ("coverage", "distinctness", "near duplicates")
_VERSUS = "lift, model - keyphrase"
HEADERS = {
    "interests_quality": (
        [*_SIDE, "users", "per user", "rank percentile", "lift", *SEMANTIC[1:], *_WITHIN, _VERSUS],
        QUALITY_NOTES,
    ),
    "interests_targets": ([*_SIDE, "titles", "titles and genres", "summaries"], TARGETS_NOTES),
    "interests_transfer": (
        [*_SIDE, "exemplars", "members", "rank percentile", "swapped", "random", "lift", _VERSUS],
        TRANSFER_NOTES,
    ),
}
"""Result -> columns and notes."""


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
    parser.add_argument(
        "--cache", type=Path, help="folder for text vectors; a second run then encodes nothing"
    )
    parser.add_argument("--only", choices=("ml-100k", "ml-1m"), help="one data set instead of both")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encoder = TextEncoder(EmbedConfig(), device="cpu")
    results: dict[str, tuple[Rows, Samples]] = {name: ([], []) for name in HEADERS}
    for data_set, (log, found) in build_panels(args.data).items():
        if args.only in (None, data_set):
            texts, kinds = prepare(args.data, log, found, encoder, data_set, args.cache)
            for p in found:
                print(p.name, flush=True)
                for name, (rows, samples) in {
                    "interests_quality": quality_rows(p, log, texts, kinds[0], args.seed),
                    "interests_targets": target_rows(p, log, texts, kinds, args.seed),
                    "interests_transfer": transfer_rows(p, log, texts, kinds[0], args.seed),
                }.items():
                    results[name][0].extend(rows)
                    results[name][1].extend(samples)
    facts = {
        "encoder": f"MiniLM-L6-v2, {encoder.dim} wide, mean pooling, 64 tokens",
        "intervals": "95 %, 1,000 bootstrap resamples of users; p: two-sided, 10,000 sign flips, not corrected",
        "seed": args.seed,
    }
    for name, (rows, samples) in results.items():
        header, notes = HEADERS[name]
        table = harness.Table(header, rows, samples, facts)
        print(harness.write_table(name, table, notes=notes, folder=args.out).read_text())
    return 0


def prepare(
    data: Path, log: Log, found: Sequence[Panel], encoder: TextEncoder, what: str, cache: Path | None
) -> tuple[Texts, list[Targets]]:
    """Encode everything of a data set; also what may stand for its items, titles first."""
    told = panels.summaries(data, log)
    by_kind = {
        "titles": log.titles(),
        "titles and genres": [item_text("", i.title, None, i.categories, FIELDS).text for i in log.catalogue],
        "summaries": [s or "" for s in told],
    }
    written = [i.text for p in found for s in p.sides for x in s.interests.values() for i in x]
    texts = Texts(encoder, [*written, *(t for kind in by_kind.values() for t in kind)], what, cache)
    everything = np.ones(len(told), dtype=bool)
    known = {"summaries": np.array([s is not None for s in told])}
    return texts, [Targets(n, texts(x), known.get(n, everything)) for n, x in by_kind.items()]


if __name__ == "__main__":
    sys.exit(main())
