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
