"use strict";
// ---- elements from text, never from markup; numbers as they are written ----------------

function element(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((one) => one !== null && one !== undefined && one !== ""));
  return made;
}

function drawn(tag, given = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const WRITE = {
  count: (x) => whole.format(x),
  short: (x) => {
    if (Math.abs(x) < 1000) return whole.format(x);
    const at = Math.min(Math.floor(Math.log10(Math.abs(x) * 1.0005) / 3), 4);
    return (x / 1000 ** at).toPrecision(3) + ["", "k", "M", "G", "T"][at];
  },
  // Two digits in one notation, whatever the size: columns of them are compared by eye.
  loss: (x) => (x === 0 ? "0" : x.toExponential(1)),
  seconds: (x) => (x >= 1 ? x.toPrecision(3) + " s" : x >= 1e-3 ? (1e3 * x).toPrecision(3) + " ms" : (1e6 * x).toPrecision(3) + " µs"),
  percent: (x) => (100 * x).toFixed(1) + "%",
  share: (x) => (x === 0 ? "0%" : x < 0.001 ? "<0.1%" : (100 * x).toFixed(1) + "%"),
};
const written = (how, x) => (x === null || x === undefined ? "–" : WRITE[how](x));
