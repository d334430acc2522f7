"""The page: all that is in the tables, nothing that can run or be fetched, and the same in a browser."""

import base64
import hashlib
import http.server
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from distributed_mi.core.artifacts import StageKey, Workspace, list_files
from distributed_mi.core.errors import ConfigError, InputError, WorkspaceError
from distributed_mi.interests import page
from distributed_mi.interests.backends.base import Request, Response
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.ladder import STEPS
from distributed_mi.interests.page import write_page
from distributed_mi.interests.stage import run
from tests.unit.interests import chromium
from tests.unit.interests.chromium import Chromium
from tests.unit.interests.fakes import SCRIPTED, ScriptedBackend, encode, make_workspace, no_ray

HOSTILE = [
    "</script><script>document.title = 'pwned'</script>",
    "<!--<script>document.title = 'pwned'//",
    "<img src=x onerror=\"document.title = 'pwned'\">",
    "<img src=http://127.0.0.1:{port}/{n}.png>",
    "<svg onload=document.title='pwned'><style>@import 'http://127.0.0.1:{port}/{n}.css'</style>",
    "javascript:document.title='pwned'",
    "</noscript></style></title><iframe src='javascript:document.title=1'></iframe>",
    '"]}],"exemplars":[],"x":"&quot;&lt;b&gt;\\',
    "\u202eright to left\u202d \u2066never closed \u200f\u2028\u2029\ufeff\x00\x1b[31m",
    "${document.title='pwned'} $data $policy {{constructor}} %s",
    "ten kilobytes " * 750,
    "Ünïcødé 日本語 עברית العربية 🎷\U0001f469\u200d\U0001f4bb jazz",
]


def scripted(**fields: Any) -> InterestsConfig:
    script = {k: fields.pop(k) for k in list(fields) if k not in InterestsConfig.model_fields}
    return InterestsConfig(backend={"name": SCRIPTED, **script}, **{"short_history": 3, **fields})


def start(config: InterestsConfig, workspace: Workspace) -> None:
    run(config, workspace, encode=encode, start_ray=no_ray)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w", num_users=40)


def rewrite(workspace: Workspace, stage: str, folder: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every row of a table in place; the manifest does not notice."""
    for path in list_files(workspace.fs, workspace.stage(stage).path(folder), ".parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            change(row)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def hostile(n: int, port: int = 9) -> str:
    """The n-th of any number of hostile texts."""
    return HOSTILE[n % len(HOSTILE)].replace("{port}", str(port)).replace("{n}", str(n))


def make_hostile(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, port: int = 9) -> None:
    """Titles, user ids, answers and errors are all hostile; user 0 also likes something harmless."""

    def respond(self: ScriptedBackend, request: Request) -> Response:
        user, ids = request.user_index, [i.item_index for i in request.exemplar.history]
        if user % 20 == 8:
            return Response(user, finish_reason="error", error=hostile(user, port))
        if user % 20 == 12:
            return Response(user, hostile(user, port))
        interests = [{"text": f"{hostile(user + n, port)} {user}", "item_ids": ids[n::3]} for n in range(3)]
        answer = {"interests": interests, "note": hostile(user + 3, port)}
        return Response(
            user, json.dumps(answer, ensure_ascii=False), num_prompt_tokens=10, num_answer_tokens=5
        )

    rewrite(
        workspace,
        "prepare",
        "catalogue",
        lambda r: r.update(title=f"{hostile(r['item_index'], port)} {r['item_id']}"),
    )
    rewrite(workspace, "exemplars", "exemplars", lambda r: r.update(user_id=hostile(r["user_index"], port)))
    monkeypatch.setattr(ScriptedBackend, "_respond", respond)
    start(scripted(max_failed_fraction=1.0), workspace)


@dataclass
class Elements(HTMLParser):
    """Start tags with attributes, the text in scripts and styles, and all other text with single spaces."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw[-1] += data
        else:
            self.text += f" {' '.join(data.split())}" if data.strip() else ""

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a name."""
        return [attributes for name, attributes in self.tags if name == tag]


def parse(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    elements.close()
    return elements


def written(workspace: Workspace, **options: Any) -> str:
    return Path(write_page(workspace, **options)).read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, Any]:
    """What the page's script reads, with the numbers resolved."""
    data = json.loads(parse(text).raw[1])
    for e in data["exemplars"]:
        e["prompt"] = "\n".join("), ".join(data["pieces"][n] for n in line) for line in e["prompt"])
        e["history"] = [data["items"][n] for n in e["history"]]
        e["interests"] = [[text, [data["items"][n] for n in support]] for text, support in e["interests"]]
    return data


# What is on it.


def test_every_exemplar_is_there_with_all_that_the_tables_say(workspace: Workspace) -> None:
    start(scripted(prose=[4]), workspace)
    stage, prepare = workspace.stage("interests"), workspace.stage("prepare")
    shown = {e["user"]: e for e in data_of(written(workspace))["exemplars"]}
    assert set(shown) == set(range(0, 40, 2))
    titles = {
        r["item_index"]: r["title"] or f"item {r['item_id']}"
        for r in prepare.read("catalogue", "catalogue").to_pylist()
    }
    for row in prepare.read("sequences/train", "sequences").to_pylist():
        if row["user_index"] in shown:
            assert shown[row["user_index"]]["history"] == [[i, titles[i]] for i in row["item_indices"]]
            assert shown[row["user_index"]]["user_id"] == row["user_id"]
    for row in stage.read("answers", "answers").to_pylist():
        e = shown[row["user_index"]]
        assert [e[c] for c in ("prompt", "answer", "backend", "model", "step")] == [
            row[c] for c in ("prompt", "answer", "backend", "model", "step")
        ]
        assert e["tokens"] == [row["num_prompt_tokens"], row["num_answer_tokens"]]
        assert e["size"] == 2
    interests: dict[int, list[Any]] = {}
    for row in stage.read("interests", "interests").to_pylist():
        support = [[i, titles[i]] for i in row["item_indices"]]
        interests.setdefault(row["user_index"], []).append([row["text"], support])
    assert {u: e["interests"] for u, e in shown.items()} == interests
    assert shown[4]["step"] == "shorter_history"


def test_the_figures_are_those_of_the_stage(workspace: Workspace) -> None:
    start(scripted(prose=[4], always_prose=[6], max_failed_fraction=1.0), workspace)
    text = parse(written(workspace)).text
    manifest = workspace.stage("interests").require()
    steps, created = manifest.stats["steps"], manifest.created
    assert {s: n for s, n in steps.items() if n} == {"first": 18, "shorter_history": 1, "keyphrase": 1}
    for expected in (
        "Exemplars 20 for 40 users",
        f"Interests {manifest.rows['interests']} ",
        "Failures 1 5.0% of all",
        f"Prompt tokens {manifest.stats['num_prompt_tokens']} ",
        f"Answer tokens {manifest.stats['num_answer_tokens']} ",
        f"Backend {SCRIPTED} , model scripted-1 (19 answers), keyphrase-2 (keyphrase, 1 answer)",
        f"Interests made {created[:10]} {created[11:16]} UTC , page written 20",
        " ".join(f"{s.replace('_', ' ')} {steps[s]}" for s in STEPS),
        "number of users 1 0 2-3 20",
    ):
        assert expected in text


def test_failures_are_shown_with_their_attempts(workspace: Workspace) -> None:
    start(scripted(always_prose=[8], poison=[10], max_failed_fraction=0.2), workspace)
    shown = {e["user"]: e for e in data_of(written(workspace))["exemplars"]}
    assert {u for u, e in shown.items() if e.get("failed")} == {8, 10}
    assert [a[:2] for a in shown[8]["attempts"]] == [["first", "not_json"], ["shorter_history", "not_json"]]
    assert shown[8]["attempts"][0][3] == "I would say that this person likes things."
    assert "bad prompt in the batch" in shown[10]["attempts"][0][2]
    assert shown[8]["interests"]


def test_the_keyphrase_backend_itself_does_not_fail(workspace: Workspace) -> None:
    start(InterestsConfig(), workspace)
    text = written(workspace)
    assert not any("failed" in e for e in data_of(text)["exemplars"])
    assert "Failures 0 0.0%" in parse(text).text


def test_limit_keeps_the_largest_clusters_and_the_figures_of_all(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(workspace, "exemplars", "exemplars", lambda r: r.update(num_users=1 + r["user_index"] % 7))
    start(scripted(), workspace)
    text = written(workspace, limit=4)
    assert [(e["user"], e["size"]) for e in data_of(text)["exemplars"]] == [(6, 7), (20, 7), (34, 7), (12, 6)]
    plain = parse(text).text
    assert "Exemplars 20 for" in plain
    assert "The page holds the 4 largest of 20 clusters." in plain
    assert "largest of" not in parse(written(workspace)).text
    assert len(data_of(written(workspace, limit=99))["exemplars"]) == 20
    monkeypatch.setattr(page, "MAX_DATA_CHARS", 8_000)
    text = written(workspace)
    left = [e["user"] for e in data_of(text)["exemplars"]]
    assert left[:4] == [6, 20, 34, 12]
    assert 4 < len(left) < 20
    assert f"The page holds the {len(left)} largest of 20 clusters." in parse(text).text
    with pytest.raises(ConfigError, match="at least 1: 0"):
        write_page(workspace, limit=0)


def test_long_texts_are_cut_and_say_so(workspace: Workspace) -> None:
    rewrite(workspace, "prepare", "catalogue", lambda r: r.update(title="jazz" * 2500))
    start(scripted(), workspace)
    (_, title), *_ = data_of(written(workspace))["items"]
    assert title == "jazz" * 75 + "… (9,700 more characters)"


# Where it lies.


def test_it_lies_beside_the_manifest_and_goes_with_the_result(workspace: Workspace) -> None:
    start(scripted(), workspace)
    path = Path(write_page(workspace))
    assert path == Path(workspace.root) / "interests" / "report.html"
    write_page(workspace)
    assert sorted(p.name for p in path.parent.iterdir() if p.is_file()) == ["manifest.json", "report.html"]
    start(scripted(max_history=4), workspace)
    assert not path.exists()


def test_another_place(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(scripted(), workspace)
    monkeypatch.chdir(tmp_path)
    assert write_page(workspace, "new/page.html") == "new/page.html"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]
    url = (tmp_path / "other.html").as_uri()
    assert write_page(workspace, url) == url
    assert (tmp_path / "other.html").exists()
    with pytest.raises(InputError, match="folder"):
        write_page(workspace, str(tmp_path / "new"))
    with pytest.raises(InputError, match="cannot write"):
        write_page(workspace, str(tmp_path / "new" / "page.html" / "x.html"))


def test_missing_and_mismatched_stages_are_named(workspace: Workspace) -> None:
    with pytest.raises(
        WorkspaceError, match="no complete stage interests: run `distributed-mi interests CONFIG`"
    ):
        write_page(workspace)
    start(scripted(), workspace)
    other = workspace.stage("exemplars").open(StageKey("exemplars", {}, {"n": 0}))
    other.commit(rows={"exemplars": 0})
    with pytest.raises(
        WorkspaceError, match=r"before the stage exemplars .* run `distributed-mi interests CONFIG`"
    ):
        write_page(workspace)


def test_it_is_the_same_every_time_but_for_the_time(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hostile(workspace, monkeypatch)
    monkeypatch.setattr(page, "_now", lambda: "2001-02-03T04:05:06Z")
    first = written(workspace)
    assert written(workspace, path=str(tmp_path / "again.html")) == first
    monkeypatch.undo()
    then = re.search(r"page written <time .*?</time>", first)
    assert then
    assert re.sub(r"page written <time .*?</time>", then.group(), written(workspace)) == first
    assert workspace.root not in first


# What cannot happen.


def test_hostile_texts_end_no_element_and_arrive_unchanged(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_workspace(tmp_path / "harmless", num_users=40)
    start(scripted(), other)
    harmless = parse(written(other))
    make_hostile(workspace, monkeypatch)
    text = written(workspace)
    elements = parse(text)
    shape = [tag for tag, _ in elements.tags if tag not in ("tr", "th", "td", "svg", "rect", "bdi")]
    assert shape == [tag for tag, _ in harmless.tags if tag in shape]
    assert len(elements.named("script")) == 2
    assert not set("<>&\u2028\u2029") & set(elements.raw[1])
    data = data_of(text)
    rows = workspace.stage("prepare").read("catalogue", "catalogue").to_pylist()
    titles = {r["item_index"]: r["title"].strip() for r in rows}
    assert {n: t for n, t in data["items"] if len(titles[n]) <= 300} == {
        n: titles[n] for n, _ in data["items"] if len(titles[n]) <= 300
    }
    answers = workspace.stage("interests").read("answers", "answers").to_pylist()
    shown = {e["user"]: e for e in data["exemplars"]}
    assert [shown[r["user_index"]]["answer"] for r in answers] == [r["answer"] for r in answers]
    assert [shown[r["user_index"]]["prompt"] for r in answers] == [r["prompt"] for r in answers]
    assert any(hostile(8)[:100] in a[2] for a in shown[8]["attempts"])


def test_half_a_surrogate_pair_is_written(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    start(scripted(), workspace)
    monkeypatch.setattr(page, "_words", lambda step: step)
    monkeypatch.setattr(page._Page, "_failures", lambda self: {0: [["first", "x", "\ud800", ""]]})
    monkeypatch.setattr(page._Page, "_failed", lambda self, step: True)
    shown = {e["user"]: e for e in data_of(written(workspace))["exemplars"]}
    assert shown[0]["attempts"][0][2] == "\ud800"


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(workspace: Workspace) -> None:
    start(scripted(), workspace)
    content = Path(write_page(workspace)).read_bytes()

    def source(opening: bytes, closing: bytes) -> str:
        (inside,) = re.findall(opening + b"(.*?)" + closing, content, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"

    elements = parse(content.decode())
    (policy,) = [
        m["content"] for m in elements.named("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == (
        f"default-src 'none'; style-src {source(b'<style>', b'</style>')}; "
        f"script-src {source(b'<script>', b'</script>')}; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    before = [tag for tag, _ in elements.tags]
    assert before.index("style") > [a.get("http-equiv") for _, a in elements.tags].index(
        "Content-Security-Policy"
    )
    attributes = {name for _, attributes in elements.tags for name in attributes}
    assert not [a for a in attributes if a.startswith("on") or a == "style"]
    assert b"\r" not in content


def test_nothing_refers_to_the_outside(workspace: Workspace) -> None:
    start(scripted(), workspace)
    elements = parse(written(workspace))
    style, _, script = elements.raw
    attributes = {name for _, attributes in elements.tags for name in attributes}
    assert not attributes & {
        "src",
        "href",
        "srcset",
        "action",
        "formaction",
        "poster",
        "background",
        "xlink:href",
    }
    assert not {tag for tag, _ in elements.tags} & {
        "link",
        "base",
        "iframe",
        "object",
        "embed",
        "img",
        "a",
        "form",
    }
    assert not re.search(r"url\(|@import|image-set|://", style)
    assert not re.search(
        r"://|import\b|fetch|XMLHttp|WebSocket|innerHTML|outerHTML|insertAdjacent|write\(|eval", script
    )
    assert "://" not in elements.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(scheme: str) -> None:
    """At least 4.5 : 1 for text and 3 : 1 for the marks of a control, as WCAG 2 asks at level AA."""
    style = page._asset("page.css")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", style.split("@media")[0]))
    if scheme == "dark":
        assert "prefers-color-scheme: dark" in style
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6});", style.split("@media")[1]))

    def luminance(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(ink, paper) for ink in ("text", "muted", "accent") for paper in ("page", "card")]
    pairs += [("text", "mark"), *((c, f"{c}-soft") for c in ("accent", "good", "warn", "bad"))]
    for ink, paper in pairs:
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_it_can_be_read_by_everyone(workspace: Workspace) -> None:
    start(scripted(), workspace)
    elements = parse(written(workspace))
    assert elements.named("html") == [{"lang": "en"}]
    labelled = {label["for"] for label in elements.named("label")}
    controls = {c["id"] for tag in ("input", "select") for c in elements.named(tag)}
    assert labelled == controls == {"query", "step", "sort"}
    assert len(elements.named("caption")) == 2
    assert elements.named("noscript")
    assert "needs JavaScript" in elements.text


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = chromium.find()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(chromium.NAMES)} is on the path")
    with Chromium(path, tmp_path_factory.mktemp("profile")) as found:
        yield found


class Canary(http.server.BaseHTTPRequestHandler):
    """Notes every request."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def canary() -> Iterator[tuple[int, list[str]]]:
    """Port of a server on this machine that hostile texts name, and the paths that it was asked for."""
    asked: list[str] = []
    handler = type("Handler", (Canary,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


def url_of(workspace: Workspace) -> str:
    return Path(write_page(workspace)).as_uri()


def shown_users(browser: Chromium) -> list[int]:
    """Numbers of the users whose exemplars stand on the page, in its order."""
    text = browser.evaluate("[...document.querySelectorAll('h3 .id')].map((e) => e.textContent).join()")
    return [int(u) for u in re.findall(r"\d+", text)]


def count(browser: Chromium) -> str:
    return browser.evaluate("document.getElementById('count').textContent")


def choose(browser: Chromium, control: str, value: str) -> None:
    """Choose an option of a list, as a person would."""
    element = f"document.getElementById('{control}')"
    browser.evaluate(f"{element}.value = '{value}', {element}.dispatchEvent(new Event('change')), 0")


def test_a_browser_runs_and_fetches_nothing_hostile(
    browser: Chromium, canary: tuple[int, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, asked = canary
    workspace = make_workspace(tmp_path / "w", num_users=100)
    make_hostile(workspace, monkeypatch, port)
    url = url_of(workspace)
    browser.open(url)
    users = shown_users(browser)
    for _ in range(2):
        browser.evaluate("document.getElementById('next').click()")
        users += shown_users(browser)
        browser.evaluate("document.getElementById('unfold').click()")
        names = set(browser.evaluate("[...document.querySelectorAll('*')].map((e) => e.localName)"))
        assert not names & {"img", "iframe", "object", "embed", "link", "base", "form", "a"}
        assert browser.evaluate("document.scripts.length") == 1  # the JSON is taken out, nothing came
    assert sorted(users) == list(range(0, 100, 2))
    assert browser.evaluate("document.title") == "Interests of the exemplars"
    assert browser.evaluate("document.querySelectorAll('bdi').length") > 100
    assert browser.said == []
    assert browser.asked == [url]
    assert asked == []
    titles = {r["title"] for r in workspace.stage("prepare").read("catalogue", "catalogue").to_pylist()}
    seen = set(browser.evaluate("[...document.querySelectorAll('.history bdi')].map((e) => e.textContent)"))
    assert len(seen) > 20
    assert {t for t in seen if "more characters" not in t} <= {t.strip() for t in titles}


def test_a_browser_enforces_the_policy(
    browser: Chromium, canary: tuple[int, list[str]], workspace: Workspace, tmp_path: Path
) -> None:
    """The test above could see an intrusion: a script and a picture in the HTML itself are refused and reported."""
    port, asked = canary
    start(scripted(), workspace)
    planted = (
        f"<img src='http://127.0.0.1:{port}/x.png' onerror='document.title = 1'>"
        "<script>document.title = 'pwned'</script><style>body { display: none }</style>"
    )
    path = tmp_path / "planted.html"
    path.write_text(written(workspace).replace("<noscript>", f"{planted}<noscript>"), encoding="utf-8")
    browser.open(path.as_uri())
    said = browser.said
    for directive in ("img-src", "default-src", "script-src", "style-src"):
        assert any(directive in s for s in said), said
    assert browser.evaluate("document.title") == "Interests of the exemplars"
    assert browser.evaluate("getComputedStyle(document.body).display") == "block"
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        browser.evaluate("document.body.innerHTML = '<b>x</b>'")
    assert asked == []


@pytest.mark.parametrize(
    ("fragment", "expected", "users"),
    [
        ("", "20 exemplars", list(range(0, 40, 2))),
        ("#q=INTEREST+OF+12", "1 of 20 exemplars", [12]),
        ("#q=%EF%BD%8A%EF%BD%81%EF%BD%9A%EF%BD%9A%20number%20u8", "1 of 20 exemplars", [8]),
        ("#q=likes", "1 of 20 exemplars", [8]),
        ("#q=nothing+like+it", "0 of 20 exemplars", []),
        ("#q=%5B(.*", "0 of 20 exemplars", []),
        ("#step=keyphrase", "1 of 20 exemplars", [8]),
        ("#step=nonsense&page=999&sort=x", "20 exemplars", list(range(0, 40, 2))),
    ],
)
def test_the_fragment_sets_search_and_filters(
    browser: Chromium, workspace: Workspace, fragment: str, expected: str, users: list[int]
) -> None:
    start(scripted(always_prose=[8], max_failed_fraction=1.0), workspace)
    browser.open(url_of(workspace) + fragment)
    assert browser.said == []
    assert count(browser) == expected
    assert shown_users(browser) == users
    marks = browser.evaluate("[...document.querySelectorAll('mark')].map((e) => e.textContent.toLowerCase())")
    if fragment == "#q=INTEREST+OF+12":
        assert {"interest", "of", "12"} == set(marks)
    if fragment == "#q=likes":  # it stands in a failed attempt only, whose details are opened for it
        assert set(marks) == {"likes"}
        assert browser.evaluate("document.querySelectorAll('details[open] .attempts').length") == 1


def test_the_keyboard_is_enough(browser: Chromium, workspace: Workspace) -> None:
    start(scripted(prose=[4], always_prose=[8], max_failed_fraction=1.0), workspace)
    browser.open(url_of(workspace))
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "query"
    browser.insert("interest of 12")
    browser.wait("document.getElementById('count').textContent === '1 of 20 exemplars'")
    assert shown_users(browser) == [12]
    assert browser.evaluate("location.hash") == "#q=interest+of+12"
    browser.press("Escape")
    browser.wait("document.getElementById('count').textContent === '20 exemplars'")
    order = []
    for _ in range(6):
        browser.press("Tab")
        order.append(browser.evaluate("document.activeElement.id || document.activeElement.localName"))
    assert order == ["step", "sort", "unfold", "summary", "summary", "summary"]
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.parentElement.open")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    choose(browser, "step", "shorter_history")
    assert shown_users(browser) == [4]
    assert browser.evaluate("location.hash") == "#step=shorter_history"


def test_order(browser: Chromium, workspace: Workspace) -> None:
    rewrite(workspace, "exemplars", "exemplars", lambda r: r.update(num_users=50 - r["user_index"] % 9))
    start(scripted(), workspace)
    browser.open(url_of(workspace))
    by_size = sorted(range(0, 40, 2), key=lambda u: (u % 9, u))
    assert shown_users(browser) == by_size
    choose(browser, "sort", "smallest")
    assert shown_users(browser) == sorted(range(0, 40, 2), key=lambda u: (-(u % 9), u))
    choose(browser, "sort", "user")
    assert shown_users(browser) == list(range(0, 40, 2))


def test_ten_thousand_exemplars_stay_quick(browser: Chromium, workspace: Workspace, tmp_path: Path) -> None:
    start(scripted(), workspace)
    text = written(workspace)
    _, raw, _ = parse(text).raw
    data = json.loads(raw)
    copies = [{**e, "user_id": f"{e['user_id']}-{n}"} for n in range(500) for e in data["exemplars"]]
    path = tmp_path / "many.html"
    path.write_text(text.replace(raw, page._json({**data, "exemplars": copies})), encoding="utf-8")
    browser.open(path.as_uri())
    assert count(browser) == "10,000 exemplars"
    assert browser.evaluate("document.querySelectorAll('article').length") == 20
    measure = (
        "(() => {{ const start = performance.now(); location.hash = '{}'; return new Promise((done) => "
        "addEventListener('hashchange', () => done(performance.now() - start), {{ once: true }})); }})()"
    )
    for fragment in ("q=jazz", "q=u12-77", "q=interest+17&sort=user"):
        assert browser.evaluate(measure.format(fragment)) < 3000  # 0.1 s on an idle machine
    assert count(browser) not in ("10,000 exemplars", "0 of 10,000 exemplars")


def test_without_scripts_it_says_where_things_are(browser: Chromium, workspace: Workspace) -> None:
    start(scripted(), workspace)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(url_of(workspace))
        assert "needs JavaScript" in browser.evaluate("document.querySelector('noscript').innerText")
        assert browser.evaluate("document.querySelector('.facts').offsetHeight") > 50
        assert browser.evaluate("document.getElementById('browse').offsetHeight") == 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_it_prints(browser: Chromium, workspace: Workspace) -> None:
    start(scripted(), workspace)
    browser.open(url_of(workspace))
    browser.prefer("dark", "print")
    try:
        for part in (".controls", "#unfold", "#next"):
            assert browser.evaluate(f"getComputedStyle(document.querySelector('{part}')).display") == "none"
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        ink = browser.evaluate("getComputedStyle(document.querySelector('.step')).color")
        assert sum(map(int, re.findall(r"\d+", ink))) < 300
    finally:
        browser.prefer("light")
    pdf = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (400, 1600)])
def test_pictures_of_it_are_not_blank(
    browser: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=100)
    make_hostile(workspace, monkeypatch)
    browser.size(width, height)
    brightness = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(url_of(workspace))
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        pixels = (255 * imread(io.BytesIO(browser.picture()))[:, :, :3]).astype(np.uint8)
        assert pixels.shape == (height, width, 3)
        assert len(np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]))) > 50
        inked = (pixels != pixels[0, 0]).any(axis=(1, 2))
        assert inked[height // 2 :].mean() > 0.2  # the list is there, not the header alone
        brightness[scheme] = pixels.mean()
    browser.prefer("light")
    assert brightness["light"] > 200 > 60 > brightness["dark"]
