"use strict";
// The rollouts: run, step, problem; filters; responses as text and token by token. Legend of the numbers: samples.py.

const unpacked = new Map(); // run index -> promise of its samples
const runSelect = byId("sample-run"), stepSelect = byId("sample-step"), problemSelect = byId("sample-problem");
const find = byId("find"), statusFilter = byId("filter-status"), strategyFilter = byId("filter-strategy");
const keptFilter = byId("filter-kept"), shapedFilter = byId("filter-shaped");
const tip = byId("tip");
const BATCH = 500; // tokens that are put on the page at a time, as the reader comes near them
let current = null; // samples of the chosen run
let cards = []; // of the shown responses

// Characters that would be invisible, or would reorder text, are shown by their code (text.py does the same).
const UNSEEN = /(?![\t\n])[\p{C}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2028\u2029\u2800\u3164\ufe00-\ufe0f\uffa0\u{e0100}-\u{e01ef}]/gu;
const visible = (text) => text.replace(UNSEEN, (c) => "⟨" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
const inRun = (text) => visible(text).replaceAll("\n", "↵\n");

const COLOURS = {
  p: { name: "token probabilities", text: "probability 1 to 0.05 and below", gradient: "transparent, rgba(var(--low), .7)",
       paint: (v) => ["--low", Math.min(1, v / 300)] },
  e: { name: "entropies", text: "entropy 0 to 1.5 nats and above", gradient: "transparent, rgba(var(--high), .7)",
       paint: (v) => ["--high", Math.min(1, v / 1500)] },
  w: { name: "advantage weights", text: "weight below 1, 1, above 1", gradient: "rgba(var(--down), .7), transparent, rgba(var(--up), .7)",
       paint: (v) => [v > 1000 ? "--up" : "--down", v === 1000 ? 0 : 0.35 + 0.65 * Math.min(1, Math.abs(Math.log(v / 1000)) / 1.6)] },
  a: { name: "advantages", text: "advantage below 0, 0, above 0", gradient: "rgba(var(--down), .7), transparent, rgba(var(--up), .7)",
       paint: (v) => [v > 0 ? "--up" : "--down", Math.min(1, Math.abs(v) / 2000)] },
};
const colourMode = () => document.querySelector('input[name="colour"]:checked').value;

// ---- filters ----

const rowText = (row) => (row.text ??= row.t.map((n) => current.vocabulary[n]).join("").toLowerCase());
const wanted = () => find.value.toLowerCase();
const filtering = () => Boolean(wanted() || statusFilter.value || strategyFilter.value || keptFilter.checked || shapedFilter.checked);

function passes(row) {
  return (!statusFilter.value || row.status === statusFilter.value)
    && (!strategyFilter.value || (row.strategy ?? "none") === strategyFilter.value)
    && (!keptFilter.checked || row.kept === true) && (!shapedFilter.checked || row.w !== undefined)
    && (!wanted() || rowText(row).includes(wanted()));
}

function fill(select, labels, values) {
  select.replaceChildren(...labels.map((label, i) => { const o = element("option", "", label); o.value = values ? values[i] : i; return o; }));
}

function fillFilters() {
  const rows = current.steps.flatMap((s) => s.groups.flatMap((g) => g.rows));
  for (const [select, key] of [[statusFilter, "status"], [strategyFilter, "strategy"]]) {
    const values = [...new Set(rows.map((row) => row[key] ?? "none"))].sort(), before = select.value;
    fill(select, ["any", ...values.map(visible)], ["", ...values]);
    select.value = values.includes(before) ? before : "";
    select.parentElement.hidden = values.length < 2;
  }
  const parts = rows.some((row) => row.kept === true) && rows.some((row) => row.kept === false);
  const shaped = rows.some((row) => row.w);
  keptFilter.parentElement.hidden = !parts;
  shapedFilter.parentElement.hidden = !shaped;
  keptFilter.checked &&= parts;
  shapedFilter.checked &&= shaped;
}

function applyFilters() {
  const groups = current.steps[stepSelect.value]?.groups ?? [];
  const matches = groups.map((group) => group.rows.filter(passes).length);
  const on = filtering();
  [...problemSelect.options].forEach((option, i) => { option.textContent = option.dataset.label + (on ? ` · ${matches[i]} shown` : ""); });
  byId("filter-clear").hidden = !on;
  const total = matches.reduce((a, b) => a + b, 0), rows = groups.reduce((a, g) => a + g.rows.length, 0);
  byId("filter-count").textContent = on ? `${total} of ${rows} responses of this step` : "";
  if (on && total && !matches[problemSelect.value]) problemSelect.value = matches.findIndex((n) => n > 0);
  showGroup();
}

// ---- run, step, problem ----

async function chooseRun() {
  const index = runSelect.value;
  if (!unpacked.has(index)) unpacked.set(index, inflate("samples-" + index).then(JSON.parse));
  const samples = await unpacked.get(index);
  if (index !== runSelect.value) return; // another run was chosen meanwhile
  const before = current?.steps[stepSelect.value]?.step;
  current = samples;
  fill(stepSelect, current.steps.map((s) => String(s.step)));
  const same = current.steps.findIndex((s) => s.step === before);
  stepSelect.value = same >= 0 ? same : current.steps.length - 1;
  byId("sample-note").textContent = current.steps.length ? "Here: " + current.note + "." : "This run logged no rollouts.";
  fillFilters();
  chooseStep();
}

function chooseStep() {
  const groups = current.steps[stepSelect.value]?.groups ?? [];
  const short = (text) => (text.length > 60 ? text.slice(0, 60) + "…" : text);
  const labels = groups.map((g) => `${short(visible(g.problem))} (${g.rows.filter((r) => r.correct).length} of ${g.rows.length} correct)`);
  fill(problemSelect, labels);
  [...problemSelect.options].forEach((option, i) => { option.dataset.label = labels[i]; });
  applyFilters();
}

function showGroup() {
  const inside = document.activeElement?.classList.contains("tokens"); // a reader in the responses stays there
  cards.forEach((shown) => shown.observer.disconnect());
  cards = [];
  tip.hidden = true;
  const group = current.steps[stepSelect.value]?.groups[problemSelect.value];
  const text = byId("sample-problem-text");
  text.replaceChildren();
  if (group) {
    if (group.prompt) {
      const prompt = element("div", "text prompt", visible(group.prompt));
      prompt.tabIndex = 0;
      text.append(prompt);
    }
    const rest = group.of > group.rows.length ? `; ${group.rows.length} of its ${group.of} responses are here` : "";
    text.append(element("p", "about gold", (group.gold === undefined ? "no reference answer logged" : "reference answer: " + visible(group.gold)) + rest));
  }
  for (const [side, correct] of [["positive", true], ["negative", false]]) {
    const all = group ? group.rows.filter((row) => row.correct === correct) : [], rows = all.filter(passes);
    const count = rows.length === all.length ? String(all.length) : `${rows.length} of ${all.length}`;
    byId("count-" + side).textContent = `${correct ? "+" : "−"} ${count} ${correct ? "correct" : "wrong"}`;
    const own = rows.map((row) => new Card(row, side));
    byId("rows-" + side).replaceChildren(...own.map((shown) => shown.node));
    byId("rows-" + side).parentElement.classList.toggle("empty", !rows.length);
    cards.push(...own);
  }
  const empty = document.querySelectorAll("#sides > .empty").length; // an empty side leaves its place to the other
  byId("sides").classList.toggle("one", empty === 1);
  describeColour();
  if (inside) cards[0]?.tokens.focus({ preventScroll: true });
}

// ---- one response ----

class Card {
  constructor(row, side) {
    Object.assign(this, { row, spans: [], at: -1, found: this.search(row) });
    this.node = element("article", "card " + side);
    this.tokens = element("div", "text tokens" + (shapedFilter.checked ? " only-shaped" : ""));
    this.tokens.tabIndex = 0;
    this.tokens.setAttribute("role", "group");
    this.tokens.setAttribute("aria-label", `${row.correct ? "correct" : "wrong"} response, ${this.size()}`);
    this.end = element("span", "end");
    this.tokens.append(this.end);
    this.node.append(this.facts(), this.tokens);
    this.tokens.addEventListener("mouseover", (event) => this.show(this.spans.indexOf(event.target)));
    this.tokens.addEventListener("mouseleave", () => { tip.hidden = true; });
    this.tokens.addEventListener("keydown", (event) => this.key(event));
    this.tokens.addEventListener("blur", () => { this.leave(); tip.hidden = true; });
    this.observer = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      this.more(BATCH);
      this.observer.unobserve(this.end); // observed anew, it says whether the end is still in sight
      if (this.spans.length < row.t.length) this.observer.observe(this.end);
    }, { rootMargin: "300px" });
    this.more(BATCH);
    if (this.spans.length < row.t.length) this.observer.observe(this.end);
    if (this.found.size) requestAnimationFrame(() => this.reveal(Math.min(...this.found)));
  }

  size() {
    const { length, characters } = this.row;
    return length === undefined ? `${characters.toLocaleString("en")} characters` : `${length.toLocaleString("en")} tokens`;
  }

  facts() {
    const { row } = this, facts = element("div", "facts");
    const add = (text) => facts.append(element("span", "", text));
    if (row.status !== "correct" && row.status !== "wrong") add(visible(row.status));
    if (row.strategy) add("strategy " + visible(row.strategy));
    if (row.reward !== null) add("reward " + row.reward.toFixed(2));
    if (row.advantage !== null) add("advantage " + row.advantage.toFixed(3));
    add(this.size());
    if (row.length === undefined) add("tokens not logged: no colours");
    if (row.truncated) add("truncated at the length limit");
    if (row.kept === false) add("not trained on");
    return facts;
  }

  search(row) {
    const words = wanted(), found = new Set();
    if (!words) return found;
    const text = rowText(row), starts = [];
    let at = 0;
    for (const n of row.t) { starts.push(at); at += current.vocabulary[n].toLowerCase().length; }
    let token = 0;
    for (let from = text.indexOf(words); from >= 0; from = text.indexOf(words, from + words.length)) {
      while (token + 1 < starts.length && starts[token + 1] <= from) token++;
      for (let i = token; i < starts.length && starts[i] < from + words.length; i++) found.add(i);
    }
    return found;
  }

  more(count) {
    const { row, spans } = this, until = Math.min(row.t.length, spans.length + count), fresh = [];
    for (let i = spans.length; i < until; i++) {
      if (row.gap && i === row.gap[0]) {
        const what = row.length === undefined ? "characters" : "tokens";
        fresh.push(element("span", "gap", ` ⟨${row.gap[1].toLocaleString("en")} ${what} left out⟩ `));
      }
      const marks = [row.w && row.w[i] !== 1000 ? "shaped" : "", this.found.has(i) ? "found" : ""].filter(Boolean);
      const span = element("span", marks.join(" "), inRun(current.vocabulary[row.t[i]]));
      spans.push(span);
      fresh.push(span);
      this.paintOne(span, i, colourMode());
    }
    this.end.before(...fresh);
  }

  paintOne(span, i, mode) {
    const name = mode === "w" && !this.row.w && this.row.a ? "a" : mode, value = this.row[name]?.[i];
    const [variable, strength] = value === undefined || value === null ? ["--low", 0] : COLOURS[name].paint(value);
    span.style.background = strength > 0.03 ? `rgba(var(${variable}), ${(0.7 * strength).toFixed(2)})` : "";
  }

  paint(mode) {
    this.spans.forEach((span, i) => this.paintOne(span, i, mode));
  }

  reveal(i) {
    if (i >= this.spans.length) this.more(i + 1 - this.spans.length + BATCH);
    const span = this.spans[i], box = span.getBoundingClientRect(), own = this.tokens.getBoundingClientRect();
    if (box.bottom > own.bottom || box.top < own.top) this.tokens.scrollTop += box.top - own.top - own.height / 3;
  }

  key(event) {
    const { row } = this, last = row.t.length - 1;
    if (event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
    const marked = (i) => (row.w && row.w[i] !== 1000) || this.found.has(i);
    const next = (by) => { let i = this.at + by; while (i >= 0 && i <= last && !marked(i)) i += by; return i < 0 || i > last ? this.at : i; };
    const to = { ArrowRight: () => this.at + 1, ArrowLeft: () => this.at - 1, Home: () => 0, End: () => last, n: () => next(1), p: () => next(-1) }[event.key];
    if (event.key === "Escape") { this.leave(); tip.hidden = true; return; }
    if (!to) return;
    event.preventDefault();
    event.stopPropagation();
    const at = Math.max(0, Math.min(last, to()));
    this.leave();
    this.at = at;
    this.reveal(at);
    this.spans[at].classList.add("at");
    this.spans[at].scrollIntoView({ block: "nearest" });
    this.show(at);
  }

  leave() {
    this.spans[this.at]?.classList.remove("at");
    this.at = -1;
  }

  show(i) {
    tip.hidden = i < 0;
    if (i < 0) return;
    const { row } = this, has = (name) => row[name] && row[name][i] !== null && row[name][i] !== undefined;
    const lines = [];
    if (row.length === undefined) {
      lines.push("tokens not logged: no numbers here");
    } else {
      const number = i + 1 + (row.gap && i >= row.gap[0] ? row.gap[1] : 0), weight = has("w") ? row.w[i] / 1000 : 1;
      lines.push(`token ${number}: ${JSON.stringify(visible(current.vocabulary[row.t[i]]))}`);
      if (has("p")) lines.push(`probability ${Math.exp(-row.p[i] / 100).toPrecision(3)}`);
      if (has("d") && has("p")) lines.push(`sampler's probability ${Math.exp(-(row.p[i] + row.d[i]) / 100).toPrecision(3)}`);
      if (has("e")) lines.push(`entropy ${(row.e[i] / 1000).toFixed(3)} nats`);
      const advantage = has("a") ? row.a[i] / 1000 : row.advantage;
      if (row.kept === false) lines.push("not trained on");
      else lines.push(`weight ${weight}` + (advantage === null ? "" : `, advantage ${(advantage * weight).toFixed(3)}`));
    }
    tip.textContent = lines.join("\n");
    const box = this.spans[i].getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(box.left, innerWidth - own.width - 4)) + "px";
    tip.style.top = Math.max(4, box.bottom + own.height + 6 < innerHeight ? box.bottom + 4 : box.top - own.height - 4) + "px";
  }
}

function describeColour() {
  const mode = colourMode(), rows = cards.map((shown) => shown.row);
  const name = mode === "w" && !rows.some((row) => row.w) && rows.some((row) => row.a) ? "a" : mode;
  const { text, gradient } = COLOURS[name], bar = element("b");
  const none = !rows.length ? "" : mode === "w" && rows.some((row) => row.length !== undefined) ? "no token of these is shaped" : `no ${COLOURS[mode].name} were logged`;
  bar.style.background = `linear-gradient(to right, ${gradient})`;
  byId("sample-scale").replaceChildren(...(rows.some((row) => row[name]) ? [bar, element("span", "", text)] : [element("span", "", none)]));
}

function paint() {
  cards.forEach((shown) => shown.paint(colourMode()));
  describeColour();
}

runSelect.addEventListener("change", chooseRun);
stepSelect.addEventListener("change", chooseStep);
problemSelect.addEventListener("change", showGroup);
document.querySelectorAll('input[name="colour"]').forEach((radio) => radio.addEventListener("change", paint));
[statusFilter, strategyFilter, keptFilter, shapedFilter].forEach((filter) => filter.addEventListener("change", applyFilters));
let typing = 0;
find.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(applyFilters, 150); });
byId("filters").addEventListener("reset", () => setTimeout(applyFilters)); // once the fields are empty
document.querySelectorAll("form.controls, #filters").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
