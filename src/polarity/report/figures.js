"use strict";
// Everything a run wrote arrives packed (see page.py) and is shown with textContent, never as markup.

const byId = (id) => document.getElementById(id);

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

async function inflate(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// ---- figures: an empty Bokeh figure of each kind (figures.py), filled when its place comes near the window ----

const drawn = []; // {plot, view, node, data} of every figure drawn so far
const hiddenMethods = new Set();
let packed = null; // {templates, figures}

const digits = (value) => String(Number(value.toPrecision(6)));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function fillLines({ plot, data }) {
  const places = new Map(plot.renderers.map((r) => [r.name, r.data_source]));
  const atK = data.template === "pass at k";
  for (const [label, [x, mean, low = mean, high = mean]] of Object.entries(data.lines)) {
    const range = mean.map((_, i) => (low[i] === high[i] ? "" : `, seeds ${digits(low[i])} to ${digits(high[i])}`));
    const dots = data.dots ? mean : mean.map(() => NaN);
    places.get(label).data = { x, mean, low, high, dots, range, at: x.map((v) => (atK ? Math.round(2 ** v) : v)) };
  }
  if (data.scale) plot.y_range = new (Bokeh.require("models/ranges/range1d").Range1d)({ start: data.scale[0], end: data.scale[1] });
  const ends = Object.entries(data.lines).map(([label, [x, mean]]) => {
    const where = (i) => `${digits(mean.at(i))} at ${atK ? "k = " + Math.round(2 ** x.at(i)) : "step " + x.at(i)}`;
    return `${label}: ${where(0)}${x.length > 1 ? ", " + where(-1) : ""}`;
  });
  return ends.join("; ");
}

function fillAttribution({ plot, data }) {
  const [left, right] = data.edges;
  for (const { tags, data_source } of plot.renderers) {
    const name = tags.at(-1);
    if (data.parts[name]) {
      const [from, to] = data.parts[name];
      const bottom = from.map((v, i) => Math.min(v, to[i])), top = from.map((v, i) => Math.max(v, to[i]));
      data_source.data = { left, right, bottom, top, change: to.map((v, i) => v - from[i]), at: data.at };
    } else {
      data_source.data = { x: left.map((v, i) => (v + right[i]) / 2), y: data.bars[name].map((v) => v ?? NaN) };
    }
  }
  [plot.y_range.start, plot.y_range.end] = data.scale;
  return "contributions to the change of entropy; their sums are in the table below the figures";
}

const HALF = 0.09; // half the width of a column of the pattern flow, in columns

function fillFlow({ plot, data, node }) {
  const flow = data.splits[byId("flow-split").value];
  const [ribbons, nodes] = ["ribbons", "nodes"].map((name) => plot.renderers.find((r) => r.name === name).data_source);
  const colour = data.patterns.map((_, i) => document.querySelectorAll("#patterns .key i")[i].style.backgroundColor);
  const name = (i) => data.patterns[i];
  const curve = Array.from({ length: 13 }, (_, i) => i / 12);
  const ease = (from, to, t) => from + (to - from) * t * t * (3 - 2 * t);
  const shown = flow ?? { nodes: [], ribbons: [], steps: [], problems: 1 };
  const there = shown.ribbons.map(([column]) => curve.map((t) => column + HALF + t * (1 - 2 * HALF)));
  ribbons.data = {
    xs: there.map((xs) => [...xs, ...[...xs].reverse()]),
    ys: shown.ribbons.map(([, , , b0, t0, b1, t1]) => [
      ...curve.map((t) => ease(b0, b1, t)), ...[...curve].reverse().map((t) => ease(t0, t1, t))]),
    colour: shown.ribbons.map(([, from]) => colour[from]),
    what: shown.ribbons.map(([, from, to]) => (from === to ? `stay ${name(from)}` : `${name(from)} → ${name(to)}`)),
    count: shown.ribbons.map((r) => `${r.at(-1)} of ${shown.problems}`),
    when: shown.ribbons.map(([column]) => `${shown.steps[column]} to ${shown.steps[column + 1]}`),
  };
  nodes.data = {
    left: shown.nodes.map(([column]) => column - HALF), right: shown.nodes.map(([column]) => column + HALF),
    bottom: shown.nodes.map((n) => n[2]), top: shown.nodes.map((n) => n[3]),
    colour: shown.nodes.map(([, pattern]) => colour[pattern]), what: shown.nodes.map(([, pattern]) => name(pattern)),
    count: shown.nodes.map((n) => `${n[4]} of ${shown.problems}`), when: shown.nodes.map(([column]) => shown.steps[column]),
  };
  const axis = plot.below[0];
  axis.ticker.ticks = shown.steps.map((_, i) => i);
  axis.major_label_overrides = new Map(shown.steps.map((step, i) => [i, String(step)]));
  [plot.x_range.start, plot.x_range.end] = [-2 * HALF, Math.max(1, shown.steps.length - 1) + 2 * HALF];
  [plot.y_range.start, plot.y_range.end] = [-0.02 * shown.problems, 1.02 * shown.problems];
  const caption = node.parentElement.querySelector("figcaption");
  caption.querySelector("small")?.remove();
  const pooled = flow?.seeds > 1 ? `, ${flow.seeds} seeds pooled` : "";
  const chosen = flow && flow.of > flow.steps.length ? `; ${flow.steps.length} of ${flow.of} evaluations` : "";
  const out = flow?.left_out ? `; ${flow.left_out} problems are not in every evaluation and left out` : "";
  caption.append(element("small", "", flow ? `${flow.problems} problems${pooled}${chosen}${out}` : "not evaluated on this split"));
  return "flow of problems between accuracy patterns; the table below the figures has its numbers";
}

const FILL = { attribution: fillAttribution, flow: fillFlow };

function style({ plot }) {
  for (const renderer of plot.renderers) {
    if (renderer.tags.includes("ink")) renderer.glyph.line_color = css("--ink");
  }
}

function showMethods({ plot, data }) {
  if (!data.lines) return;
  for (const renderer of plot.renderers) renderer.visible = !hiddenMethods.has(renderer.name);
}

async function draw(node) {
  const data = packed.figures[node.dataset.figure];
  const document_ = Bokeh.require("document").Document.from_json(structuredClone(packed.templates[data.template].doc));
  const figure = { plot: document_.roots()[0], node, data };
  const words = (FILL[data.template] ?? fillLines)(figure);
  const caption = (node.closest(".pair") ?? node.parentElement).querySelector("figcaption b").textContent;
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", `${caption}. ${words}`);
  style(figure);
  showMethods(figure);
  figure.view = [...await Bokeh.embed.add_document_standalone(document_, node)][0];
  node.addEventListener("dblclick", () => figure.view.reset());
  drawn.push(figure);
}

async function startFigures() {
  const script = element("script");
  script.textContent = await inflate("bokeh");
  document.head.append(script);
  packed = JSON.parse(await inflate("figures"));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "500px" });
  document.querySelectorAll(".plot").forEach((node) => observer.observe(node));
  fillFlowTables();
}

function toggleMethod(label, shown = hiddenMethods.has(label)) {
  if (shown) hiddenMethods.delete(label);
  else hiddenMethods.add(label);
  for (const button of document.querySelectorAll(".method")) {
    button.setAttribute("aria-pressed", String(!hiddenMethods.has(button.dataset.method)));
  }
  for (const node of document.querySelectorAll("[data-of]")) node.hidden = hiddenMethods.has(node.dataset.of);
  drawn.forEach(showMethods);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawn.forEach((figure) => { style(figure); figure.view.request_repaint(); });
}

// ---- the pattern flow as a table: problems in each pattern, and what moved since the evaluation before ----

function fillFlowTables() {
  const split = byId("flow-split")?.value;
  if (!split) return;
  const tables = packed.figures.filter((data) => data?.template === "flow" && data.splits[split]);
  const names = [...document.querySelectorAll("#patterns figure")].map((node) => node.dataset.of);
  byId("flow-rows").replaceChildren(...tables.map((data) => {
    const flow = data.splits[split], table = element("table");
    const label = names[packed.figures.filter((d) => d?.template === "flow").indexOf(data)];
    table.append(element("caption", "", `${label}: ${flow.problems} problems, ${split}`));
    const head = table.createTHead().insertRow();
    for (const word of ["step", ...data.patterns, "moves since the row before"]) {
      const cell = element("th", word.startsWith("moves") ? "words" : "", word);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    flow.steps.forEach((step, column) => {
      const row = body.insertRow(), cell = element("th", "", String(step));
      cell.scope = "row";
      row.append(cell);
      data.patterns.forEach((_, pattern) => {
        row.insertCell().textContent = flow.nodes.find((n) => n[0] === column && n[1] === pattern)?.[4] ?? 0;
      });
      const moves = flow.ribbons.filter(([from, a, b]) => from === column - 1 && a !== b);
      const last = row.insertCell();
      last.className = "words";
      last.textContent = moves.map((r) => `${data.patterns[r[1]]} → ${data.patterns[r[2]]} ${r.at(-1)}`).join(", ") || "–";
    });
    const scroll = element("div", "scroll");
    scroll.tabIndex = 0;
    scroll.append(table);
    return scroll;
  }));
}

byId("flow-split")?.addEventListener("change", () => {
  drawn.filter(({ data }) => data.template === "flow").forEach(fillFlow);
  fillFlowTables();
});
document.querySelectorAll(".method").forEach((button) => button.addEventListener("click", () => toggleMethod(button.dataset.method)));
