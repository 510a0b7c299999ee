"use strict";
const { page, pairs, references } = JSON.parse(document.getElementById("data").textContent);
const element = id => document.getElementById(id);
const store = `blind-${page}`;
const kinds = ["left", "right", "none"];
let choices = {};
let number = 0;

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(store));
    for (const [key, value] of Object.entries(kept || {}))
      if (key in pairs && kinds.includes(value)) choices[key] = value;
  } catch (error) {} // nothing was kept, or this browser keeps nothing
  number = pairs.findIndex((_, i) => !(i in choices));
  if (number < 0) number = pairs.length;
}

function keep() {
  try { localStorage.setItem(store, JSON.stringify(choices)); } catch (error) {}
}

function put(image, source) {
  image.onload = () => image.classList.toggle("small", image.naturalWidth <= 128);
  if (source) image.src = source;
  image.hidden = !source;
}

function show() {
  const pair = pairs[number];
  const answered = Object.keys(choices).length;
  element("progress").textContent = pair
    ? `Pair ${number + 1} of ${pairs.length}, ${answered} answered`
    : `${answered} of ${pairs.length} answered`;
  element("pair").hidden = !pair;
  element("done").hidden = Boolean(pair);
  element("save").disabled = !answered;
  if (!pair) return;
  put(element("reference"), references[pair.reference]);
  element("prompt").textContent = pair.prompt;
  for (const kind of kinds) element(kind).setAttribute("aria-pressed", choices[number] === kind);
  put(element("left").querySelector("img"), pair.left);
  put(element("right").querySelector("img"), pair.right);
  element("back").disabled = !number;
  element("next").disabled = !(number in choices);
}

function go(to) {
  number = Math.min(Math.max(to, 0), pairs.length);
  show();
}

function choose(kind) {
  if (number >= pairs.length) return;
  choices[number] = kind;
  keep();
  go(number + 1);
}

function save() {
  const text = JSON.stringify({ format: 1, page, choices }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `answers-${page}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const kind of kinds) element(kind).addEventListener("click", () => choose(kind));
element("back").addEventListener("click", () => go(number - 1));
element("next").addEventListener("click", () => go(number + 1));
element("save").addEventListener("click", save);
element("clear").addEventListener("click", () => {
  if (!confirm("Delete your choices on this page?")) return;
  choices = {};
  keep();
  go(0);
});
addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const actions = {
    ArrowLeft: () => choose("left"),
    ArrowRight: () => choose("right"),
    ArrowDown: () => choose("none"),
    ArrowUp: () => go(number - 1),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
load();
show();
