// What the page does by itself: captions are saved when they are left, problems are shown beside
// their fields, and the form shows the options that are searched for.
"use strict";

// Gradio 6.31 goes on asking for frames when its sign of loading has left the page. Frames that have
// followed one another for five seconds are no movement that anyone watches: then four a second do.
{
  const [ask, cancel] = [window.requestAnimationFrame, window.cancelAnimationFrame];
  let length = 0; // of the chain that the present frame is in
  window.requestAnimationFrame = (call) => {
    const mine = length + 1;
    const run = (time) => {
      length = mine;
      try {
        call(time);
      } finally {
        length = 0;
      }
    };
    return mine > 300 ? -setTimeout(() => run(performance.now()), 250) : ask.call(window, run);
  };
  window.cancelAnimationFrame = (id) => id < 0 ? clearTimeout(-id) : cancel.call(window, id);
}

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

  // The first problem may be far above the button
  toProblem() {
    const field = document.querySelector(".opt.has-problem");
    if (field) field.scrollIntoView({ block: "center" });
  },

  typed: new Map(), // id of an image -> its caption, from typing until it is saved
  inside: null, // where the cursor is, if it is in a caption

  // The cards may be made anew while somebody types: what was typed is put back, or saved
  keepTyped() {
    for (const [id, area] of [...studio.typed]) {
      if (area.isConnected) continue;
      const there = document.querySelector(`textarea[data-caption="${id}"]`);
      if (!there) {
        studio.typed.delete(id);
        studio.saveCaption(area);
        continue;
      }
      studio.typed.set(id, there);
      there.value = area.value;
      if (studio.inside === id && document.activeElement === document.body) {
        there.focus();
        there.setSelectionRange(area.selectionStart, area.selectionEnd);
      } else {
        studio.saveCaption(there);
      }
    }
  },

  async watch() {
    const say = (text) => {
      const there = document.getElementById("absent");
      if (!text) return there && there.remove();
      const made = there || document.createElement("p");
      made.id = "absent";
      made.setAttribute("role", "alert");
      if (made.textContent !== text) made.textContent = text;
      if (!there) document.body.prepend(made);
    };
    try {
      const answer = await fetch("/studio/alive");
      say(answer.status === 401 ? "The studio was started again. Use the page that it has opened, " +
        "or the address that it has printed: this page belongs to the earlier start." : "");
    } catch (error) {
      say("The studio does not answer. Runs continue without it. Start it again: it finds them, " +
        "and what waits in the queue.");
    }
    setTimeout(studio.watch, 5000);
  },

  async saveCaption(area) {
    const id = area.dataset.caption, sent = area.value;
    const now = () => document.querySelector(`textarea[data-caption="${id}"]`) || area;
    const say = (text, kind) => {
      const output = now().closest(".card").querySelector("output");
      output.textContent = text;
      output.className = kind;
    };
    say("saving", "");
    try {
      const answer = await fetch("/studio/caption/" + id, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ caption: sent }),
      });
      const text = await answer.text();
      const typed = studio.typed.get(id);
      const isNewer = typed && typed.value !== sent; // typed meanwhile: it is saved when it is left
      say(!answer.ok ? text : isNewer ? "" : "saved", answer.ok ? "" : "failed");
      if (answer.ok && !isNewer) {
        studio.typed.delete(id);
        now().value = text;
      }
    } catch (error) {
      say("not saved: the studio does not answer", "failed");
    }
  },
};

// What changes while one watches. The tab that is open says what to ask for; only parts that have
// changed are replaced. If its choices have changed, Gradio is told to make them anew.
const live = {
  asking: false,

  async look() {
    if (live.asking || document.hidden) return;
    const place = [...document.querySelectorAll("[data-live]")].find((p) => p.checkVisibility());
    if (!place) return;
    live.asking = true;
    const address = place.dataset.live;
    try {
      const known = place.address === address && place.etag;
      const answer = await fetch(address, known ? { headers: { "If-None-Match": known } } : {});
      if (answer.ok) {
        Object.assign(place, { address, etag: answer.headers.get("ETag"), seen: await answer.json() });
      }
      if (place.isConnected && place.address === address && place.dataset.live === address)
        live.show(place);
    } catch (error) {
      // the studio does not answer: ``watch`` says so
    } finally {
      live.asking = false;
    }
    if (place.dataset.live !== address || !place.isConnected) live.look();
  },

  show(place) {
    for (const [name, html] of Object.entries(place.seen.parts)) {
      const node = document.getElementById("live-" + name);
      if (!node || node.shown === html) continue;
      node.innerHTML = html;
      node.shown = html;
    }
    if (place.dataset.choices === place.seen.choices) return;
    const button = document.getElementById(place.dataset.refresh);
    if (button) button.click();
  },

  start() {
    setInterval(live.look, 2000);
    document.addEventListener("visibilitychange", live.look);
    // what a click has changed is seen sooner
    document.addEventListener("click", (event) => {
      if (event.isTrusted) setTimeout(live.look, 400);
    });
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
    for (const [text, step] of [["Previous", -1], ["Next", 1]])
      make("button", text, bar).addEventListener("click", () => viewer.move(step));
    const close = make("button", "Close", bar);
    viewer.said = make("output", "", bar);
    viewer.keep.addEventListener("click", viewer.keepIt);
    close.addEventListener("click", () => viewer.dialog.close());
    viewer.dialog.addEventListener("click", (event) => {
      if (event.target === viewer.dialog) viewer.dialog.close();
    });
    viewer.dialog.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) viewer.move(step);
    });
    // the page may have made the image anew: the cursor goes back to the one with its address
    viewer.dialog.addEventListener("close", () => {
      viewer.left = viewer.link.href;
      document.activeElement.blur();
      viewer.focusBack();
    });
    document.body.append(viewer.dialog);
  },

  left: null, // address of the image whose viewer was closed, until something else has the focus

  // The images may be made anew, which takes their focus away
  focusBack() {
    if (!viewer.left || document.activeElement !== document.body) return;
    const link = viewer.shown().find((a) => a.href === viewer.left);
    if (link) link.focus();
  },

  shown() {
    return [...document.querySelectorAll("a.picture")].filter((a) => a.offsetParent);
  },

  move(step) {
    const all = viewer.shown();
    const next = all[all.findIndex((a) => a.href === viewer.link.href) + step];
    if (next) viewer.open(next);
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
  const area = event.target;
  if (area.id === "train-search") studio.filter();
  if (area.dataset && area.dataset.caption) studio.typed.set(area.dataset.caption, area);
});
document.addEventListener("focusin", (event) => {
  studio.inside = (event.target.dataset && event.target.dataset.caption) || null;
  if (event.target.href !== viewer.left) viewer.left = null;
});
// Gradio makes the parts of a tab when it is opened, and replaces the list of problems
new MutationObserver((changes) => {
  const about = (node) =>
    node.nodeType === 1 &&
    (node.id === "train-problems" || node.closest("#train-problems") ||
      node.querySelector("#train-problems, .opt"));
  if (changes.some((c) => [c.target, ...c.addedNodes].some((n) => about(n) && !isOwn(n))))
    studio.showProblems();
  if (studio.typed.size) studio.keepTyped();
  if (changes.some((c) => [...c.addedNodes].some((n) => n.nodeType === 1 &&
    (n.matches("[data-live]") || n.querySelector("[data-live]"))))) live.look();
  viewer.focusBack();

  function isOwn(node) {
    return node.classList && (node.classList.contains("problem-here") ||
      node.classList.contains("opt"));
  }
}).observe(document.documentElement, { childList: true, subtree: true });
window.studio = studio;
studio.watch();
live.start();
