// The graph before and after, side by side: drawGraph(element, data, onSelect) draws what
// fxcompress.picture.graph_data made, and showInGraph(name) opens it at an operator.
const { drawGraph, showInGraph } = (() => {
  "use strict";
  const { OUTSIDE, GAP, CLASSES, SIDES, count, brief, range } = GraphBoxes;
  const SVG = "http:" + "//www.w3.org/2000/svg"; // a name, never fetched
  const PANE = { gap: 48, title: 30 };

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
  class Drawing extends GraphBoxes {
    constructor(element, data, onSelect) {
      super(data);
      this.onSelect = onSelect;
      this.selected = null;
      this.current = null; // where the keyboard is: side and key
      this.build(element);
      this.mode = this.scroll.clientWidth && this.scroll.clientWidth < 700 ? "after" : "both";
      this.zoom = 1;
      this.render();
      this.fit();
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
      const present = this.root.counts;
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
      const kind = this.root;
      const root = this.measure(kind, "");
      const shown = this.mode === "both" ? Object.keys(SIDES) : [this.mode];
      this.w = shown.length * (root.w + PANE.gap);
      this.h = root.h + PANE.title + GAP.frame;
      this.svg = make("svg", {
        viewBox: `0 0 ${this.w} ${this.h}`,
        role: "group",
        "aria-label": `${this.data.model}, ${shown.join(" and ")}`,
      });
      const bundle = this.selected ? this.bundleOf(this.selected) : null;
      shown.forEach((side, pane) => {
        const x = pane * (root.w + PANE.gap) + PANE.gap / 2;
        const text = side === "after" && this.data.planned ? "after, as planned" : side;
        this.svg.append(make("text", { x: x + root.w / 2, y: 18, class: "pane" }, text));
        if (pane) {
          const at = x - PANE.gap / 2;
          this.svg.append(make("line", { x1: at, x2: at, y1: 0, y2: this.h, class: "divide" }));
        }
        this.drawInside(this.svg, root, side, x, PANE.title, PANE.title - 8, this.h, bundle);
      });
      this.scroll.replaceChildren(this.svg);
      for (const view of this.views) {
        view.setAttribute("aria-pressed", view.dataset.mode === this.mode);
      }
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
        // Sideways only between rows, so that no edge runs behind a box.
        const points = from ? [[from.x + from.w / 2, from.y + from.h]] : [[middle, top]];
        if (from) points.push([from.x + from.w / 2, y + inner.boxes[source].bottom]);
        for (const place of inner.passing.get(edge) ?? []) {
          points.push([x + place.x, y + place.top], [x + place.x, y + place.bottom]);
        }
        if (to) points.push([to.x + to.w / 2, y + inner.boxes[target].top]);
        points.push(to ? [to.x + to.w / 2, to.y] : [middle, bottom]);
        let path = `M${points[0]}`;
        points.slice(1).forEach(([px, py], at) => {
          const [ox, oy] = points[at];
          const half = (oy + py) / 2;
          path += px === ox ? `L${px},${py}` : `C${ox},${half} ${px},${half} ${px},${py}`;
        });
        // To what runs again, of a module that is called several times.
        const back = from && to && to.y < from.y ? " back" : "";
        const one = (sides === 3 ? "edge" : `edge only-${side}`) + back;
        edges.append(make("path", { d: path, class: one }));
        if (!to) return;
        const tip = `M${to.x + to.w / 2 - 3},${to.y - 5}l3,5l3,-5z`;
        edges.append(make("path", { d: tip, class: "tip" }));
      });
      for (const box of inner.boxes) {
        if (box.size[side]) this.drawBox(parent, box, side, x, y, bundle);
      }
    }
    drawBox(parent, box, side, x, y, bundle) {
      const { entry, key } = box;
      const at = this.frame(box, side, x, y);
      const open = this.isOpen(entry, key, side);
      const inner = this.inside(entry, key);
      const status = CLASSES[entry.status];
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
      const what = module ? [] : [this.data.statuses[entry.status]];
      const group = make("g", {
        class: classes.join(" "),
        "data-key": key,
        "data-side": side,
        role: "button",
        tabindex: "-1",
        "aria-label": [title, ...lines, ...what, side].join(", "),
      });
      if (inner && (module || side === "after")) group.setAttribute("aria-expanded", open);
      const several = this.labels(entry).length > 1 && !this.member.has(key) && !open;
      for (const shift of several ? [6, 3, 0] : [0]) {
        const corner = { x: at.x + shift, y: at.y + shift, rx: module ? 6 : 4 };
        group.append(make("rect", { ...corner, width: at.w, height: at.h, class: "shape" }));
      }
      const mark = inner && (module || side === "after") ? (open ? "▾ " : "▸ ") : "";
      if (open) {
        const text = make("text", { x: at.x + 9, y: at.y + 16, class: "title" }, mark + title);
        if (lines.length) text.append(make("tspan", { class: "line", dx: 8 }, lines.join("  ·  ")));
        group.append(text);
      } else {
        const middle = at.x + at.w / 2;
        group.append(make("text", { x: middle, y: at.y + 15, class: "title middle" }, mark + title));
        lines.forEach((line, number) => {
          const place = { x: middle, y: at.y + 29 + 14 * number };
          group.append(make("text", { ...place, class: "line middle" }, line));
        });
        if (module && inner) this.chips(group, this.changes(inner), middle, at.y + at.h - 17);
      }
      parent.append(group);
      if (open) {
        const left = at.x + (at.w - box.inner.w) / 2;
        const head = at.y + GAP.head;
        const bottom = at.y + at.h;
        this.drawInside(parent, box.inner, side, left, head + GAP.frame, head - 4, bottom, bundle);
      }
    }
    // How many operators of a module were changed in which way.
    chips(group, counts, middle, y) {
      const some = counts.map((number, at) => [number, at]).filter(([number]) => number);
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
        ["all of them", ...labels].forEach((text, value) => {
          choice.append(html("option", { value }, text));
        });
        choice.value = String((this.member.get(at) ?? -1) + 1);
        choice.addEventListener("change", () => {
          if (choice.value === "0") this.member.delete(at);
          else this.member.set(at, Number(choice.value) - 1);
          this.select(key);
        });
        row("of the blocks", choice);
      });
      if (!this.isModule(entry)) {
        const status = this.data.statuses[entry.status];
        const was = [entry.before, entry.shape].map(this.name);
        const now = [entry.after ?? entry.before, entry.now ?? entry.shape].map(this.name);
        const words = (texts) => texts.filter(Boolean).join(", value of ");
        if (entry.sides & SIDES.before) row("before", words(was));
        if (entry.sides & SIDES.after) row("after", words(now));
        row("what happened", status);
      }
      const sites = this.sites(key);
      if (entry.site && sites.length) {
        const all = (what) => sites.map((site) => this.get(site, what));
        const texts = (what) => [...new Set(all(what))].map(this.name).filter(Boolean);
        const ranks = this.rankText(sites);
        if (ranks) row("form", `${texts("form").join(" or ")}, ${ranks}`);
        const losses = all("predicted").filter((loss) => loss !== null);
        if (losses.length) {
          const each = losses.length > 1 ? " each" : "";
          row("predicted loss", `${range(losses, brief)} ${this.data.unit}${each}`);
        }
        row("parameters", `${range(all("before"), count)} → ${range(all("after"), count)}`);
        const reasons = texts("reason");
        if (reasons.length) row("stays dense", reasons.slice(0, 3).join("; "));
        row("rule", texts("rule").join(", "));
        const together = texts("bundle");
        if (together.length) row("together", together.slice(0, 3).join("; "));
      } else if (Object.hasOwn(this.data.unmatched, paths[0])) {
        row("not matched", this.name(this.data.unmatched[paths[0]]));
      }
      const place = Number(key.split("/").at(-1));
      const near = (end, other) => {
        const found = around.edges.filter((edge) => edge[end] === place).map((edge) => edge[other]);
        const outer = key.split("/").slice(0, -1);
        const named = found.map((at) =>
          at === OUTSIDE
            ? "what is outside of this module"
            : this.title(around.entries[at], [...outer, at].join("/")),
        );
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
            const step = [at, this.labels(entry).length > 1 ? member : null];
            if (!this.isModule(entry)) {
              if (full === name) return [step];
              continue;
            }
            if (full !== name && !name.startsWith(`${full}.`)) continue;
            const kinds = entry.kinds ?? [entry.kind];
            const inner = this.kinds[kinds[kinds.length > 1 ? member : 0]];
            const found = inner && search(inner, full, at);
            if (found) return [step, ...found];
          }
        }
        return null;
      };
      const found = search(this.root, "", "");
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
