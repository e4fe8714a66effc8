// ---- drawings: what is given in pixels, and axes for what is not -----------------------

function draw(plot) {
  const across = plot.x.length, down = plot.y.length;
  const svg = drawn("svg", {
    viewBox: `-66 -20 ${across + 92} ${down + (plot.x.title ? 62 : 44)}`,
    role: "img",
    "aria-label": plot.title + (plot.x.title ? ` against ${plot.x.title}` : ""),
  });
  if (plot.shade !== undefined && plot.shade !== null)
    svg.append(drawn("rect", { class: "keep", width: plot.shade, height: down }));
  const grid = plot.y.ticks.map(([at]) => `M0 ${down - at}h${across}`).join("") + plot.x.ticks.map(([at]) => `M${at} 0v${down}`).join("");
  svg.append(drawn("path", { class: "grid", d: grid }));
  for (const [at, text] of plot.y.ticks) svg.append(drawn("text", { x: -8, y: down - at + 4, "text-anchor": "end" }, text));
  for (const [at, text] of plot.x.ticks) svg.append(drawn("text", { x: at, y: down + 17, "text-anchor": "middle" }, text));
  svg.append(drawn("path", { class: "axis", d: `M0 ${down}h${across}` }));
  if (plot.curve.length) svg.append(drawn("polyline", { class: "curve", points: plot.curve.map((at) => at.join(",")).join(" ") }));
  for (const line of plot.lines) {
    svg.append(drawn("line", { class: line.kind, x1: line.from[0], y1: line.from[1], x2: line.to[0], y2: line.to[1] }));
    if (line.text) {
      const x = line.from[0], anchor = x < 60 ? "start" : x > across - 60 ? "end" : "middle";
      svg.append(drawn("text", { class: line.kind + "-text", x, y: line.from[1] - 6, "text-anchor": anchor }, line.text));
    }
  }
  for (const mark of plot.marks) {
    const [x, y] = mark.at, group = drawn("g", {}, drawn("title", {}, mark.text));
    if (mark.spread) group.append(drawn("line", { class: "spread", x1: x, x2: x, y1: mark.spread[0], y2: mark.spread[1] }));
    group.append(drawn("circle", { class: "mark " + (mark.kind || ""), cx: x, cy: y, r: mark.kind ? 6 : 4 }));
    if (mark.label) group.append(drawn("text", { class: "today-text", x: x + 9, y: y - 8 }, mark.label));
    svg.append(group);
  }
  if (plot.x.title) svg.append(drawn("text", { x: across / 2, y: down + 36, "text-anchor": "middle" }, plot.x.title));
  if (plot.y.title) svg.append(drawn("text", { transform: `translate(-54 ${down / 2}) rotate(-90)`, "text-anchor": "middle" }, plot.y.title));
  return svg;
}

const DECADES = 8; // smaller values stand at the low end

// A scale between powers of ten: where a value is, and the ticks.
function decades(values, length, title = "") {
  const logs = values.filter((x) => x > 0).map(Math.log10);
  const high = Math.ceil(Math.max(...logs)), low = Math.min(Math.max(Math.floor(Math.min(...logs)), high - DECADES), high - 1);
  const place = (x) => +((length * (Math.log10(Math.max(x, 10 ** low)) - low)) / (high - low)).toFixed(1);
  const ticks = [];
  for (let power = low; power <= high; power += 1)
    for (const factor of high - low <= 2 && power < high ? [1, 2, 5] : [1]) ticks.push(factor * 10 ** power);
  return { length, title, place, ticks: ticks.map((x) => [place(x), String(+x.toPrecision(3))]) };
}

// A scale between two numbers, with ticks at round ones and, if asked for, at both ends.
function even(low, high, length, title = "", text = String, ends = false) {
  const place = (x) => +((length * (x - low)) / (high - low || 1)).toFixed(1);
  const raw = (high - low) / 6 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
  let ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at += 1) ticks.push(+(at * step).toPrecision(12));
  if (ends) ticks = [low, ...ticks.filter((x) => x - low > step / 2 && high - x > step / 2), high];
  return { length, title, place, ticks: [...new Set(ticks)].map((x) => [place(x), text(x)]) };
}

// Singular values by their number, cut between the last that is kept and the next.
function spectrum(values, full, kept, text) {
  const top = Math.max(...values, 0);
  if (!(top > 0)) return null;
  const x = even(1, Math.max(full, 2), 520, "", String, true), y = decades(values, 170);
  const step = (full - 1) / Math.max(values.length - 1, 1);
  const cut = kept === null ? null : x.place(Math.min(kept + 0.5, full));
  return draw({
    title: "Spectrum", x, y, marks: [], shade: cut,
    curve: values.map((value, at) => [x.place(1 + step * at), +(y.length - y.place(value)).toFixed(1)]),
    lines: cut === null ? [] : [{ kind: "cut", text, from: [cut, 0], to: [cut, y.length] }],
  });
}

// The frontier with the point of today, and those a percent beside it.
function frontierPlot(given) {
  const places = given.loss.map((_, i) => i).filter((i) => given.loss[i] > 0); // none of no loss
  const losses = places.map((i) => given.loss[i]);
  if (losses.length < 2) return null;
  const x = even(Math.min(...given.keep, given.today[0]), Math.max(...given.keep, given.today[0]), 560, given.x, (v) => Math.round(100 * v) + "%");
  const y = decades([...losses, given.today[1]], 260, given.y);
  const at = (keep, loss) => [x.place(keep), +(y.length - y.place(loss)).toFixed(1)];
  const points = places.map((i) => at(given.keep[i], given.loss[i]));
  const marks = places.map((i, place) => ({ at: points[place], text: `${(100 * given.keep[i]).toFixed(1)}% kept: ${written("loss", given.loss[i])}` }));
  if (given.today[1] > 0) marks.push({ at: at(...given.today), kind: "today", label: "this plan", text: `this plan: ${(100 * given.today[0]).toFixed(1)}% kept, ${written("loss", given.today[1])}` });
  return draw({ title: given.y, x, y, curve: points, marks, lines: [] });
}
