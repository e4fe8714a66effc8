// What is in the picture of a graph, and where: entries of the data with the texts in their boxes,
// and sizes and places of those that are open.  graph.js draws it, and has to stand behind this.
const GraphBoxes = (() => {
  "use strict";
  const OUTSIDE = -1; // what is outside of a box, in the edges among those in it
  const GAP = { row: 30, column: 14, frame: 14, head: 24 };
  const CLASSES = ["unchanged", "factorized", "narrowed", "dense", "dropped", "added"];
  const SIDES = { before: 1, after: 2 };
  const FEW = 45; // entries that are open at first
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
  const count = (number) => number.toLocaleString("en-US");
  const brief = (number) => (number === 0 ? "0" : String(Number(number.toPrecision(3))));
  function range(values, write) {
    const low = write(Math.min(...values));
    const high = write(Math.max(...values));
    return low === high ? low : `${low}..${high}`;
  }

  return class {
    static OUTSIDE = OUTSIDE;
    static GAP = GAP;
    static CLASSES = CLASSES;
    static SIDES = SIDES;
    static count = count;
    static brief = brief;
    static range = range;

    constructor(data) {
      this.data = data;
      this.name = (at) => (at === undefined ? "" : data.names[at]);
      this.column = Object.fromEntries(data.site.map((name, at) => [name, at]));
      this.open = new Set(); // keys of entries
      this.member = new Map(); // of folded entries, which one is looked at
      // What the data leave out because it is usual.
      this.kinds = data.kinds.map((kind) => ({
        edges: kind.edges,
        rows: kind.rows ?? kind.entries.map((_, place) => [place]),
        entries: kind.entries.map((entry) => ({ status: 0, sides: 3, ...entry })),
      }));
      for (const entry of this.kinds.flatMap((kind) => kind.entries)) {
        if (!entry.site) continue;
        for (const body of entry.kinds ?? [entry.kind]) {
          for (const inner of this.kinds[body]?.entries ?? []) {
            Object.assign(inner, { status: 1, sides: 2 });
          }
        }
      }
      for (const kind of this.kinds) kind.counts = this.countsOf(kind);
      this.root = this.kinds[data.root];
      this.openAtFirst();
    }
    // How many operators of every status are in a kind; those inside of it come before it.
    countsOf(kind) {
      const found = CLASSES.map(() => 0);
      for (const entry of kind.entries) {
        if (!this.isModule(entry)) found[entry.status] += 1;
        else {
          const inner = this.kinds[(entry.kinds ?? [entry.kind])[0]];
          inner?.counts.forEach((number, at) => (found[at] += number * this.labels(entry).length));
        }
      }
      return found;
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
      return kind === undefined ? null : this.kinds[kind];
    }
    // Entries on the way to one, with their keys: "3/9" is entry 9 in entry 3 of the model.
    way(key) {
      const found = [];
      let kind = this.root;
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
      const rewritten = sites.filter((site) => this.name(this.get(site, "form")));
      if (!rewritten.length) return "";
      const first = this.get(rewritten[0], "full");
      return first
        .map((full, at) => {
          const letter = at === 0 && this.isNarrow(rewritten[0]) ? "k" : "r";
          const known = rewritten.map((site) => this.get(site, "ranks")[at]).filter(Boolean);
          return `${letter} ${range(known, count)} of ${count(full)}`;
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
        if (labels.length < 2) return [];
        return [this.member.has(key) ? `one of ${labels.length} alike` : `${labels.length} alike`];
      }
      const text = this.name(side === "before" ? entry.before : entry.after ?? entry.before);
      const shape = this.name(side === "before" ? entry.shape : entry.now ?? entry.shape);
      const found = text && !(entry.function && text === labels[0]) ? [text] : [];
      if (entry.site && side === "after") {
        const sites = this.sites(key);
        const ranks = this.rankText(sites);
        if (CLASSES[entry.status] === "dense") found.push("left dense");
        else if (ranks) found.push(ranks);
      } else if (side === "after" && CLASSES[entry.status] === "dropped") {
        found.push("does nothing any more");
      }
      if (shape && !(entry.site && entry.kind !== undefined && side === "after")) found.push(shape);
      return found;
    }
    changes(kind) {
      return kind.counts.map((number, at) => (at ? number : 0));
    }
    openAtFirst() {
      const queue = [{ kind: this.root, key: "" }];
      let shown = queue[0].kind.entries.length;
      const bodies = [];
      while (queue.length) {
        const { kind, key } = queue.shift();
        kind.entries.forEach((entry, place) => {
          const at = key ? `${key}/${place}` : String(place);
          const inner = this.inside(entry, at);
          if (!inner) return;
          if (!this.isModule(entry)) bodies.push({ at, size: inner.entries.length });
          else if (this.changes(inner).some(Boolean) && shown + inner.entries.length <= FEW) {
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
      const number = inner ? this.changes(inner).filter(Boolean).length : 0;
      texts.push(26 * number);
      const chips = number ? 16 : 0;
      return { w: Math.ceil(Math.max(...texts)) + 18, h: 22 + 14 * lines.length + chips };
    }
    isOpen(entry, key, side) {
      return (
        this.open.has(key) &&
        this.inside(entry, key) !== null &&
        (this.isModule(entry) || side === "after")
      );
    }
    measureEntry(entry, key) {
      const sides = Object.keys(SIDES).filter((side) => entry.sides & SIDES[side]);
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
          what < 0 ? { edge: -1 - what, w: 4 } : { place: what, box: boxes[what], w: boxes[what].w },
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
            Object.assign(item.box, { y: row.y + row.h / 2, top: row.y, bottom: row.y + row.h });
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
  };
})();
