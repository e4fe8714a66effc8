// The graph before and after, side by side: drawGraph(element, data, onSelect) draws what
// fxcompress.picture.data.graph_data made, and showInGraph(name) opens it at an operator.
// Rows and their order come with the data; sizes and coordinates depend on what is open.
const { drawGraph, showInGraph } = (() => {
  "use strict";
  const SVG = "http:" + "//www.w3.org/2000/svg"; // a name, never fetched
  const OUTSIDE = -1;
  const GAP = { row: 30, column: 14, frame: 12, head: 24, pane: 48, title: 30 };
  const CLASSES = ["unchanged", "factorized", "narrowed", "dense", "dropped", "added"];
  const SIDES = { before: 1, after: 2 };
  const FEW = 45; // entries that are open at first, and with bodies
  const MOST = 2000; // paths that one folded entry stands for, as far as they are told

  const pen = document.createElement("canvas").getContext("2d");
  const widths = new Map();
  function widthOf(text, bold) {
    const key = (bold ? "b" : " ") + text;
    if (!widths.has(key)) {
      pen.font = `${bold ? "600 12px" : "11px"} system-ui, sans-serif`;
      widths.set(key, pen.measureText(text).width);
    }
    return widths.get(key);
  }
  function make(tag, attributes, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  function html(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children); // strings become text, never markup
    return made;
  }
  const count = (number) => number.toLocaleString("en-US");
  const brief = (number) => (number === 0 ? "0" : String(Number(number.toPrecision(3))));
  function range(values, write) {
    const low = write(Math.min(...values));
    const high = write(Math.max(...values));
    return low === high ? low : `${low}..${high}`;
  }

  class Drawing {
    constructor(element, data, onSelect) {
      this.data = data;
      this.onSelect = onSelect;
      this.name = (at) => (at === undefined ? "" : data.names[at]);
      this.column = Object.fromEntries(data.site.map((name, at) => [name, at]));
      this.open = new Set();
      this.member = new Map(); // of folded entries, which one is looked at
      this.selected = null;
      this.current = null; // where the keyboard is: side and key
      this.openAtFirst();
      this.build(element);
      this.mode = this.scroll.clientWidth && this.scroll.clientWidth < 700 ? "after" : "both";
      this.zoom = 1;
      this.render();
      this.fit();
    }

    // ---- entries -----------------------------------------------------------------------
    labels(entry) {
      return (entry.labels ?? [entry.label]).map(this.name);
    }
    isModule(entry) {
      return entry.before === undefined && entry.after === undefined;
    }
    kindOf(entry, key) {
      return entry.kinds ? entry.kinds[this.member.get(key) ?? 0] : entry.kind;
    }
    inside(entry, key) {
      const kind = this.kindOf(entry, key);
      return kind === undefined ? null : this.data.kinds[kind];
    }
    // Entries on the way to one, with their keys: "3/9" is entry 9 in entry 3 of the model.
    way(key) {
      const found = [];
      let kind = this.data.kinds[this.data.root];
      let at = "";
      for (const place of key.split("/").map(Number)) {
        at = at ? `${at}/${place}` : String(place);
        const entry = kind.entries[place];
        found.push({ entry, key: at, around: kind });
        kind = this.inside(entry, at);
      }
      return found;
    }
    join(path, label) {
      return label === "(itself)" ? path : path ? `${path}.${label}` : label;
    }
    paths(key) {
      let found = [""];
      for (const { entry, key: at } of this.way(key)) {
        if (entry.function) continue;
        const labels = this.labels(entry);
        const chosen = this.member.has(at) ? [labels[this.member.get(at)]] : labels;
        found = found.flatMap((path) => chosen.map((label) => this.join(path, label)));
        found.length = Math.min(found.length, MOST);
      }
      return found;
    }
    sites(key) {
      return this.paths(key)
        .filter((path) => Object.hasOwn(this.data.sites, path))
        .map((path) => this.data.sites[path]);
    }
    get(site, what) {
      return site[this.column[what]];
    }
    title(entry, key) {
      const labels = this.labels(entry);
      const at = this.member.get(key);
      let text = labels[at ?? 0];
      if (at === undefined && labels.length > 1) {
        text += ` … ${labels.at(-1).match(/[^.]*$/)[0]}`;
      }
      return entry.call && !entry.function ? `${text} (call ${entry.call + 1})` : text;
    }
    rankText(sites) {
      const rewritten = sites.filter((site) => this.get(site, "ranks").length && this.get(site, "form"));
      if (!rewritten.length) return "";
      const first = this.get(rewritten[0], "full");
      return first
        .map((full, at) => {
          const letter = at === 0 && this.isNarrow(rewritten[0]) ? "k" : "r";
          const known = rewritten.filter((site) => this.get(site, "ranks").length > at);
          return `${letter} ${range(known.map((site) => this.get(site, "ranks")[at]), count)} of ${count(full)}`;
        })
        .join(", ");
    }
    isNarrow(site) {
      return this.name(this.get(site, "bundle")).endsWith(" and its input");
    }
    // What stands in a box on one side, below its title.
    lines(entry, key, side) {
      const labels = this.labels(entry);
      if (this.isModule(entry)) {
        return labels.length > 1 && !this.member.has(key) ? [`${labels.length} alike`] : [];
      }
      const text = this.name(side === "before" ? entry.before : entry.after ?? entry.before);
      const shape = this.name(side === "before" ? entry.shape : entry.now ?? entry.shape);
      const found = text && !(entry.function && text === labels[0]) ? [text] : [];
      if (entry.site && side === "after") {
        const sites = this.sites(key);
        const ranks = this.rankText(sites);
        if (CLASSES[entry.status ?? 0] === "dense") found.push("left dense");
        else if (ranks) found.push(ranks);
      } else if (side === "after" && CLASSES[entry.status ?? 0] === "dropped") {
        found.push("does nothing any more");
      }
      if (shape && !(entry.site && entry.kind !== undefined && side === "after")) found.push(shape);
      return found;
    }
    changed(counts) {
      return counts.slice(1).some((number) => number > 0);
    }
    openAtFirst() {
      const queue = [{ kind: this.data.kinds[this.data.root], key: "" }];
      let shown = queue[0].kind.entries.length;
      const bodies = [];
      while (queue.length) {
        const { kind, key } = queue.shift();
        kind.entries.forEach((entry, place) => {
          const at = key ? `${key}/${place}` : String(place);
          const inner = this.inside(entry, at);
          if (!inner) return;
          if (!this.isModule(entry)) bodies.push({ at, size: inner.entries.length });
          else if (this.changed(inner.counts) && shown + inner.entries.length <= FEW) {
            shown += inner.entries.length;
            this.open.add(at);
            queue.push({ kind: inner, key: at });
          }
        });
      }
      for (const { at, size } of bodies) {
        if (shown + size > FEW) break;
        shown += size;
        this.open.add(at);
      }
    }

    // ---- sizes and places --------------------------------------------------------------
    small(entry, key, side) {
      const lines = this.lines(entry, key, side);
      const inner = this.isModule(entry) ? this.inside(entry, key) : null;
      const texts = [widthOf(this.title(entry, key), true) + (this.inside(entry, key) ? 16 : 0)];
      texts.push(...lines.map((line) => widthOf(line)));
      if (inner && this.changed(inner.counts)) {
        texts.push(26 * inner.counts.slice(1).filter((number) => number).length);
      }
      const chips = inner && this.changed(inner.counts) ? 16 : 0;
      return { w: Math.ceil(Math.max(...texts)) + 18, h: 22 + 14 * lines.length + chips };
    }
    isOpen(entry, key, side) {
      return (
        this.open.has(key) && this.inside(entry, key) !== null && (this.isModule(entry) || side === "after")
      );
    }
    measureEntry(entry, key) {
      const sides = Object.keys(SIDES).filter((side) => (entry.sides ?? 3) & SIDES[side]);
      const found = { entry, key, size: {}, inner: null };
      for (const side of sides) {
        if (!this.isOpen(entry, key, side)) {
          found.size[side] = this.small(entry, key, side);
          continue;
        }
        found.inner ??= this.measure(this.inside(entry, key), key);
        const title = widthOf(this.frameTitle(entry, key), true) + 36;
        found.size[side] = {
          w: Math.max(found.inner.w, title) + 2 * GAP.frame,
          h: found.inner.h + GAP.head + 2 * GAP.frame,
        };
      }
      found.w = Math.max(...Object.values(found.size).map((size) => size.w));
      found.h = Math.max(...Object.values(found.size).map((size) => size.h));
      return found;
    }
    frameTitle(entry, key) {
      const lines = this.lines(entry, key, "after");
      return [this.title(entry, key), ...lines].join("  ·  ");
    }
    // Boxes of a kind with their middles; x from 0 to w, y from 0 to h.
    measure(kind, key) {
      const boxes = kind.entries.map((entry, place) =>
        this.measureEntry(entry, key ? `${key}/${place}` : String(place)),
      );
      const passing = new Map(); // edge -> places that it passes through
      let y = 0;
      const rows = kind.rows.map((row) => {
        const items = row.map((what) =>
          what >= 0 ? { place: what, box: boxes[what], w: boxes[what].w } : { edge: -1 - what, w: 4 },
        );
        const h = Math.max(18, ...items.filter((item) => item.box).map((item) => item.box.h));
        const made = { items, y, h };
        y += h + GAP.row;
        return made;
      });
      const h = Math.max(0, y - GAP.row);
      this.spread(kind, rows);
      let left = Infinity;
      let right = -Infinity;
      for (const row of rows) {
        for (const item of row.items) {
          left = Math.min(left, item.x - item.w / 2);
          right = Math.max(right, item.x + item.w / 2);
        }
      }
      for (const row of rows) {
        for (const item of row.items) {
          item.x -= left;
          if (item.box) {
            item.box.x = item.x;
            item.box.y = row.y + row.h / 2;
          } else {
            if (!passing.has(item.edge)) passing.set(item.edge, []);
            passing.get(item.edge).push({ x: item.x, top: row.y, bottom: row.y + row.h });
          }
        }
      }
      return { kind, boxes, passing, w: rows.length ? right - left : 0, h };
    }
    // Middles of all items: near those that they are linked to, in the order of their row.
    spread(kind, rows) {
      const boxes = new Map();
      const chains = kind.edges.map(() => []);
      rows.forEach((row, number) => {
        let x = 0;
        for (const item of row.items) {
          Object.assign(item, { row: number, links: [], x: x + item.w / 2 });
          x += item.w + GAP.column;
          if (item.box) boxes.set(item.place, item);
          else chains[item.edge].push(item);
        }
        for (const item of row.items) item.x -= x / 2;
      });
      kind.edges.forEach(([source, target], edge) => {
        const ends = [boxes.get(source), ...chains[edge], boxes.get(target)].filter(Boolean);
        for (let at = 1; at < ends.length; at++) {
          const [upper, lower] = [ends[at - 1], ends[at]];
          if (lower.row - upper.row !== 1) continue;
          // What only passes goes straight rather than near its ends.
          const weight = upper.box || lower.box ? 1 : 8;
          upper.links.push([lower, weight]);
          lower.links.push([upper, weight]);
        }
      });
      for (let sweep = 0; sweep < 8; sweep++) {
        for (const row of sweep % 2 ? [...rows].reverse() : rows) this.settle(row.items);
      }
    }
    settle(items) {
      const wanted = items.map(({ links, x }) => {
        const total = links.reduce((sum, [, weight]) => sum + weight, 0);
        return total ? links.reduce((sum, [one, weight]) => sum + weight * one.x, 0) / total : x;
      });
      // From the left and from the right; the mean of both keeps order and gaps.
      const need = (a, b) => (a.w + b.w) / 2 + GAP.column;
      const right = [...wanted];
      for (let i = 1; i < items.length; i++) {
        right[i] = Math.max(right[i], right[i - 1] + need(items[i - 1], items[i]));
      }
      const left = [...wanted];
      for (let i = items.length - 2; i >= 0; i--) {
        left[i] = Math.min(left[i], left[i + 1] - need(items[i], items[i + 1]));
      }
      items.forEach((item, i) => (item.x = (left[i] + right[i]) / 2));
    }

    // ---- drawing -----------------------------------------------------------------------
    build(element) {
      const button = (text, title, act) => {
        const made = html("button", { type: "button", title }, text);
        made.addEventListener("click", act);
        return made;
      };
      this.views = Object.entries({ both: "Side by side", before: "Before", after: "After" }).map(
        ([mode, text]) => {
          const made = button(text, `show ${text.toLowerCase()}`, () => {
            this.mode = mode;
            this.render();
            this.fit();
          });
          made.dataset.mode = mode;
          return made;
        },
      );
      const tools = html("div", { class: "graph-tools" }, ...this.views);
      tools.append(
        button("−", "smaller", () => this.scale(this.zoom / 1.25)),
        button("+", "larger", () => this.scale(this.zoom * 1.25)),
        button("Fit", "fit the width", () => this.fit()),
        button("Close all", "close all modules", () => {
          this.open.clear();
          this.render();
        }),
        html("span", { class: "graph-hint" }, "Click a box to open it; Ctrl and wheel to zoom."),
      );
      const legend = html("div", { class: "graph-legend", "aria-label": "legend" });
      const present = this.data.kinds[this.data.root].counts;
      this.data.statuses.forEach((status, at) => {
        if (at && !present[at]) return;
        const swatch = html("span", { class: `swatch s-${CLASSES[at]}`, "aria-hidden": "true" });
        legend.append(html("span", {}, swatch, at ? `${status} (${count(present[at])})` : status));
      });
      legend.append(html("span", {}, "r rank, k channels kept"));
      this.scroll = html("div", { class: "graph-scroll" });
      this.detail = html("div", { class: "graph-detail", "aria-live": "polite" });
      element.replaceChildren(tools, legend, this.scroll, this.detail);
      element.classList.add("graph");
      this.scroll.addEventListener(
        "wheel",
        (event) => {
          if (!event.ctrlKey && !event.metaKey) return;
          event.preventDefault();
          this.scale(this.zoom * Math.exp(-event.deltaY / 400));
        },
        { passive: false },
      );
      this.scroll.addEventListener("keydown", (event) => this.key(event));
      this.scroll.addEventListener("click", (event) => {
        const box = event.target.closest("[data-key]");
        if (box) this.press(box.dataset.key, box.dataset.side);
      });
    }
    render() {
      const focus = this.scroll.contains(document.activeElement);
      const kind = this.data.kinds[this.data.root];
      const root = this.measure(kind, "");
      const shown = this.mode === "both" ? Object.keys(SIDES) : [this.mode];
      this.w = shown.length * (root.w + GAP.pane);
      this.h = root.h + GAP.title + GAP.frame;
      this.svg = make("svg", {
        viewBox: `0 0 ${this.w} ${this.h}`,
        role: "group",
        "aria-label": `${this.data.model}, ${shown.join(" and ")}`,
      });
      const bundle = this.selected ? this.bundleOf(this.selected) : null;
      shown.forEach((side, pane) => {
        const x = pane * (root.w + GAP.pane) + GAP.pane / 2;
        const text = side === "after" && this.data.planned ? "after, as planned" : side;
        this.svg.append(make("text", { x: x + root.w / 2, y: 18, class: "pane" }, text));
        if (pane) {
          const at = x - GAP.pane / 2;
          this.svg.append(make("line", { x1: at, x2: at, y1: 0, y2: this.h, class: "divide" }));
        }
        this.drawInside(this.svg, root, side, x, GAP.title, GAP.title - 8, this.h, bundle);
      });
      this.scroll.replaceChildren(this.svg);
      for (const view of this.views) view.setAttribute("aria-pressed", view.dataset.mode === this.mode);
      this.scale(this.zoom);
      this.aim(focus);
    }
    bundleOf(key) {
      const found = this.sites(key).map((site) => this.get(site, "bundle"));
      return new Set(found.filter((at) => this.name(at)));
    }
    // Where a box is drawn on one side of its place; it may be smaller than that.
    frame(box, side, x, y) {
      const { w, h } = box.size[side];
      return { x: x + box.x - w / 2, y: y + box.y - h / 2, w, h };
    }
    drawInside(parent, inner, side, x, y, top, bottom, bundle) {
      const edges = make("g", { class: "edges" });
      parent.append(edges);
      inner.kind.edges.forEach(([source, target, sides], edge) => {
        if (!(sides & SIDES[side])) return;
        const from = source === OUTSIDE ? null : this.frame(inner.boxes[source], side, x, y);
        const to = target === OUTSIDE ? null : this.frame(inner.boxes[target], side, x, y);
        const middle = x + inner.w / 2;
        const points = [from ? [from.x + from.w / 2, from.y + from.h] : [middle, top]];
        for (const place of inner.passing.get(edge) ?? []) {
          points.push([x + place.x, y + place.top], [x + place.x, y + place.bottom]);
        }
        points.push(to ? [to.x + to.w / 2, to.y] : [middle, bottom]);
        let path = `M${points[0]}`;
        points.slice(1).forEach(([px, py], at) => {
          const [ox, oy] = points[at];
          const half = (oy + py) / 2;
          path += px === ox ? `L${px},${py}` : `C${ox},${half} ${px},${half} ${px},${py}`;
        });
        const one = sides === 3 || !((inner.kind.sides ?? 3) & 3) ? "edge" : `edge only-${side}`;
        edges.append(make("path", { d: path, class: one }));
        if (to) edges.append(make("path", { d: `M${to.x + to.w / 2 - 3},${to.y - 5}l3,5l3,-5z`, class: "tip" }));
      });
      for (const box of inner.boxes) if (box.size[side]) this.drawBox(parent, box, side, x, y, bundle);
    }
    drawBox(parent, box, side, x, y, bundle) {
      const { entry, key } = box;
      const at = this.frame(box, side, x, y);
      const open = this.isOpen(entry, key, side);
      const inner = this.inside(entry, key);
      const status = CLASSES[entry.status ?? 0];
      const title = this.title(entry, key);
      const lines = this.lines(entry, key, side);
      const module = this.isModule(entry);
      const classes = ["box", module ? "module" : `s-${status}`];
      if (open) classes.push("open");
      if (key === this.selected) classes.push("selected");
      else if (bundle?.size && entry.site && [...this.bundleOf(key)].some((one) => bundle.has(one))) {
        classes.push("together");
      }
      if (entry.function && status === "unchanged") classes.push("plain");
      const group = make("g", {
        class: classes.join(" "),
        "data-key": key,
        "data-side": side,
        role: "button",
        tabindex: "-1",
        "aria-label": [title, ...lines, module ? "" : this.data.statuses[entry.status ?? 0], side].filter(Boolean).join(", "),
      });
      if (inner && (module || side === "after")) group.setAttribute("aria-expanded", open);
      if (module && labelsOf(entry).length > 1 && !open) {
        for (const shift of [6, 3]) {
          group.append(make("rect", { x: at.x + shift, y: at.y + shift, width: at.w, height: at.h, rx: 6, class: "shape behind" }));
        }
      }
      group.append(make("rect", { x: at.x, y: at.y, width: at.w, height: at.h, rx: module ? 6 : 4, class: "shape" }));
      const mark = inner && (module || side === "after") ? (open ? "▾ " : "▸ ") : "";
      if (open) {
        const text = make("text", { x: at.x + 9, y: at.y + 16, class: "title" }, mark + title);
        if (lines.length) text.append(make("tspan", { class: "line", dx: 8 }, lines.join("  ·  ")));
        group.append(text);
      } else {
        const middle = at.x + at.w / 2;
        group.append(make("text", { x: middle, y: at.y + 15, class: "title middle" }, mark + title));
        lines.forEach((line, number) => {
          group.append(make("text", { x: middle, y: at.y + 29 + 14 * number, class: "line middle" }, line));
        });
        if (module && inner && this.changed(inner.counts)) this.chips(group, inner.counts, middle, at.y + at.h - 17);
      }
      parent.append(group);
      if (open) {
        const left = at.x + (at.w - box.inner.w) / 2;
        this.drawInside(parent, box.inner, side, left, at.y + GAP.head + GAP.frame, at.y + GAP.head - 4, at.y + at.h, bundle);
      }
    }
    // How many operators of a module were changed in which way.
    chips(group, counts, middle, y) {
      const some = counts.map((number, at) => [number, at]).filter(([number, at]) => at && number);
      let x = middle - (26 * some.length) / 2;
      for (const [number, at] of some) {
        const chip = make("g", { class: `chip s-${CLASSES[at]}` });
        chip.append(
          make("title", {}, `${count(number)} ${this.data.statuses[at]}`),
          make("rect", { x: x + 1, y, width: 24, height: 13, rx: 3, class: "shape" }),
          make("text", { x: x + 13, y: y + 10, class: "line middle" }, number > 999 ? "999+" : number),
        );
        group.append(chip);
        x += 26;
      }
    }

    // ---- looking closer ----------------------------------------------------------------
    press(key, side) {
      const { entry } = this.way(key).at(-1);
      if (this.inside(entry, key)) {
        if (this.open.has(key)) this.open.delete(key);
        else this.open.add(key);
      }
      this.current = { key, side };
      this.select(key);
    }
    select(key) {
      this.selected = key;
      this.render();
      this.tell(key);
      const { entry } = this.way(key).at(-1);
      if (entry.site && this.onSelect) this.onSelect(this.paths(key)[0]);
    }
    tell(key) {
      const way = this.way(key);
      const { entry, around } = way.at(-1);
      const paths = this.paths(key);
      const rows = html("dl", {});
      const row = (name, ...what) => rows.append(html("dt", {}, name), html("dd", {}, ...what));
      const path = paths.length > 1 ? `${paths[0]} and ${count(paths.length - 1)} alike` : paths[0];
      const name = entry.function ? `${this.labels(entry)[0]} in ${path || this.data.model}` : path;
      row(this.isModule(entry) ? "module" : "operator", name || this.data.model);
      way.forEach(({ entry: one, key: at }) => {
        const labels = this.labels(one);
        if (labels.length < 2) return;
        const choice = html("select", { "aria-label": "which of the alike blocks" });
        ["all of them", ...labels].forEach((text, value) => choice.append(html("option", { value }, text)));
        choice.value = String((this.member.get(at) ?? -1) + 1);
        choice.addEventListener("change", () => {
          if (choice.value === "0") this.member.delete(at);
          else this.member.set(at, Number(choice.value) - 1);
          this.select(key);
        });
        row("of the blocks", choice);
      });
      if (!this.isModule(entry)) {
        const status = this.data.statuses[entry.status ?? 0];
        const [before, after] = ["before", "after"].map((side) =>
          [this.name(side === "before" ? entry.before : entry.after ?? entry.before),
            this.name(side === "before" ? entry.shape : entry.now ?? entry.shape)].filter(Boolean).join(", value of "),
        );
        if ((entry.sides ?? 3) & 1) row("before", before);
        if ((entry.sides ?? 3) & 2) row("after", after);
        row("what happened", status);
      }
      const sites = this.sites(key);
      if (entry.site && sites.length) {
        const all = (what) => sites.map((site) => this.get(site, what));
        const texts = (what) => [...new Set(all(what))].map(this.name).filter(Boolean);
        const ranks = this.rankText(sites);
        if (ranks) row("form", `${texts("form").join(" or ")}, ${ranks}`);
        const losses = all("predicted").filter((loss) => loss !== null);
        if (losses.length) row("predicted loss", `${range(losses, brief)} ${this.data.unit}${sites.length > 1 ? " each" : ""}`);
        row("parameters", `${range(all("before"), count)} → ${range(all("after"), count)}`);
        const reasons = texts("reason");
        if (reasons.length) row("stays dense", reasons.slice(0, 3).join("; "));
        row("rule", texts("rule").join(", "));
        const together = texts("bundle");
        if (together.length) row("together with", `${together[0]}${together.length > 1 ? ", ..." : ""}`);
      } else if (Object.hasOwn(this.data.unmatched, paths[0])) {
        row("not matched", this.name(this.data.unmatched[paths[0]]));
      }
      const place = Number(key.split("/").at(-1));
      const near = (end, other) => {
        const found = around.edges.filter((edge) => edge[end] === place).map((edge) => edge[other]);
        const named = found.map((at) => (at === OUTSIDE ? "what is outside of this module" : this.title(around.entries[at], "")));
        return [...new Set(named)].join(", ");
      };
      if (near(1, 0)) row("reads", near(1, 0));
      if (near(0, 1)) row("read by", near(0, 1));
      this.detail.replaceChildren(rows);
    }
    boxes() {
      return [...this.svg.querySelectorAll("[data-key]")];
    }
    find({ key, side }) {
      const same = this.boxes().filter((box) => box.dataset.key === key);
      return same.find((box) => box.dataset.side === side) ?? same[0];
    }
    // Exactly one box takes part in the order of the Tab key.
    aim(focus) {
      const box = (this.current && this.find(this.current)) ?? this.boxes()[0];
      if (!box) return;
      box.setAttribute("tabindex", "0");
      if (focus) box.focus({ preventScroll: true });
    }
    key(event) {
      const box = event.target.closest?.("[data-key]");
      if (!box) return;
      const { key, side } = box.dataset;
      if (event.key === "Enter" || event.key === " ") this.press(key, side);
      else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        const same = this.boxes().filter((one) => one.dataset.side === side);
        this.moveTo(same[same.indexOf(box) + (event.key === "ArrowDown" ? 1 : -1)]);
      } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        const other = event.key === "ArrowRight" ? "after" : "before";
        this.moveTo(this.boxes().find((one) => one.dataset.key === key && one.dataset.side === other));
      } else return;
      event.preventDefault();
    }
    moveTo(box) {
      if (!box) return;
      for (const one of this.boxes()) one.setAttribute("tabindex", "-1");
      box.setAttribute("tabindex", "0");
      this.current = { key: box.dataset.key, side: box.dataset.side };
      box.focus();
    }
    scale(zoom) {
      this.zoom = Math.min(3, Math.max(0.1, zoom));
      this.svg.setAttribute("width", this.w * this.zoom);
      this.svg.setAttribute("height", this.h * this.zoom);
    }
    fit() {
      const room = this.scroll.clientWidth - 4;
      this.scale(room > 0 ? Math.min(1, Math.max(0.5, room / this.w)) : 1);
    }
    show(name) {
      const search = (kind, path, key) => {
        for (const [place, entry] of kind.entries.entries()) {
          const at = key ? `${key}/${place}` : String(place);
          if (entry.function) continue;
          for (const [member, label] of this.labels(entry).entries()) {
            const full = this.join(path, label);
            const here = this.isModule(entry) ? [] : [[at, this.labels(entry).length > 1 ? member : null]];
            if (here.length && full === name) return here;
            if (!this.isModule(entry) || !(full === name || name.startsWith(`${full}.`))) continue;
            const kinds = entry.kinds ?? [entry.kind];
            const inner = this.data.kinds[kinds[kinds.length > 1 ? member : 0]];
            const found = inner && search(inner, full, at);
            if (found) return [[at, this.labels(entry).length > 1 ? member : null], ...found];
          }
        }
        return null;
      };
      const found = search(this.data.kinds[this.data.root], "", "");
      if (!found) return false;
      for (const [key, member] of found) {
        this.open.add(key);
        if (member !== null) this.member.set(key, member);
      }
      const key = found.at(-1)[0];
      this.current = { key, side: this.mode === "before" ? "before" : "after" };
      this.select(key);
      this.fit();
      this.find(this.current)?.scrollIntoView({ block: "center", inline: "center" });
      return true;
    }
  }
  const labelsOf = (entry) => entry.labels ?? [entry.label];

  let drawing = null;
  return {
    // Draws into an element; onSelect is called with the path of an operator that is chosen.
    drawGraph(element, data, onSelect) {
      drawing = new Drawing(element, data, onSelect);
    },
    // Opens the picture at an operator; false if nothing is drawn yet, or it is not in it.
    showInGraph(name) {
      return drawing !== null && drawing.show(name);
    },
  };
})();
