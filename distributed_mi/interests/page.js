"use strict";
// Shows the exemplars of the JSON element, a few at a time. Every text becomes a text node; nothing is read as HTML.
(() => {
  const PER_PAGE = 20;
  const DELAY_MS = 150;

  const byId = (id) => document.getElementById(id);
  const source = byId("data");
  const data = JSON.parse(source.textContent);
  source.remove();
  const { exemplars, items, pieces, steps } = data;

  const query = byId("query");
  const step = byId("step");
  const sort = byId("sort");
  const unfold = byId("unfold");
  let page = 0;
  let unfolded = false;
  let found = [];
  let pattern = null;

  // Text, folded so that case and compatibility forms (full width, ligatures) do not matter.
  const fold = (text) => text.normalize("NFKC").toLowerCase();
  const words = (name) => name.replaceAll("_", " ");
  const number = (n) => n.toLocaleString("en");
  const counted = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;

  function element(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children);
    return node;
  }

  // Search

  const folded = { titles: null, own: new Array(exemplars.length) };

  // What is searched of an exemplar apart from the titles of its history, which many exemplars share.
  function ownText(place) {
    if (folded.own[place] === undefined) {
      const e = exemplars[place];
      const attempts = (e.attempts ?? []).flat();
      const texts = [e.user_id, String(e.user), e.backend, e.model, e.answer];
      folded.own[place] = fold([...texts, ...e.interests.map((i) => i[0]), ...attempts].join("\n"));
    }
    return folded.own[place];
  }

  // Whether every word of the query is somewhere in an exemplar: a function of its place.
  function matcher(terms) {
    folded.titles ??= items.map((item) => fold(item[1]));
    const named = terms.map((term) => folded.titles.map((title) => title.includes(term)));
    return (place) =>
      terms.every((term, n) => exemplars[place].history.some((i) => named[n][i]) || ownText(place).includes(term));
  }

  const collator = new Intl.Collator("en", { numeric: true });
  const orders = { "": exemplars.map((_, place) => place) }; // the file lists the largest cluster first

  function order(name) {
    if (!orders[name]) {
      const by = {
        smallest: (a, b) => exemplars[a].size - exemplars[b].size || a - b,
        user: (a, b) => collator.compare(exemplars[a].user_id, exemplars[b].user_id) || a - b,
      };
      orders[name] = [...orders[""]].sort(by[name]);
    }
    return orders[name];
  }

  // One exemplar

  // A text with the words of the query marked.
  function marked(text) {
    if (!pattern) return [text];
    return text.split(pattern).map((part, n) => (n % 2 ? element("mark", "", part) : part));
  }

  // A text that may run from right to left, or try to turn what stands beside it.
  const isolated = (text, className) => element("bdi", className, ...marked(text));

  function disclosure(title, ...children) {
    const node = element("details", "", element("summary", "", title), ...children);
    node.open = unfolded;
    return node;
  }

  function interest([text, support]) {
    const node = element("li", "", isolated(text, "interest"));
    const titles = support.map((i) => element("li", "", isolated(items[i][1])));
    if (titles.length) node.append(element("ul", "support", ...titles));
    else node.append(element("p", "none", "no supporting item"));
    return node;
  }

  function history(e) {
    const list = e.history.map((i) =>
      element("li", "", isolated(items[i][1]), " ", element("span", "id", `(${items[i][0]})`)),
    );
    return disclosure(`History: ${counted(list.length, "item")}, oldest first`, element("ol", "history", ...list));
  }

  function attempts(e) {
    const list = e.attempts.map(([name, reason, detail, answer]) => {
      const node = element("li", "", element("b", "", `${words(name)}: ${words(reason)}`));
      if (detail && !answer.trim().startsWith(detail)) node.append(element("p", "", isolated(detail)));
      if (answer) node.append(element("pre", "", ...marked(answer)));
      return node;
    });
    const title = list.length ? `Attempts that failed: ${list.length}` : "Attempts that failed: not recorded";
    return disclosure(title, element("ol", "attempts", ...list));
  }

  function card(e) {
    const prompt = e.prompt.map((line) => line.map((n) => pieces[n]).join("), ")).join("\n");
    const label = words(e.step) + (e.failed ? " after failures" : "");
    const badge = element("span", e.failed ? "step failed" : `step ${e.step}`, label);
    badge.title = "step of the ladder that gave the answer";
    const node = element(
      "article",
      "",
      element(
        "header",
        "",
        element("h3", "", isolated(e.user_id), " ", element("span", "id", `user ${e.user}`)),
        badge,
        element("span", "size", counted(e.size, "user")),
      ),
      element("ol", "interests", ...e.interests.map(interest)),
    );
    if (e.failed) node.append(attempts(e));
    node.append(
      history(e),
      disclosure("Prompt", element("pre", "", ...marked(prompt))),
      disclosure("Answer as it came", element("pre", "", ...marked(e.answer))),
      element(
        "p",
        "source",
        `${e.backend} · `,
        isolated(e.model),
        ` · ${number(e.tokens[0])} + ${number(e.tokens[1])} tokens · ${e.seconds} s`,
      ),
    );
    // A match that stands in the details alone would look like no match.
    const match = node.querySelector("mark")?.closest("details");
    if (match) match.open = true;
    return node;
  }

  // The page

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const first = page * PER_PAGE;
    const cards = found.slice(first, first + PER_PAGE).map((place) => card(exemplars[place]));
    if (!cards.length) cards.push(element("p", "notice", "No exemplar matches. Use fewer words or another step."));
    byId("list").replaceChildren(...cards);
    byId("page").textContent = `Page ${number(page + 1)} of ${number(pages)}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }

  function search() {
    const terms = fold(query.value).split(/\s+/u).filter(Boolean);
    const escaped = terms.map((term) => term.replace(/[\\^$.*+?()[\]{}|]/gu, "\\$&"));
    pattern = terms.length ? new RegExp(`(${escaped.sort((a, b) => b.length - a.length).join("|")})`, "giu") : null;
    const matches = terms.length ? matcher(terms) : () => true;
    found = order(sort.value).filter((p) => (!step.value || exemplars[p].step === step.value) && matches(p));
    const all = counted(exemplars.length, "exemplar");
    byId("count").textContent = found.length === exemplars.length ? all : `${number(found.length)} of ${all}`;
    show();
  }

  // The state is in the fragment, so that a view can be bookmarked and sent on: #q=jazz&step=first&sort=user&page=2

  function writeFragment() {
    const state = new URLSearchParams();
    if (query.value) state.set("q", query.value);
    if (step.value) state.set("step", step.value);
    if (sort.value) state.set("sort", sort.value);
    if (page) state.set("page", String(page + 1));
    try {
      window.history.replaceState(null, "", `#${state}`);
    } catch {
      // A browser may forbid it for files; the page works without.
    }
  }

  function readFragment() {
    const state = new URLSearchParams(location.hash.slice(1));
    query.value = state.get("q") ?? "";
    for (const [name, control] of [["step", step], ["sort", sort]]) {
      const wanted = state.get(name) ?? "";
      control.value = [...control.options].some((o) => o.value === wanted) ? wanted : "";
    }
    page = (Number.parseInt(state.get("page") ?? "1", 10) || 1) - 1;
    search();
  }

  function changed() {
    page = 0;
    search();
    writeFragment();
  }

  function turn(by) {
    page += by;
    show();
    writeFragment();
    byId("count").focus({ preventScroll: true });
    byId("browse").scrollIntoView();
  }

  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(changed, DELAY_MS);
  });
  step.addEventListener("change", changed);
  sort.addEventListener("change", changed);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  unfold.addEventListener("click", () => {
    unfolded = !unfolded;
    unfold.textContent = unfolded ? "Close all details" : "Open all details";
    for (const node of byId("list").querySelectorAll("details")) node.open = unfolded;
  });
  window.addEventListener("hashchange", readFragment);
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element && event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      query.focus();
    } else if (event.key === "Escape" && event.target === query) {
      query.value = "";
      clearTimeout(waiting);
      changed();
    }
  });

  for (const [name, count] of steps) {
    if (count) step.append(new Option(`${words(name)} (${number(count)})`, name));
  }
  byId("browse").hidden = false;
  readFragment();
})();
