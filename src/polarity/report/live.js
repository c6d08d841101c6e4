"use strict";
// A live page: asks its server whether the runs have gone on, and loads itself again at the reader's place.

const EVERY = 2000, QUIET = 1500; // milliseconds: between questions; without a key or a pointer before it reloads
const button = byId("live");
let known = button.dataset.revision || null, touched = 0, since = new Date();

const foldName = (node) => node.closest("section").id + "/" + node.querySelector("summary").textContent;
const folds = () => [...document.querySelectorAll("section details")];
const chosen = (select) => select.selectedOptions[0]?.dataset.label ?? select.selectedOptions[0]?.textContent;

function remember() {
  sessionStorage.setItem("place", JSON.stringify({
    scroll: scrollY, theme: document.documentElement.dataset.theme, hidden: [...hiddenMethods], following: following(),
    open: folds().filter((node) => node.open).map(foldName), split: byId("flow-split")?.value, focus: document.activeElement?.id,
    run: chosen(runSelect), step: chosen(stepSelect), problem: chosen(problemSelect), colour: colourMode(), find: find.value,
    status: statusFilter.value, strategy: strategyFilter.value, kept: keptFilter.checked, shaped: shapedFilter.checked,
  }));
}

function choose(select, label) {
  const option = [...select.options].find((o) => (o.dataset.label ?? o.textContent) === label);
  if (option) select.value = option.value;
  return Boolean(option);
}

async function restore() {
  await started;
  const place = JSON.parse(sessionStorage.getItem("place") ?? "null");
  if (!place) return;
  setTheme(place.theme);
  place.hidden.forEach((label) => toggleMethod(label, false));
  folds().forEach((node) => { node.open = place.open.includes(foldName(node)); });
  if (place.split && choose(byId("flow-split"), place.split)) byId("flow-split").dispatchEvent(new Event("change"));
  if (choose(runSelect, place.run)) await chooseRun();
  document.querySelector(`input[name="colour"][value="${place.colour}"]`).checked = true;
  find.value = place.find;
  keptFilter.checked = place.kept;
  shapedFilter.checked = place.shaped;
  choose(stepSelect, place.step);
  fillFilters();
  statusFilter.value = place.status;
  strategyFilter.value = place.strategy;
  chooseStep();
  if (choose(problemSelect, place.problem)) showGroup();
  if (!place.following) button.setAttribute("aria-pressed", "false");
  if (place.focus) byId(place.focus)?.focus({ preventScroll: true });
  scrollTo(0, place.scroll);
}

const following = () => button.getAttribute("aria-pressed") === "true";

function say(text) {
  button.textContent = text;
}

async function ask() {
  let now = null;
  try {
    const answer = await fetch("/revision", { cache: "no-store" });
    if (answer.ok) now = await answer.text();
  } catch {
    // the server has ended: the page stays as it is, and says so below
  }
  known ??= now;
  const idle = Date.now() - touched > QUIET && !byId("help").open && !document.getSelection().toString();
  if (now === null) say(`server gone, as of ${since.toLocaleTimeString()}`);
  else if (now === known) say(`live, as of ${since.toLocaleTimeString()}`);
  else if (!following()) say("held; there is more");
  else if (idle && !document.hidden) {
    remember();
    location.reload();
    return;
  }
  setTimeout(ask, EVERY);
}

for (const event of ["keydown", "pointerdown", "wheel", "touchmove"]) {
  addEventListener(event, () => { touched = Date.now(); }, { passive: true });
}
button.addEventListener("click", () => button.setAttribute("aria-pressed", String(!following())));
history.scrollRestoration = "manual";
restore().finally(ask);
