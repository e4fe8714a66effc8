// ---- the page: its head, its tabs, and where in it one is -------------------------------

const data = JSON.parse(document.getElementById("data").textContent);

const paragraphs = (lines, css = "") => lines.map((line) => element("p", { class: css }, line));
const figure = (drawing, caption) => (drawing ? element("figure", { class: "card" }, element("figcaption", {}, caption), drawing) : null);
const cell = (key, head, text, more = {}) => ({ key, head, cell: text, order: more.text ? text : undefined, ...more });

function command(text) {
  const button = element("button", { type: "button", class: "action", onclick: () => {
    navigator.clipboard?.writeText(text).then(() => { button.textContent = "copied"; });
  } }, "copy");
  return element("div", { class: "command" }, element("pre", {}, text), button);
}

const link = (name, text = name) => (data.sites.name.includes(name)
  ? element("a", { href: `#operators/${encodeURIComponent(name)}`, class: "path" }, text) : element("span", { class: "path" }, text));

function cards() {
  return element("div", { class: "cards" }, data.cards.map((card) => element("section", { class: "card" },
    element("h2", {}, card.title), element("div", { class: "big" }, card.big),
    card.share === undefined || card.share === null ? null : element("div", { class: "track" }, element("span", { style: `width:${Math.min(100 * card.share, 100).toFixed(1)}%` })),
    paragraphs(card.lines))));
}

// ---- what one percent more buys, and less sells -----------------------------------------

function moves(title, given) {
  if (!given) return [element("h2", {}, title), element("p", { class: "soft" }, "Nothing would change.")];
  const number = (key, head, at, write) => ({ key, head, cell: (row) => write(row[at]), order: (row) => (typeof row[at] === "number" ? row[at] : Number(String(row[at]).replace(/[^\d.e-]/g, ""))) });
  const signed = (x) => (x > 0 ? "+" : "") + WRITE.loss(x);
  return [
    element("h2", {}, title), element("p", { class: "said" }, given.text),
    element("p", { class: "soft" }, "By the price alone; what that leaves of the budget the plan spends on a few larger ranks."),
    smallTable([
      { key: "name", head: "operators", left: true, cell: (row) => link(row[5], row[0]), order: (row) => row[0] },
      { key: "now", head: "at the price now", left: true, cell: (row) => row[1], order: (row) => row[1] },
      { key: "then", head: "would take", left: true, cell: (row) => row[2], order: (row) => row[2] },
      number("cost", given.unit, 3, String),
      number("loss", `change of ${data.loss.label}`, 4, signed),
      { key: "part", head: "of the change", cell: (row) => (given.loss ? WRITE.percent(row[4] / given.loss) : "–"), order: (row) => Math.abs(row[4]) },
    ], given.rows),
  ];
}

function budgetTab() {
  const given = data.budget;
  if (!given.frontier) return [paragraphs(given.lines), element("p", { class: "soft" }, given.why)];
  return [
    paragraphs(given.lines, "soft"),
    figure(frontierPlot(given.frontier), "The least loss at other budgets: at no point can a plan of that cost lose less. Losses are fitted ones, which ranks are chosen by."),
    moves("What the next percent would buy", given.more),
    moves("What saving a percent would cost", given.less),
  ];
}

function predictionTab() {
  const given = data.prediction;
  return [
    smallTable([{ key: "what", head: "loss", left: true, cell: (row) => row[0] }, { key: "value", head: "value", cell: (row) => row[1] }, { key: "unit", head: "", left: true, cell: (row) => row[2] }], given.rows),
    paragraphs(given.lines, "soft"),
    given.scatter ? figure(draw(given.scatter), "Every site rewritten alone: measured against predicted loss, two standard errors either way" + (given.scatter.lines.length ? "; on the dashed line they are equal" : ""))
      : element("p", { class: "soft" }, "Sites were not measured one at a time: fxcompress.measure does, or --measure on the command line."),
  ];
}

function rulesTab() {
  const rows = data.rules, timed = rows.some((row) => row.seconds), measured = rows.some((row) => row.measured !== null);
  const sum = (key) => rows.reduce((a, row) => a + (row[key] ?? 0), 0);
  const times = (at) => rows.reduce((a, row) => a + (row.seconds ? row.seconds[at] : 0), 0);
  const total = { rule: "all rules", source: "", matched: sum("matched"), rewritten: sum("rewritten"), before: sum("before"), after: sum("after"),
    predicted: sum("predicted"), measured: measured ? sum("measured") : null, seconds: timed ? [times(0), times(1)] : null };
  const number = (key, head, write) => ({ key, head, cell: (row) => written(write, row[key]), order: (row) => row[key] });
  const text = (key, head) => ({ key, head, left: true, cell: (row) => row[key], order: (row) => row[key] });
  const columns = [text("rule", "rule"), text("source", "source"), number("matched", "matched", "count"), number("rewritten", "rewritten", "count"),
    { key: "dense", head: "left dense", cell: (row) => WRITE.count(row.matched - row.rewritten), order: (row) => row.matched - row.rewritten },
    number("before", "parameters before", "count"), number("after", "after", "count"),
    { key: "kept", head: "kept", cell: (row) => (row.before ? WRITE.percent(row.after / row.before) : "–"), order: (row) => row.after / row.before },
    number("predicted", `predicted ${data.loss.label}`, "loss"),
    { key: "share", head: "share of loss", cell: (row) => WRITE.share(total.predicted ? row.predicted / total.predicted : 0), order: (row) => row.predicted }];
  if (measured) columns.push(number("measured", "measured KL, sites alone", "loss"));
  if (timed) columns.push(...[0, 1].map((at) => ({ key: "time" + at, head: ["time before", "time after"][at], cell: (row) => written("seconds", row.seconds[at]), order: (row) => row.seconds[at] })));
  return [rows.length ? smallTable(columns, rows, { total }) : element("p", { class: "soft" }, "No rule matched any operator.")];
}

function unchangedTab() {
  const names = (row) => row.names.map((name) => element("span", { class: "path" }, name || "(root)"));
  return [
    data.unchanged.length ? smallTable([
      { key: "names", head: "operators", left: true, cell: names, order: (row) => row.names[0] },
      { key: "count", head: "number", cell: (row) => WRITE.count(row.count), order: (row) => row.count },
      { key: "what", head: "operator", left: true, cell: (row) => row.what, order: (row) => row.what },
      { key: "parameters", head: "parameters", cell: (row) => WRITE.count(row.parameters), order: (row) => row.parameters },
      { key: "reason", head: "why", left: true, cell: (row) => row.reason, order: (row) => row.reason },
    ], data.unchanged, { css: "wrap" }) : element("p", { class: "soft" }, "Every operator with a weight was rewritten."),
    data.expanded.length ? element("p", { class: "soft" }, `Split into projections, to be rewritten one by one: ${data.expanded.join(", ")}`) : null,
  ];
}

function runsTab() {
  const given = data.rounds;
  return [element("p", { class: "number" }, given.big), figure(given.plot && draw(given.plot), given.plot?.title + (given.plot?.note ? `; ${given.plot.note}` : "")), element("pre", {}, given.lines.join("\n"))];
}

function reproduceTab() {
  const given = data.reproduce, whole = given.stages.reduce((a, [, s]) => a + s, 0);
  return [
    element("h2", {}, "Make it again"), command(given.compile),
    element("h2", {}, "Load it"), element("p", { class: "soft" }, "with the directory that it was saved to" + (given.load.includes("model") ? ", and a dense model made anew" : "")), command(given.load),
    element("h2", {}, "Made with"), element("dl", {}, given.facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    given.earlier.length ? paragraphs([`rewritten before: ${given.earlier.join("; ")}`]) : null,
    given.stages.length ? [element("h2", {}, "Seconds per stage"), smallTable([
      { key: "stage", head: "stage", left: true, cell: (row) => row[0], order: (row) => row[0] },
      { key: "seconds", head: "seconds", cell: (row) => row[1].toFixed(1), order: (row) => row[1] },
      { key: "share", head: "share", cell: (row) => WRITE.percent(whole ? row[1] / whole : 0), order: (row) => row[1] },
    ], given.stages, { total: ["all", whole] })] : null,
    paragraphs(given.graph, "soft"),
  ];
}

function comparisonTab() {
  const other = data.other;
  return [
    smallTable([{ key: "what", head: "", left: true, cell: (row) => row[0] }, { key: "here", head: other.here, cell: (row) => row[1] }, { key: "there", head: other.there, cell: (row) => row[2] }], other.rows),
    element("p", { class: "soft" }, "The table of operators has both beside each other."),
    other.only.length ? paragraphs([`Only in the other plan: ${other.only.join(", ")}`]) : null,
  ];
}

// ---- many budgets -----------------------------------------------------------------------

function sweepTab() {
  const order = (at) => (row) => { const x = Number(row[at].replace(/[,%×]/g, "").replace(/k$/, "e3").replace(/M$/, "e6").replace(/G$/, "e9").replace(/T$/, "e12")); return row[at] === "" || Number.isNaN(x) ? row[at] : x; };
  const columns = data.heads.map((head, at) => ({ key: String(at), head, left: at === 0, cell: (row) => row[at], order: order(at) }));
  return [
    element("div", { class: "figures" }, data.plots.map((plot) => figure(draw(plot), plot.title + (plot.note ? ` (${plot.note})` : "")))),
    smallTable(columns, data.rows), paragraphs(data.notes, "soft"),
  ];
}

function ranksTab() {
  const given = data.ranks;
  return [smallTable([
    { key: "name", head: "operator", left: true, cell: (row) => element("span", { class: "path" }, row[0]), order: (row) => row[0] },
    ...given.keeps.map((keep, at) => ({ key: "k" + at, head: `keep ${keep}`, left: true, cell: (row) => row[at + 1], order: (row) => row[at + 1] })),
  ], given.names.map((name, at) => [name, ...given.ranks[at]]))];
}

// ---- tabs: made when they are opened ----------------------------------------------------

const links = { tab: (id) => open(id), place: (name) => history.replaceState(null, "", name ? `#operators/${encodeURIComponent(name)}` : "#operators") };
const table = data.kind === "diff" ? new Sites(data, links) : null;
const textTab = () => [element("pre", { tabindex: 0 }, data.text || "Too long for a page; fxcompress diff prints it.")];

const TABS = data.kind === "sweep" ? [
  ["budgets", "Budgets", sweepTab], ["ranks", "Ranks", ranksTab], ["text", "As text", textTab],
] : [
  ["operators", "Operators", () => [table.section]],
  ["budget", "Budget", budgetTab],
  ["prediction", "Prediction", predictionTab],
  ["rules", "Rules", rulesTab],
  ["unchanged", "Unchanged, and why", unchangedTab],
  data.other && ["comparison", "Comparison", comparisonTab],
  data.rounds && ["runs", "Runs", runsTab],
  data.graph && ["graph", "Graph", null],
  ["reproduce", "Reproduce", reproduceTab],
  ["text", "As text", textTab],
].filter(Boolean);

const made = new Set();

function open(id, focus = false) {
  if (!TABS.some(([one]) => one === id)) id = TABS[0][0];
  for (const [one, , make] of TABS) {
    const tab = document.getElementById(`tab-${one}`), section = document.getElementById(one), chosen = one === id;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    section.hidden = !chosen;
    if (!chosen) continue;
    if (focus) tab.focus();
    if (!made.has(one)) {
      made.add(one);
      if (make) section.append(...make().flat(Infinity).filter(Boolean));
      else drawGraph(section, data.graph, (name) => { location.hash = `operators/${encodeURIComponent(name)}`; });
    }
    if (one === "operators") table.refill();
  }
  return id;
}

function follow() {
  let [id, ...rest] = location.hash.slice(1).split("/");
  let name = "";
  try { name = decodeURIComponent(rest.join("/")); } catch { name = ""; }
  if (open(id) === "operators" && name && table) table.go(name);
}

document.getElementById("page").append(
  element("header", {}, element("h1", {}, data.title), element("p", {}, data.subtitle), element("p", { class: "soft" }, data.source),
    data.cards ? cards() : null,
    data.warnings.length ? element("section", { class: "warnings", "aria-label": "warnings" }, element("strong", {}, "Warnings"), element("ul", {}, data.warnings.map((one) => element("li", {}, one)))) : null),
  element("div", { class: "tabs", role: "tablist", "aria-label": "views" }, TABS.map(([id, text], at) => element("button", {
    type: "button", role: "tab", id: `tab-${id}`, "aria-controls": id, "aria-selected": "false", tabindex: -1,
    onclick: () => { history.replaceState(null, "", "#" + id); open(id); },
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = TABS[(at + step + TABS.length) % TABS.length][0];
      history.replaceState(null, "", "#" + next);
      open(next, true);
    },
  }, text))),
  ...TABS.map(([id]) => element("section", { id, role: "tabpanel", "aria-labelledby": `tab-${id}`, hidden: true })),
);
window.addEventListener("hashchange", follow);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || !table?.search || /^(input|select|textarea)$/i.test(event.target.tagName)) return;
  event.preventDefault();
  open("operators");
  table.search.focus();
});
follow();
