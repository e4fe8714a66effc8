// ---- the table of operators: a tree of modules, or flat ---------------------------------

const NAME = (words, at) => words.words[words.at[at]];

// A node for every module, with the sites at and below it; like folders, those of one child are one.
function treeOf(names) {
  const root = { label: "", path: "", below: new Map(), sites: [], site: null };
  names.forEach((name, site) => {
    let node = root;
    node.sites.push(site);
    let path = "";
    for (const part of name.split(".")) {
      path = path ? `${path}.${part}` : part;
      if (!node.below.has(part)) node.below.set(part, { label: part, path, below: new Map(), sites: [], site: null });
      node = node.below.get(part);
      node.sites.push(site);
    }
    node.site = site;
  });
  const shorten = (node) => {
    let label = node.label;
    while (node.site === null && node.below.size === 1) {
      node = [...node.below.values()][0];
      label = label ? `${label}.${node.label}` : node.label;
    }
    node.label = label;
    node.children = [...node.below.values()].map(shorten);
    return node;
  };
  return [...root.below.values()].map(shorten);
}

// What a text looks for: a part of the name, or a glob over all of it.
function matcher(text) {
  if (!text) return () => true;
  if (!/[*?]/.test(text)) return (name) => name.toLowerCase().includes(text.toLowerCase());
  const escaped = text.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
  const pattern = new RegExp(`^${escaped}$`, "i");
  return (name) => pattern.test(name);
}

class Sites {
  constructor(data, links) {
    Object.assign(this, { data, links, sites: data.sites, flat: true, open: new Set(), spread: new Set() });
    const sites = data.sites, n = sites.name.length;
    this.total = sites.predicted.reduce((a, b) => a + b, 0);
    this.state = { key: "loss-share", up: false };
    this.filter = { text: "", rule: "", form: "" };
    this.columns = this.makeColumns();
    const crowded = (one) => one.menu || (data.other && one.head === "before"); // there is less room beside another plan
    this.hidden = new Set(this.columns.filter(crowded).map((one) => one.key));
    this.tree = treeOf(sites.name);
    this.leaves = sites.name.map((name, site) => ({ label: name, path: name, sites: [site], site, children: [], depth: 0 }));
    if (this.tree.length === 1) this.open.add(this.tree[0].path);
    this.table = new LongTable("matched operators", (item) => this.line(item.node), (item) => this.sheet(item.node));
    this.table.body.addEventListener("keydown", (event) => this.keys(event));
    this.count = element("span", { role: "status" });
    this.section = n ? this.build() : element("p", { class: "soft" }, "No rule matched any operator.");
  }

  sum(node, values) {
    let sum = 0, any = false;
    for (const site of node.sites) if (values[site] !== null) { sum += values[site]; any = true; }
    return any ? sum : null;
  }

  makeColumns() {
    const sites = this.sites, { before, after } = sites.parameters;
    const rank = (node) => node.sites.reduce((a, site) => a + sites.share[site], 0) / node.sites.length;
    const kept = (node) => { const whole = this.sum(node, before); return whole ? this.sum(node, after) / whole : 1; };
    const share = (node) => (this.total ? this.sum(node, sites.predicted) / this.total : 0);
    const label = this.data.loss.label;
    const made = [
      { key: "name", head: "operator", left: true, order: (node) => (this.flat ? node.path : node.sites[0]) },
      { key: "form", head: "form", left: true, order: (node) => this.form(node), text: (node) => this.form(node) },
      { key: "rank", head: "rank", about: "of the full rank of its form; of a module the mean share", order: rank,
        text: (node) => (node.sites.length === 1 ? sites.rank[node.sites[0]] || "–" : `mean ${Math.round(100 * rank(node))}%`) },
      { key: "kept", head: "kept", group: "parameters", about: "parameters after / before, of this operator or module", order: kept, text: (node) => WRITE.percent(kept(node)), bar: kept },
      { key: "loss-share", head: "share of loss", about: `of the predicted ${label} of all matched operators; the bar is relative to the largest row`, order: share,
        text: (node) => this.beside(node) || WRITE.share(share(node)), bar: (node) => share(node) / (this.largest || 1) },
    ];
    sites.columns.forEach((column, at) => {
      const value = (node) => this.sum(node, column.values);
      const text = (node) => (column.write === "loss" && this.beside(node)) || written(column.write, value(node));
      made.push({ key: `column-${at}`, head: column.head, group: column.group, menu: column.menu, order: value, text });
    });
    const other = this.data.other;
    if (other) {
      const before = (values) => (node) => this.sum(node, values);
      const one = (values) => (node) => (node.sites.length === 1 ? values[node.sites[0]] ?? "–" : "");
      made.push(
        { key: "other-form", head: "form", group: "other plan", text: one(other.form) },
        { key: "other-rank", head: "rank", group: "other plan", text: one(other.rank) },
        { key: "other-parameters", head: "parameters", group: "other plan", order: before(other.parameters), text: (node) => written("count", before(other.parameters)(node)) },
        { key: "other-loss", head: "loss", group: "other plan", order: before(other.predicted), text: (node) => written("loss", before(other.predicted)(node)) },
        { key: "other-change", head: "loss, here − there", group: "other plan", order: (node) => this.change(node), text: (node) => written("loss", this.change(node)) },
      );
    }
    return made;
  }

  change(node) {
    const there = this.data.other.predicted;
    const sum = node.sites.reduce((a, site) => (there[site] === null ? a : a + this.sites.predicted[site] - there[site]), 0);
    return node.sites.some((site) => there[site] !== null) ? sum : null;
  }

  form(node) {
    if (node.sites.length === 1) return NAME(this.sites.form, node.sites[0]);
    return `${node.sites.filter((site) => !this.sites.dense[site]).length} of ${node.sites.length} rewritten`;
  }

  beside(node) {
    return node.sites.length === 1 ? NAME(this.sites.elsewhere, node.sites[0]) : "";
  }

  build() {
    const { rule, form } = this.sites;
    const change = (key) => (event) => { this.filter[key] = event.target.value; this.refill(); };
    this.search = element("input", { type: "search", placeholder: "Search, or a glob: *.q_proj   ( / )", "aria-label": "search operators", oninput: change("text") });
    const choose = (name, key, words) => element("select", { "aria-label": name, onchange: change(key) },
      element("option", { value: "" }, name), words.map((word) => element("option", { value: word }, word)));
    const mode = (text, flat) => element("button", { type: "button", "aria-pressed": String(this.flat === flat), onclick: () => {
      this.flat = flat;
      this.state = flat ? { key: "loss-share", up: false } : { key: "name", up: true };
      for (const one of this.modes) one.setAttribute("aria-pressed", String((one.textContent === "List") === flat));
      this.folds.hidden = flat;
      this.refill();
    } }, text);
    this.modes = [mode("List", true), mode("Tree", false)];
    this.folds = element("span", { hidden: true },
      element("button", { type: "button", onclick: () => this.unfold(true) }, "Expand all"), " ",
      element("button", { type: "button", onclick: () => this.unfold(false) }, "Collapse all"));
    const menu = element("details", {}, element("summary", {}, "Columns"), element("div", { class: "menu" },
      this.columns.slice(1).map((column) => element("label", {}, element("input", { type: "checkbox", checked: !this.hidden.has(column.key),
        onchange: (event) => { this.hidden[event.target.checked ? "delete" : "add"](column.key); this.refill(); } }),
        ` ${column.group ? column.group + ", " : ""}${column.head}`))));
    return element("div", {},
      element("div", { class: "tools" }, this.search, choose("every rule", "rule", rule.words), choose("every form", "form", form.words),
        this.modes, this.folds, menu, this.count),
      this.table.box);
  }

  unfold(open) {
    const walk = (node) => { if (node.children.length) this.open[open ? "add" : "delete"](node.path); node.children.forEach(walk); };
    this.tree.forEach(walk);
    if (!open) this.spread.clear();
    this.refill();
  }

  shown() {
    return this.columns.filter((column) => !this.hidden.has(column.key));
  }

  // The lines there are: nodes, and open sheets behind theirs.
  refill() {
    if (!this.sites.name.length) return;
    const { text, rule, form } = this.filter, named = matcher(text), sites = this.sites;
    const found = new Set();
    for (let site = 0; site < sites.name.length; site += 1)
      if (named(sites.name[site]) && (!rule || NAME(sites.rule, site) === rule) && (!form || NAME(sites.form, site) === form)) found.add(site);
    const all = found.size === sites.name.length;
    const by = this.columns.find((column) => column.key === this.state.key), sign = this.state.up ? 1 : -1;
    // Of a node that is whole a value is known for good, but for the name's, which is another in a list.
    const value = (node) => (by.key === "name" ? by.order(node) : ((node.values ??= {})[by.key] ??= by.order(node)));
    const keyed = (nodes) => nodes.map((node) => [value(node), node]).sort((a, b) => sign * compare(a[0], b[0]) || a[1].sites[0] - b[1].sites[0]).map(([, node]) => node);
    const items = [];
    const put = (node) => {
      items.push({ key: node.path, node });
      if (node.site !== null && this.spread.has(node.path)) items.push({ key: node.path, node, detail: true });
    };
    this.largest = 0;
    if (this.flat) {
      const asked = JSON.stringify([this.filter, this.state]);
      if (asked !== this.asked) {
        this.asked = asked;
        this.listed = keyed(this.leaves.filter((node) => found.has(node.site)));
      }
      for (const node of this.listed) this.largest = Math.max(this.largest, this.total ? sites.predicted[node.site] / this.total : 0);
      this.listed.forEach(put);
    } else {
      this.largest = 1;
      const filtered = Boolean(text || rule || form);
      const pick = (node) => {
        if (all) return node;
        const own = node.sites.filter((site) => found.has(site));
        if (!own.length) return null;
        return { ...node, values: null, sites: own, site: node.site !== null && found.has(node.site) ? node.site : null, children: node.children.map(pick).filter(Boolean) };
      };
      const walk = (nodes, depth) => {
        for (const node of keyed(nodes)) {
          node.depth = depth;
          put(node);
          if (node.children.length && (filtered || this.open.has(node.path))) walk(node.children, depth + 1);
        }
      };
      walk(this.tree.map(pick).filter(Boolean), 0);
    }
    this.table.head.replaceChildren(...this.shown().map((column) => sortHead(column, this.state, (one) => {
      this.state = sorted(this.state, one);
      this.refill();
      this.table.head.querySelector(`[data-key="${one.key}"] button`).focus();
    })));
    this.count.textContent = all ? `${WRITE.count(sites.name.length)} operators` : `${WRITE.count(found.size)} of ${WRITE.count(sites.name.length)} operators`;
    this.items = items;
    this.table.show(items);
  }

  line(node) {
    const columns = this.shown(), branch = node.children.length > 0;
    const open = branch ? this.open.has(node.path) || Boolean(this.filter.text || this.filter.rule || this.filter.form) : this.spread.has(node.path);
    const name = element("button", { type: "button", class: "path", title: node.path || "(root)", "aria-expanded": String(open), onclick: () => this.toggle(node) },
      element("span", { class: "twist", "aria-hidden": "true" }, branch ? "▸" : "▹"), node.label || "(root)");
    const cells = [name];
    if (branch && node.site !== null) cells.push(" ", element("button", { type: "button", class: "path", onclick: () => this.toggleSheet(node) }, "(itself)"));
    return element("tr", { class: "row" }, element("th", { scope: "row", class: "left", style: `padding-left:${8 + 16 * (node.depth || 0)}px;font-weight:400` }, cells),
      columns.slice(1).map((column) => {
        const text = column.text(node);
        const bar = column.bar ? element("span", { class: "bar", "aria-hidden": "true" }, element("span", { style: `width:${(100 * Math.min(Math.max(column.bar(node), 0), 1)).toFixed(1)}%` })) : null;
        return element("td", { class: (column.left ? "left " : "") + (text === "dense" ? "dense" : ""), "data-label": column.group ? `${column.group} ${column.head}` : column.head },
          element("span", {}, text), bar);
      }));
  }

  toggle(node) {
    if (!node.children.length) return this.toggleSheet(node);
    if (!this.open.delete(node.path)) this.open.add(node.path);
    this.refill();
  }

  toggleSheet(node) {
    const opened = !this.spread.delete(node.path);
    if (opened) this.spread.add(node.path);
    this.links.place(opened ? node.path : "");
    this.refill();
  }

  keys(event) {
    const button = event.target.closest("button.path");
    const at = button ? this.items.findIndex((item) => !item.detail && item.key === button.closest("tr").dataset.row) : -1;
    if (at < 0) return;
    const node = this.items[at].node, set = node.children.length ? this.open : this.spread;
    if (event.key === "ArrowRight" && !set.has(node.path)) this.toggle(node);
    else if (event.key === "ArrowLeft" && set.has(node.path)) this.toggle(node);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const step = event.key === "ArrowDown" ? 1 : -1;
      let next = at + step;
      while (this.items[next]?.detail) next += step;
      if (!this.items[next]) return;
      this.focus(next);
    } else return;
    event.preventDefault();
  }

  focus(at) {
    const find = () => [...this.table.body.children].find((one) => one.dataset.row === this.items[at].key);
    if (at < this.table.from + 1 || at > this.table.to - 2) this.table.reveal(at);
    find()?.querySelector("button").focus();
  }

  // Open the sheet of a site, wherever it is, and go to it.
  go(name) {
    if (!this.sites.name.includes(name)) return;
    this.filter = { text: "", rule: "", form: "" };
    for (const one of this.section.querySelectorAll(".tools input[type=search], .tools select")) one.value = "";
    const parts = name.split(".");
    parts.forEach((_, at) => this.open.add(parts.slice(0, at + 1).join(".")));
    this.spread.add(name);
    this.refill();
    const at = this.items.findIndex((item) => !item.detail && item.key === name);
    if (at >= 0) { this.table.reveal(at); this.table.reveal(at); }
  }

  sheet(node) {
    const at = node.site, sites = this.sites, label = this.data.loss.label, dense = sites.dense[at];
    const facts = [];
    const fact = (name, ...what) => facts.push(element("dt", {}, name), element("dd", {}, ...what));
    fact("path", element("code", {}, sites.name[at] || "(root)"));
    const calls = NAME(sites.calls, at);
    fact("weight", element("code", {}, sites.weight[at]), calls > 1 ? `, used ${calls} times` : "");
    fact("operator", NAME(sites.operator, at));
    fact("rule", `${NAME(sites.rule, at)} (${NAME(sites.location, at)})`);
    fact("forms allowed", NAME(sites.forms, at) || "none");
    const together = sites.bundles[NAME(sites.bundle, at)], reader = together?.reader;
    if (dense) {
      fact("stays dense", NAME(sites.reason, at) || "no reason was recorded");
    } else {
      if (reader) {
        fact("chosen", `${NAME(sites.form, at)}, ${sites.rank[at]} channels: one change of ${together.sites.join(", ")}`);
        if (together.held.length) fact("counted with it", `entries of the channels that go, of ${together.held.join(", ")}`);
      } else fact("chosen", `${NAME(sites.form, at)}, rank ${sites.rank[at]}${together ? `, together with the others on this input: ${together.sites.join(", ")}` : ""}`);
      fact("energy kept", `${WRITE.percent(sites.energy[at])} of ${reader ? "what all channels add" : "the squared singular values"}`);
      fact(`predicted ${label}`, this.beside(node) || `${WRITE.loss(sites.predicted[at])} ${this.data.loss.unit}, ${WRITE.share(this.total ? sites.predicted[at] / this.total : 0)} of all`);
      for (const column of sites.columns) if (column.head.startsWith("measured")) {
        const error = sites.error[at];
        fact("measured KL, rewritten alone", column.values[at] === null ? "with the others of its group" : `${WRITE.loss(column.values[at])}${error ? ` ± ${WRITE.loss(error)}` : ""} nats per prediction`);
      }
    }
    for (const [move, word] of [[this.data.budget.more, "with more budget"], [this.data.budget.less, "with less budget"]]) {
      const row = move?.rows.find((one) => one[5] === sites.name[at] || together?.sites.includes(one[5]));
      if (row) fact(word, `${row[1]} → ${row[2]} (${move.text.split(" (")[0]})`);
    }
    if (this.data.graph)
      fact("graph", element("button", { type: "button", class: "action", onclick: () => { this.links.tab("graph"); showInGraph(sites.name[at]); } }, "show in graph"));
    const drawing = spectrum(sites.spectrum[at], sites.full[at], dense ? null : sites.first[at], `${sites.first[at]} kept`);
    const what = reader ? "What each channel adds in the metric" : "Singular values in the metric";
    return element("tr", { class: "detail" }, element("td", { colspan: 99 }, element("div", { class: "sheet" }, element("dl", {}, facts),
      drawing ? element("figure", {}, element("figcaption", {}, `${what}${dense ? "" : ", shaded up to what is kept"}`), drawing)
        : element("p", { class: "soft" }, reader && reader !== sites.name[at] ? `Channels are chosen by what they add where they are read: ${reader}.` : "No spectrum was recorded for it."))));
  }
}
