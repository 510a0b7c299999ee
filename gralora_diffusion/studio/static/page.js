// What the page does by itself: captions are saved when they are left, problems are shown beside
// their fields, and the form shows the options that are searched for.
"use strict";

const studio = {
  setExtent(extent) {
    document.body.classList.toggle("all-options", extent === "all");
    studio.filter();
  },

  filter() {
    const search = document.getElementById("train-search");
    const words = (search ? search.value : "").toLowerCase().split(/\s+/).filter(Boolean);
    document.body.classList.toggle("searching", words.length > 0);
    for (const group of document.querySelectorAll(".group")) {
      let any = false;
      for (const field of group.querySelectorAll(".opt")) {
        const text = field.textContent.toLowerCase();
        const found = words.length > 0 && words.every((word) => text.includes(word));
        field.classList.toggle("found", found);
        any = any || found;
      }
      group.classList.toggle("found", any);
    }
  },

  showProblems() {
    for (const old of document.querySelectorAll(".opt .problem-here")) old.remove();
    for (const field of document.querySelectorAll(".opt.has-problem"))
      field.classList.remove("has-problem");
    for (const item of document.querySelectorAll("#train-problems li[data-option]")) {
      const field = document.getElementById("opt-" + item.dataset.option);
      if (!field) continue;
      const text = document.createElement("p");
      text.className = "problem-here";
      text.textContent = item.textContent;
      field.append(text);
      field.classList.add("has-problem");
    }
  },

  async saveCaption(area) {
    const output = area.closest(".card").querySelector("output");
    const sent = area.value;
    output.textContent = "saving";
    output.className = "";
    try {
      const answer = await fetch("/studio/caption/" + area.dataset.caption, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ caption: sent }),
      });
      const text = await answer.text();
      const isNewer = area.value !== sent; // typed meanwhile: it is saved when it is left
      output.textContent = !answer.ok ? text : isNewer ? "" : "saved";
      output.className = answer.ok ? "" : "failed";
      if (answer.ok && !isNewer) area.value = text;
    } catch (error) {
      output.textContent = "not saved: the studio does not answer";
      output.className = "failed";
    }
  },
};

// An image in its own size, over the page: Escape closes it, the arrows lead to its neighbors.
const viewer = {
  open(link) {
    if (!viewer.dialog) viewer.make();
    const image = link.querySelector("img");
    viewer.link = link;
    viewer.picture.src = link.href;
    viewer.picture.alt = image.alt;
    viewer.text.textContent = [image.alt, image.title].filter(Boolean).join(" · ");
    viewer.save.hidden = viewer.keep.hidden = !link.dataset.save;
    viewer.save.href = link.dataset.save || "";
    viewer.said.textContent = "";
    if (!viewer.dialog.open) viewer.dialog.showModal();
  },

  make() {
    const make = (kind, text, parent) => {
      const made = document.createElement(kind);
      made.textContent = text;
      if (parent) parent.append(made);
      return made;
    };
    viewer.dialog = make("dialog", "");
    viewer.dialog.id = "viewer";
    viewer.picture = make("img", "", viewer.dialog);
    viewer.text = make("p", "", viewer.dialog);
    const bar = make("div", "", viewer.dialog);
    viewer.keep = make("button", "Keep", bar);
    viewer.save = make("a", "Save", bar);
    viewer.save.download = "";
    const close = make("button", "Close", bar);
    viewer.said = make("output", "", bar);
    viewer.keep.addEventListener("click", viewer.keepIt);
    close.addEventListener("click", () => viewer.dialog.close());
    viewer.dialog.addEventListener("click", (event) => {
      if (event.target === viewer.dialog) viewer.dialog.close();
    });
    viewer.dialog.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const all = [...document.querySelectorAll("a.picture")].filter((a) => a.offsetParent);
      const next = all[all.findIndex((a) => a.href === viewer.link.href) + step];
      if (next) viewer.open(next);
    });
    document.body.append(viewer.dialog);
  },

  async keepIt() {
    const id = viewer.save.pathname.split("/").pop();
    try {
      const answer = await fetch("/studio/keep/" + id, { method: "POST" });
      const text = await answer.text();
      viewer.said.textContent = answer.ok ? "kept as " + text : text;
    } catch (error) {
      viewer.said.textContent = "not kept: the studio does not answer";
    }
  },
};

document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest("a.picture");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  viewer.open(link);
});
document.addEventListener("change", (event) => {
  if (event.target.matches && event.target.matches("textarea[data-caption]"))
    studio.saveCaption(event.target);
});
document.addEventListener("input", (event) => {
  if (event.target.id === "train-search") studio.filter();
});
// Gradio makes the parts of a tab when it is opened, and replaces the list of problems
new MutationObserver((changes) => {
  const about = (node) =>
    node.nodeType === 1 &&
    (node.id === "train-problems" || node.closest("#train-problems") ||
      node.querySelector("#train-problems, .opt"));
  if (changes.some((c) => [c.target, ...c.addedNodes].some((n) => about(n) && !isOwn(n))))
    studio.showProblems();

  function isOwn(node) {
    return node.classList && (node.classList.contains("problem-here") ||
      node.classList.contains("opt"));
  }
}).observe(document.documentElement, { childList: true, subtree: true });
window.studio = studio;
