// ---- tables ----------------------------------------------------------------------------

// A head that sorts: a button in it, and aria-sort on the cell.
function sortHead(column, state, sort) {
  const up = state.key === column.key ? state.up : null;
  const mark = element("span", { class: "mark", "aria-hidden": "true" }, up === null ? "" : up ? "▴" : "▾");
  const cell = element("th", { scope: "col", class: column.left ? "left" : "", "data-key": column.key,
    "aria-sort": up === null ? null : up ? "ascending" : "descending", title: column.about },
    column.group ? element("span", { class: "over" }, column.group) : null);
  const head = element("button", { type: "button", onclick: () => sort(column) }, column.head, mark);
  cell.append(column.order ? head : element("span", {}, column.head));
  return cell;
}

// The next state of sorting: numbers first fall, as the largest is what one looks for.
function sorted(state, column) {
  return { key: column.key, up: state.key === column.key ? !state.up : Boolean(column.left) };
}

const collator = new Intl.Collator("en", { numeric: true });

function compare(one, other) {
  if (typeof one === "string" || typeof other === "string") return collator.compare(String(one), String(other));
  return (one ?? -Infinity) - (other ?? -Infinity) || 0;
}

// A table of few rows.  Columns: {key, head, left, cell(row), order(row), group}.
function smallTable(columns, rows, { total = null, css = "", start = { key: null, up: true } } = {}) {
  let state = start;
  const head = element("tr"), body = element("tbody");
  const line = (row, kind) => element("tr", { class: "row " + kind }, columns.map((column) =>
    element("td", { class: column.left ? "left" : "num" }, column.cell(row))));
  function fill() {
    head.replaceChildren(...columns.map((column) => sortHead(column, state, (one) => { state = sorted(state, one); fill(); head.querySelector(`[data-key="${one.key}"] button`).focus(); })));
    const by = columns.find((column) => column.key === state.key);
    const shown = by ? [...rows].sort((a, b) => (state.up ? 1 : -1) * compare(by.order(a), by.order(b))) : rows;
    body.replaceChildren(...shown.map((row) => line(row, "")), ...(total ? [line(total, "total")] : []));
  }
  fill();
  return element("div", { class: "scroll", tabindex: 0 }, element("table", { class: css }, element("thead", {}, head), body));
}

// A table of many rows, of which those that are seen are elements.
// show(items) takes [{key, detail}]; row(item) and detail(item) make a line of it.
class LongTable {
  constructor(label, row, detail, css = "tree") {
    this.row = row;
    this.detail = detail;
    this.items = [];
    this.heights = new Map(); // of open details, once they were seen
    this.line = 31;
    this.made = new Map();
    this.head = element("tr");
    this.body = element("tbody");
    this.table = element("table", { class: css, "aria-label": label }, element("thead", {}, this.head), this.body);
    this.box = element("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": label }, this.table);
    this.box.addEventListener("scroll", () => this.draw());
    window.addEventListener("resize", () => { this.line = 0; this.draw(true); });
  }

  height(item) {
    return item.detail ? this.heights.get(item.key) ?? 320 : this.line;
  }

  show(items) {
    this.items = items;
    this.table.setAttribute("aria-rowcount", items.length);
    this.draw(true);
  }

  layout() {
    this.tops = new Float64Array(this.items.length + 1);
    this.items.forEach((item, at) => { this.tops[at + 1] = this.tops[at] + this.height(item); });
  }

  // The place of the last item that begins at or above a height.
  at(top) {
    let low = 0, high = Math.max(this.items.length - 1, 0);
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.tops[middle] <= top) low = middle; else high = middle - 1;
    }
    return low;
  }

  draw(fresh = false) {
    if (!this.box.isConnected || !this.box.offsetParent) return;
    if (!this.line && this.items.length) this.measure();
    this.layout();
    const top = this.box.scrollTop, last = this.items.length;
    const from = Math.max(this.at(top) - 8, 0), to = Math.min(this.at(top + this.box.clientHeight) + 9, last);
    if (!fresh && from === this.from && to === this.to) return;
    [this.from, this.to] = [from, to];
    const focused = document.activeElement?.closest?.("tr[data-row]")?.dataset.row;
    const spacer = (height) => element("tr", { class: "spacer", "aria-hidden": "true" }, element("td", { colspan: 99, style: `height:${height}px` }));
    const lines = [];
    for (let at = from; at < to; at += 1) {
      const item = this.items[at];
      let line = fresh ? null : this.made.get(item);
      line ??= item.detail ? this.detail(item) : this.row(item);
      line.dataset.row = (item.detail ? "detail " : "") + item.key;
      line.setAttribute("aria-rowindex", at + 2);
      lines.push([item, line]);
    }
    this.made = new Map(lines);
    this.body.replaceChildren(spacer(this.tops[from]), ...lines.map(([, line]) => line), spacer(this.tops[last] - this.tops[to]));
    if (focused !== undefined) [...this.body.children].find((one) => one.dataset.row === focused)?.querySelector("button")?.focus({ preventScroll: true });
    let changed = false;
    for (const [item, line] of lines) {
      const height = line.offsetHeight;
      if (item.detail && height !== this.heights.get(item.key)) { this.heights.set(item.key, height); changed = true; }
      else if (!item.detail && height && height !== this.line) { this.line = height; changed = true; }
    }
    if (changed && !this.again) { this.again = true; this.draw(true); this.again = false; }
  }

  measure() {
    const item = this.items.find((one) => !one.detail);
    const line = this.row(item);
    this.body.replaceChildren(line);
    this.line = line.offsetHeight || 31;
  }

  reveal(at) {
    this.layout();
    this.box.scrollTop = Math.max(this.tops[at] - 60, 0);
    this.draw(true);
  }
}
