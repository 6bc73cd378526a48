// What the pages of `dedpo vote` show alike: images and prompts, screens and panels, keys, and who sits at this screen.

import { figures } from "./figures.js";
import { $, list, reach } from "./link.js";

const TINY = 128; // images smaller than this keep hard pixels when enlarged

// ---- images and prompts

/** The images of items, fetched and decoded once. `urls` are those of an item. */
export function pictures(urls) {
  const loading = new Map(); // ticket -> promise of its decoded images

  function load(item) {
    if (!loading.has(item.ticket)) loading.set(item.ticket, Promise.all(urls(item).map(picture)));
    return loading.get(item.ticket);
  }

  /** An image does not say why it failed: ask for the files, which waits for a lost connection, and decode once more. */
  async function loadAgain(item) {
    for (const url of urls(item)) await reach(url, {}, (response) => response.blob());
    loading.delete(item.ticket);
    return load(item);
  }

  function forgetAllBut(...items) {
    const kept = new Set(items.map((item) => item?.ticket));
    for (const ticket of loading.keys()) if (!kept.has(ticket)) loading.delete(ticket);
  }

  return { load, loadAgain, forgetAllBut };
}

async function picture(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  image.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) < TINY);
  return image;
}

export function showPrompt(text) {
  const prompt = $("prompt");
  prompt.textContent = text;
  prompt.scrollTop = 0;
  const long = prompt.scrollHeight > prompt.clientHeight + 1;
  prompt.classList.toggle("long", long);
  prompt.tabIndex = long ? 0 : -1; // so that keys can scroll it
}

/** Waits until what is in the page has been on the screen; in a hidden tab, until it is looked at. */
export function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}

export function showProgress(progress, given) {
  const done = progress.answered + progress.skipped;
  $("bar").max = Math.max(progress.total, 1);
  $("bar").value = done;
  $("count").textContent = `${done} of ${progress.total}`;
  $("everyone").textContent = `${given} by anyone: ${progress.labelled} of ${progress.pairs}`;
}

// ---- what is noted while people look

export function mark(text) {
  $("saved").textContent = text; // emptied before each answer, so that the same words twice are said twice
  if (text && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
    $("saved").animate([{ opacity: 1 }, { opacity: 1, offset: 0.7 }, { opacity: 0 }], { duration: 2500, fill: "forwards" });
  }
}

export const panelOpen = () => document.querySelector("dialog.panel[open]") !== null;

/** Seconds that a pair or a ranking was looked at: hidden tabs and open panels do not count. */
export const watch = {
  spent: 0,
  since: null,
  started: false,
  seconds() {
    return (this.spent + (this.since === null ? 0 : performance.now() - this.since)) / 1000;
  },
  reset() {
    Object.assign(this, { spent: 0, since: null, started: false });
  },
  start() {
    this.started = true;
    this.look();
  },
  look() {
    this.spent = 1000 * this.seconds();
    this.since = this.started && !document.hidden && !panelOpen() ? performance.now() : null;
  },
};

// ---- screens and panels

export function screen(name) {
  if (!$(name).hidden) return;
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  $(name).focus(); // the focused button may be gone with its screen
}

export function openDialog(dialog) {
  dialog.showModal();
  watch.look();
}

export function closeDialogs() {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
}

/** `closed` is told each dialog that closes. */
export function watchDialogs(closed = () => {}) {
  document.addEventListener("visibilitychange", () => watch.look());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("close", () => {
      if (dialog.contains($("banner"))) document.body.prepend($("banner"));
      closed(dialog);
      watch.look();
    });
  }
}

export function showSummary(found) {
  const sentences = document.createElement("ul");
  list(sentences, found.sentences);
  $("figures").replaceChildren(sentences, ...figures(found));
  openDialog($("summary"));
}

// ---- keys

/** What a key asks for by `keys`, if anything, and whether that can be done on this screen; null for keys of the browser's own. */
export function asked(event, keys) {
  const { key } = event;
  const undoes = (event.ctrlKey || event.metaKey) && key === "z";
  if (event.altKey || ((event.ctrlKey || event.metaKey) && !undoes)) return null;
  const place = key > "~" ? event.code.replace("Key", "") : key; // alphabets without these letters: where they stand
  const what = undoes ? "undo" : keys[place.toLowerCase()];
  return { what, here: !$("vote").hidden || (what === "undo" && !$("end").hidden) };
}

// ---- who sits here: a reload is the same person; a new tab may be another one, and is asked

/** Keep a value in this tab, or read it where none is given; "" removes it. A browser may forbid the storage. */
export function kept(key, value) {
  try {
    if (value === undefined) return sessionStorage.getItem(key) ?? "";
    if (value === "") sessionStorage.removeItem(key);
    else sessionStorage.setItem(key, value);
  } catch {}
  return "";
}

export function remember(rater) {
  kept("rater", rater);
  try {
    localStorage.setItem("rater", rater);
  } catch {} // it is asked for again
}

export function forget() {
  kept("rater", "");
  history.replaceState(null, "", "/"); // a name in the address would vote again after a reload
}

function lastName() {
  try {
    return localStorage.getItem("rater") ?? "";
  } catch {
    return "";
  }
}

export function nameDataset(session) {
  document.title = `${session.dataset} · dedpo vote`;
  $("dataset").textContent = session.dataset;
  $("raters").replaceChildren(...session.raters.map((name) => new Option("", name)));
}

export function nameWho(rater) {
  $("who").textContent = `${$("dataset").textContent} · ${rater}`;
}

/** Ask for the name, or `start` with the one that is known. */
export async function begin({ introduce, explain, start }) {
  $("enter").addEventListener("submit", (event) => {
    event.preventDefault();
    start($("name").value);
  });
  const given = new URLSearchParams(location.search).get("rater");
  $("name").value = given ?? lastName();
  $("name").select();
  await reach("/api/session").then(introduce).catch(explain);
  const known = given?.trim() ? given : kept("rater");
  if (known) start(known);
}
