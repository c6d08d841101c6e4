"use strict";
// Keys, theme, the place in the page; last of the scripts: it starts the others.

function step(select, by) {
  const to = select.selectedIndex + by;
  if (to < 0 || to >= select.options.length) return;
  select.selectedIndex = to;
  select.dispatchEvent(new Event("change"));
}

const otherTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

const KEYS = {
  "t": otherTheme,
  "?": () => byId("help").showModal(),
  "[": () => step(stepSelect, -1),
  "]": () => step(stepSelect, 1),
  "k": () => step(problemSelect, -1),
  "j": () => step(problemSelect, 1),
  "/": () => { find.focus(); find.scrollIntoView({ block: "center" }); },
  "c": () => {
    const radios = [...document.querySelectorAll('input[name="colour"]')];
    radios[(radios.findIndex((radio) => radio.checked) + 1) % radios.length].checked = true;
    paint();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !current || byId("help").open) return;
  const { tagName, type } = event.target;
  if (tagName === "INPUT" && type === "search") {
    if (event.key === "Escape") {
      find.value = "";
      applyFilters();
    }
    if (event.key === "Escape" || event.key === "Enter") find.blur();
    return;
  }
  if (tagName === "SELECT") return; // letters choose an option
  const method = /^[1-9]$/.test(event.key) && document.querySelectorAll(".method")[event.key - 1];
  if (method) toggleMethod(method.dataset.method);
  else if (Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

byId("theme").addEventListener("click", otherTheme);
byId("keys").addEventListener("click", KEYS["?"]);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));

// What sticks below the header needs its height; the link to the section being read is marked.
const header = document.querySelector("header");
new ResizeObserver(() => document.documentElement.style.setProperty("--header", `${header.offsetHeight}px`)).observe(header);
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const inSight = new Set();
const reading = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) inSight[isIntersecting ? "add" : "delete"](target.id);
  const first = [...links.keys()].find((id) => inSight.has(id));
  for (const [id, link] of links) link.toggleAttribute("aria-current", id === first);
}, { rootMargin: "-15% 0px -60% 0px" });
for (const id of links.keys()) reading.observe(byId(id));

const started = Promise.all([startFigures(), chooseRun()]);
