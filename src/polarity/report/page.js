"use strict";
// Everything a run wrote arrives packed (see page.py) and is shown with textContent, never as markup.

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const byId = (id) => document.getElementById(id);

// ---- figures: drawn when they come near the window ----

const views = []; // one Bokeh plot view for each figure drawn so far
const hiddenMethods = new Set();

function showMethods(view) {
  for (const renderer of view.model.renderers) renderer.visible = !hiddenMethods.has(renderer.name);
}

async function startFigures() {
  const figures = await unpack("figures");
  const draw = async (node) => {
    const manager = await Bokeh.embed.embed_item(figures[node.dataset.figure], node);
    const view = [...manager][0];
    views.push(view);
    showMethods(view);
  };
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "500px" });
  document.querySelectorAll(".plot").forEach((node) => observer.observe(node));
}

document.querySelectorAll(".method").forEach((button) => button.addEventListener("click", () => {
  const name = button.dataset.method;
  if (!hiddenMethods.delete(name)) hiddenMethods.add(name);
  button.setAttribute("aria-pressed", String(!hiddenMethods.has(name)));
  views.forEach(showMethods);
}));

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  views.forEach((view) => view.request_repaint());
}
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));

// ---- samples ----

const unpacked = new Map(); // run index -> promise of its samples
const runSelect = byId("sample-run"), stepSelect = byId("sample-step"), problemSelect = byId("sample-problem");
const tip = byId("tip");
let current = null; // samples of the chosen run
let shownTokens = []; // {span, row, index} of every token on the page

// Controls, zero-width and direction-changing characters would be invisible or would reorder text: show their code instead.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const visible = (text) => text.replace(UNSEEN, (c) => "⟨" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
const inRun = (text) => visible(text).replaceAll("\n", "↵\n");

const COLOURS = {
  p: { text: "probability 1 to 0.05 and below", gradient: "transparent, rgba(var(--low), .7)",
       paint: (v) => ["--low", Math.min(1, v / 300)] },
  e: { text: "entropy 0 to 1.5 nats and above", gradient: "transparent, rgba(var(--high), .7)",
       paint: (v) => ["--high", Math.min(1, v / 1500)] },
  w: { text: "weight below 1, 1, above 1", gradient: "rgba(var(--down), .7), transparent, rgba(var(--up), .7)",
       paint: (v) => [v > 1000 ? "--up" : "--down", v === 1000 ? 0 : 0.35 + 0.65 * Math.min(1, Math.abs(Math.log(v / 1000)) / 1.6)] },
};
const colourMode = () => document.querySelector('input[name="colour"]:checked').value;

function fill(select, labels) {
  select.replaceChildren(...labels.map((label, i) => { const o = element("option", "", label); o.value = i; return o; }));
}

async function chooseRun() {
  const index = runSelect.value;
  if (!unpacked.has(index)) unpacked.set(index, unpack("samples-" + index));
  const samples = await unpacked.get(index);
  if (index !== runSelect.value) return; // another run was chosen meanwhile
  const before = current?.steps[stepSelect.value]?.step;
  current = samples;
  fill(stepSelect, current.steps.map((s) => String(s.step)));
  const same = current.steps.findIndex((s) => s.step === before);
  stepSelect.value = same >= 0 ? same : current.steps.length - 1;
  byId("sample-note").textContent = current.steps.length ? "Shown: " + current.note + "." : "This run logged no rollouts.";
  chooseStep();
}

function chooseStep() {
  const groups = current.steps[stepSelect.value]?.groups ?? [];
  fill(problemSelect, groups.map((g) => `${visible(g.problem)} (${g.rows.filter((r) => r.correct).length} of ${g.rows.length} correct)`));
  showGroup();
}

function showGroup() {
  shownTokens = [];
  tip.hidden = true;
  const group = current.steps[stepSelect.value]?.groups[problemSelect.value];
  const text = byId("sample-problem-text");
  text.replaceChildren();
  if (group) {
    text.append(element("div", "text prompt", visible(group.prompt)), element("p", "about", "reference answer: " + visible(group.gold)));
  }
  for (const [side, correct] of [["positive", true], ["negative", false]]) {
    const rows = group ? group.rows.filter((row) => row.correct === correct) : [];
    byId("count-" + side).textContent = `${rows.length} ${correct ? "correct" : "wrong"}`;
    byId("rows-" + side).replaceChildren(...rows.map((row) => card(row, side)));
  }
  paint();
}

function card(row, side) {
  const node = element("article", "card " + side);
  const facts = element("div", "facts");
  const add = (text) => facts.append(element("span", "", text));
  if (row.status !== "correct" && row.status !== "wrong") add(row.status);
  if (row.strategy) add("strategy " + visible(row.strategy));
  if (row.reward !== null) add("reward " + row.reward.toFixed(2));
  if (row.advantage !== null) add("advantage " + row.advantage.toFixed(3));
  add(row.length + " tokens" + (row.t.length < row.length ? `, first ${row.t.length} shown` : ""));
  if (row.truncated) add("truncated");
  const tokens = element("div", "text tokens");
  tokens.tabIndex = 0;
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", `${row.correct ? "correct" : "wrong"} response, ${row.length} tokens`);
  row.t.forEach((number, index) => {
    const span = element("span", row.w && row.w[index] !== 1000 ? "shaped" : "", inRun(current.vocabulary[number]));
    shownTokens.push({ span, row, index });
    span.addEventListener("mouseenter", () => showTip(span, row, index));
    span.addEventListener("mouseleave", () => { tip.hidden = true; });
    tokens.append(span);
  });
  let at = -1;
  tokens.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || !row.t.length) return;
    event.preventDefault();
    tokens.children[at]?.classList.remove("at");
    at = Math.max(0, Math.min(row.t.length - 1, at + move));
    tokens.children[at].classList.add("at");
    tokens.children[at].scrollIntoView({ block: "nearest" });
    showTip(tokens.children[at], row, at);
  });
  tokens.addEventListener("blur", () => { tokens.children[at]?.classList.remove("at"); tip.hidden = true; });
  node.append(facts, tokens);
  return node;
}

function showTip(span, row, index) {
  const has = (name) => row[name] && row[name][index] !== null;
  const weight = row.w ? row.w[index] / 1000 : 1;
  const lines = [`token ${index + 1}: ${JSON.stringify(visible(current.vocabulary[row.t[index]]))}`];
  if (has("p")) lines.push(`probability ${Math.exp(-row.p[index] / 100).toPrecision(3)}`);
  if (has("e")) lines.push(`entropy ${(row.e[index] / 1000).toFixed(3)} nats`);
  lines.push(`weight ${weight}` + (row.advantage === null ? "" : `, advantage ${(row.advantage * weight).toFixed(3)}`));
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = span.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - own.width - 4)) + "px";
  tip.style.top = (box.bottom + own.height + 6 < innerHeight ? box.bottom + 4 : box.top - own.height - 4) + "px";
}

function paint() {
  const mode = colourMode(), { text, gradient, paint: colour } = COLOURS[mode];
  const bar = element("b");
  bar.style.background = `linear-gradient(to right, ${gradient})`;
  byId("sample-scale").replaceChildren(bar, element("span", "", text));
  for (const { span, row, index } of shownTokens) {
    const value = row[mode]?.[index];
    const [name, strength] = value === undefined || value === null ? ["--low", 0] : colour(value);
    span.style.background = strength > 0.03 ? `rgba(var(${name}), ${(0.7 * strength).toFixed(2)})` : "";
  }
}

function step(select, by) {
  const to = select.selectedIndex + by;
  if (to < 0 || to >= select.options.length) return;
  select.selectedIndex = to;
  select.dispatchEvent(new Event("change"));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName) || !current) return;
  if (event.key === "[") step(stepSelect, -1);
  else if (event.key === "]") step(stepSelect, 1);
  else if (event.key === "k") step(problemSelect, -1);
  else if (event.key === "j") step(problemSelect, 1);
  else if (event.key === "c") {
    const radios = [...document.querySelectorAll('input[name="colour"]')];
    radios[(radios.findIndex((r) => r.checked) + 1) % radios.length].checked = true;
    paint();
  }
});
runSelect.addEventListener("change", chooseRun);
stepSelect.addEventListener("change", chooseStep);
problemSelect.addEventListener("change", showGroup);
document.querySelectorAll('input[name="colour"]').forEach((radio) => radio.addEventListener("change", paint));

startFigures();
chooseRun();
