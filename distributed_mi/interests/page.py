"""A page to look at: one static HTML file with every exemplar, its history, prompt, answer and interests.

Nothing is loaded from elsewhere and nothing of what is shown can run. Titles and answers come from anywhere, so they
travel as JSON in a script element of type `application/json`, in which no tag can begin, and `page.js` puts them on the
page as text nodes only. The content security policy allows the page's own style and script by hash and nothing else,
not even an assignment of HTML.

A title stands in the file once, however many histories and prompts name it, and the page shows a few exemplars at a
time, so that 10,000 of them stay quick.
"""

import base64
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from distributed_mi.core.artifacts import (
    Manifest,
    StageDirectory,
    Workspace,
    list_files,
    resolve_url,
    write_bytes,
)
from distributed_mi.core.errors import ConfigError, InputError, WorkspaceError
from distributed_mi.interests.history import Exemplar, HistoryItem, build_exemplar
from distributed_mi.interests.ladder import KEYPHRASE, STEPS

FILE_NAME = "report.html"
"""In the stage's folder beside the manifest; goes away with the result that it shows."""

MAX_EXEMPLARS = 20_000
"""Exemplars on a page when no limit is given."""
MAX_DATA_CHARS = 128 * 2**20
"""Characters of a page's data; the smallest clusters are left out beyond it, and the page says so."""
_MAX_NAME_CHARS = 300
_MAX_TEXT_CHARS = 20_000

_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_ELEMENT_END = "), "
"""Where a line of a prompt is taken apart; other prompts list the same items. `page.js` puts them together again."""


def write_page(workspace: Workspace, path: str | None = None, *, limit: int | None = None) -> str:
    """Write the page of a complete interests stage.

    Args:
        workspace: with complete stages prepare, exemplars and interests.
        path: local path or URL of the file; by default `report.html` in the stage's folder.
        limit: exemplars on the page, largest clusters first; by default at most `MAX_EXEMPLARS`. The figures at the top
            are always those of all.

    Returns:
        The path that was written.

    Raises:
        WorkspaceError: a stage is missing, or interests was made from other exemplars than those that are there now.
        ConfigError: `limit` is below 1. InputError: `path` cannot be written.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of exemplars on a page must be at least 1: {limit}")
    page = _Page(workspace, limit or MAX_EXEMPLARS).html()
    if path is None:
        path = f"{workspace.stage('interests').base}/{FILE_NAME}"
        with workspace.reachable():
            write_bytes(workspace.fs, path, page)
        return path
    filesystem, place = resolve_url(path)
    try:
        if filesystem.get_file_info(place).type == pafs.FileType.Directory:
            raise InputError(f"the page needs the name of a file, and this is a folder: {path}")
        write_bytes(filesystem, place, page)
    except OSError as error:
        raise InputError(f"cannot write the page to {path}: {error}") from error
    return path


@dataclass
class _Pool:
    """Texts that the page refers to by number, each of them once."""

    texts: list[Any] = field(default_factory=list)
    numbers: dict[Any, int] = field(default_factory=dict)
    chars: int = 0

    def number(self, key: Any, text: Any = None) -> int:
        """Number of a text, new or known; `key` is the text itself unless the text has another identity."""
        if key not in self.numbers:
            self.numbers[key] = len(self.texts)
            self.texts.append(key if text is None else text)
            self.chars += len(str(self.texts[-1]))
        return self.numbers[key]


class _Page:
    """Reads what the page shows: whole columns for the figures, whole rows for the exemplars on it."""

    def __init__(self, workspace: Workspace, limit: int) -> None:
        self.stage = workspace.stage("interests")
        self.manifest = _require(workspace, self.stage)
        self.prepare = workspace.stage("prepare")
        self.backend: str = self.manifest.config["backend"]["name"]
        columns = ["user_index", "user_id", "num_users"]
        exemplars = workspace.stage("exemplars").read("exemplars", "exemplars", columns=columns)
        self.sizes: list[int] = exemplars["num_users"].to_pylist()
        order = pc.sort_indices(
            exemplars, sort_keys=[("num_users", "descending"), ("user_index", "ascending")]
        )
        self.shown: list[dict[str, Any]] = exemplars.take(order[:limit]).to_pylist()
        self.users = pa.array([e["user_index"] for e in self.shown])
        columns = ["backend", "model", "step", "num_prompt_tokens", "num_answer_tokens", "seconds"]
        self.answers = self.stage.read("answers", "answers", columns=columns)
        self.items, self.pieces = _Pool(), _Pool()

    def html(self) -> bytes:
        """The file."""
        records = list(self._bounded(self._records()))
        steps = Counter(self.answers["step"].to_pylist())
        head = {
            "steps": [[s, steps[s]] for s in _in_order(steps)],
            "items": self.items.texts,
            "pieces": self.pieces.texts,
        }
        data = "".join([_json(head)[:-1], ',"exemplars":[', ",\n".join(records), "]}"])
        style, script = _asset("page.css"), _asset("page.js")
        page = Template(_asset("page.html")).substitute(
            policy=(
                f"default-src 'none'; style-src '{_source_hash(style)}'; script-src '{_source_hash(script)}'; "
                "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
            ),
            style=style,
            script=script,
            data=data,
            facts=self._facts(steps),
            origin=self._origin(len(records)),
            steps=_bars([(_words(s), steps[s]) for s in _in_order(steps)]),
            sizes=_bars(_size_classes(self.sizes)),
        )
        return page.encode("utf-8", errors="backslashreplace")  # half a surrogate pair becomes a JSON escape

    def _bounded(self, records: Iterator[str]) -> Iterator[str]:
        chars = 0
        for record in records:
            chars += len(record)
            if chars + self.items.chars + self.pieces.chars > MAX_DATA_CHARS:
                return
            yield record

    def _records(self) -> Iterator[str]:
        """One JSON object per exemplar, largest cluster first."""
        mine = pc.field("user_index").isin(self.users)
        columns = ["user_index", "prompt", "answer", "backend", "model", "step"]
        columns += ["num_prompt_tokens", "num_answer_tokens", "seconds"]
        answers = self.stage.read("answers", "answers", columns=columns, filter=mine)
        place = {
            user: (batch, n)
            for batch in answers.to_batches()
            for n, user in enumerate(batch["user_index"].to_pylist())
        }
        interests: dict[int, list[dict[str, Any]]] = {}
        for row in self.stage.read("interests", "interests", filter=mine).to_pylist():
            interests.setdefault(row["user_index"], []).append(row)
        histories = self._histories(mine)
        failures = self._failures()
        for exemplar in self.shown:
            user = exemplar["user_index"]
            batch, n = place[user]
            answer = batch.slice(n, 1).to_pylist()[0]
            record = self._record(exemplar, answer, histories[user])
            items = self.items.numbers
            record["interests"] = [
                [_cut(i["text"], _MAX_NAME_CHARS), [items[j] for j in i["item_indices"] if j in items]]
                for i in sorted(interests.get(user, []), key=lambda i: i["interest_index"])
            ]
            if self._failed(answer["step"]):
                record["failed"] = True
                record["attempts"] = failures.get(user, [])
            yield _json(record)

    def _record(
        self, exemplar: Mapping[str, Any], answer: Mapping[str, Any], history: Exemplar
    ) -> dict[str, Any]:
        prompt = _cut(answer["prompt"], _MAX_TEXT_CHARS)
        return {
            "user": exemplar["user_index"],
            "user_id": _cut(exemplar["user_id"], _MAX_NAME_CHARS),
            "size": exemplar["num_users"],
            "history": [
                self.items.number(i.item_index, [i.item_index, _cut(i.title, _MAX_NAME_CHARS)])
                for i in history.history
            ],
            "prompt": [
                [self.pieces.number(p) for p in line.split(_ELEMENT_END)] for line in prompt.split("\n")
            ],
            "answer": _cut(answer["answer"], _MAX_TEXT_CHARS),
            "backend": answer["backend"],
            "model": _cut(answer["model"], _MAX_NAME_CHARS),
            "step": answer["step"],
            "tokens": [answer["num_prompt_tokens"], answer["num_answer_tokens"]],
            "seconds": round(answer["seconds"], 3),
        }

    def _histories(self, mine: Any) -> dict[int, Exemplar]:
        """The items that the prompts are made of, from the part of the catalogue that these exemplars know."""
        rows = self.prepare.read(
            "sequences/train", "sequences", columns=["user_index", "item_indices"], filter=mine
        ).to_pylist()
        known = {i for r in rows for i in r["item_indices"]}
        catalogue = self.prepare.read(
            "catalogue",
            "catalogue",
            columns=["item_index", "item_id", "title"],
            filter=pc.field("item_index").isin(pa.array(sorted(known), pa.int64())),
        )
        items = {
            r["item_index"]: HistoryItem(
                r["item_index"], (r["title"] or "").strip() or f"item {r['item_id']}"
            )
            for r in catalogue.to_pylist()
        }
        longest = self.manifest.config["max_history"]
        return {
            r["user_index"]: build_exemplar(r["user_index"], r["item_indices"], items, longest) for r in rows
        }

    def _failed(self, step: str) -> bool:
        """Whether a step stands for a failure; with the keyphrase backend itself it does not."""
        return step == KEYPHRASE and self.backend != KEYPHRASE

    def _failures(self) -> dict[int, list[list[str]]]:
        """User -> step, reason, detail and answer of each attempt that was not used."""
        found: dict[int, list[dict[str, str]]] = {}
        shown = set(self.users.to_pylist())
        for path in list_files(self.stage.fs, self.stage.path("failures"), ".jsonl"):
            with self.stage.fs.open_input_stream(path) as stream:
                rows = [json.loads(line) for line in stream.read().splitlines()]
            found |= {r["user_index"]: r["attempts"] for r in rows if r["user_index"] in shown}
        columns = ("step", "reason", "detail", "answer")
        return {u: [[_cut(a[c], _MAX_TEXT_CHARS) for c in columns] for a in found[u]] for u in found}

    def _facts(self, steps: Mapping[str, int]) -> str:
        """The figures at the top."""
        total, users = len(self.sizes), sum(self.sizes)
        failed = sum(n for s, n in steps.items() if self._failed(s))
        tokens = [pc.sum(self.answers[c]).as_py() or 0 for c in ("num_prompt_tokens", "num_answer_tokens")]
        seconds = pc.sum(self.answers["seconds"]).as_py() or 0.0
        rows = self.manifest.rows["interests"]
        facts = [
            ("Exemplars", f"{total:,}", f"for {users:,} users"),
            ("Interests", f"{rows:,}", f"{rows / total:.1f} per exemplar"),
            ("Failures", f"{failed:,}", f"{failed / total:.1%} of all"),
            ("Prompt tokens", f"{tokens[0]:,}", f"{tokens[0] / total:,.0f} per exemplar"),
            ("Answer tokens", f"{tokens[1]:,}", f"{tokens[1] / total:,.0f} per exemplar"),
            ("Engine time", _duration(seconds), f"{seconds / total:,.2f} s per exemplar"),
        ]
        return "\n".join(
            f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>"
            for name, value, note in facts
        )

    def _origin(self, shown: int) -> str:
        """What answered and when, and how much of it the page holds."""
        models = Counter(
            zip(self.answers["backend"].to_pylist(), self.answers["model"].to_pylist(), strict=True)
        )
        names = ", ".join(
            f"<bdi>{escape(_cut(model, _MAX_NAME_CHARS))}</bdi> "
            f"({'' if backend == self.backend else escape(backend) + ', '}{_counted(n, 'answer')})"
            for (backend, model), n in models.most_common()
        )
        lines = [
            f"Backend <b>{escape(self.backend)}</b>, model {names}",
            f"Interests made {_moment(self.manifest.created)}, page written {_moment(_now())}",
        ]
        if shown < len(self.sizes):
            lines.append(
                f"<strong>The page holds the {shown:,} largest of {len(self.sizes):,} clusters.</strong>"
            )
        return "\n".join(f"<p>{line}</p>" for line in lines)


def _require(workspace: Workspace, stage: StageDirectory) -> Manifest:
    """The manifest of a stage that was made from what is in the workspace now."""
    manifest = stage.require()
    for name in ("prepare", "exemplars"):
        if manifest.inputs.get(name) != workspace.stage(name).require().identity:
            raise WorkspaceError(
                f"{workspace.url}: the stage interests was made before the stage {name} that is there now: run "
                "`distributed-mi interests CONFIG` first"
            )
    return manifest


def _asset(name: str) -> str:
    return resources.files("distributed_mi.interests").joinpath(name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    """A style or script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand in a script element: no tag, comment or entity can begin in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_IN_SCRIPT)


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}… ({len(text) - max_chars:,} more characters)"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _moment(time_utc: str) -> str:
    """A time of the manifest's form, for people and for machines."""
    return f'<time datetime="{escape(time_utc)}">{escape(time_utc[:16].replace("T", " "))} UTC</time>'


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def _words(step: str) -> str:
    return step.replace("_", " ")


def _in_order(steps: Mapping[str, int]) -> list[str]:
    """The steps of the ladder, and what else stands in the table."""
    return list(dict.fromkeys([*STEPS, *sorted(steps)]))


def _size_classes(sizes: Sequence[int]) -> list[tuple[str, int]]:
    """Clusters by size, in powers of two: label and count."""
    counts = Counter(max(s, 1).bit_length() for s in sizes)
    return [
        ("1" if n == 1 else f"{2 ** (n - 1):,}-{2**n - 1:,}", counts[n]) for n in range(1, max(counts) + 1)
    ]


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    """Rows of a table with a bar each; a bar's length is an attribute, because the policy allows no style attribute."""
    longest = max(n for _, n in rows) or 1
    widths = [max(100 * n / longest, 0.6 if n else 0.0) for _, n in rows]
    return "\n".join(
        f'<tr><th scope="row">{escape(label)}</th><td><svg viewBox="0 0 100 10" preserveAspectRatio="none" '
        f'aria-hidden="true"><rect width="{width:.2f}" height="10"/></svg></td><td>{n:,}</td></tr>'
        for (label, n), width in zip(rows, widths, strict=True)
    )
