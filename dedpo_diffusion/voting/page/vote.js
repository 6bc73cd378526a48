// The page of `dedpo vote`: shows one pair at a time and sends what the person prefers.
// Texts from the server are not trusted (prompts come from anywhere): they are only ever set as textContent.

import { figures } from "./figures.js";
import { $, hideBanner, list, mark, panelOpen, post, reach, Refused, showBanner, watch } from "./link.js";

const SETTLE_MS = 250; // an answer sooner than this after a pair appears was meant for the pair before it
const TINY = 128; // images smaller than this keep hard pixels when enlarged
const KEYS = {
  arrowleft: "left", a: "left", 1: "left", arrowright: "right", d: "right", 2: "right", arrowdown: "tie", t: "tie", " ": "tie",
  s: "skip", u: "undo", backspace: "undo", z: "zoom", "?": "keys",
};

const LABELS = { one: "a label", many: "labels", give: "label", given: "labelled" };
const ANSWERS = { one: "an answer", many: "answers", give: "answer", given: "answered" };

const stacked = matchMedia("(max-aspect-ratio: 7/10)"); // the same as in vote.css

let rater = "";
let words = LABELS; // what this voting makes
let state = null; // the server's latest word: progress, item, following, can_undo
let ready = false; // both images of state.item are on the screen: only then an answer counts
let broken = false; // its images cannot be shown: it can be skipped
let busy = false; // a request is on its way

/** One request of the person's at a time; what the server refuses is said. */
async function act(work) {
  if (busy) return;
  busy = true;
  document.body.toggleAttribute("data-busy", true);
  try {
    await work();
  } catch (error) {
    await explain(error);
  } finally {
    busy = false;
    document.body.removeAttribute("data-busy");
  }
}

async function explain(error) {
  let text = error.message;
  if (rater && (error.status === 404 || error.status === 409)) {
    try {
      take(await reach(nextPath()));
      text = `That was not saved: ${text}. Here is where you are now.`;
    } catch (again) {
      text = again.message;
    }
  }
  showBanner(text, "Close", hideBanner);
  if (!(error instanceof Refused)) throw error; // a mistake of this page belongs on the console
}

const nextPath = () => `/api/next?rater=${encodeURIComponent(rater)}`;

const refresh = () => act(async () => take(await reach(nextPath())));

// ---- one pair

/** Take over the server's state: `said` is what was just done. */
function take(next, said = "") {
  state = next;
  ready = broken = false;
  watch.reset();
  closeDialogs();
  $("images").replaceChildren(); // the last pair is never under the new prompt
  delete $("images").dataset.ready;
  const { progress } = state;
  const done = progress.answered + progress.skipped;
  $("bar").max = Math.max(progress.total, 1);
  $("bar").value = done;
  $("count").textContent = `${done} of ${progress.total}`;
  $("everyone").textContent = `${words.given} by anyone: ${progress.labelled} of ${progress.pairs}`;
  mark(said);
  for (const button of document.querySelectorAll("[data-do=undo]")) button.setAttribute("aria-disabled", !state.can_undo);
  if (state.item) showPair(state);
  else showEnd(progress);
}

async function showPair(shown) {
  const { item, following } = shown;
  screen("vote");
  showPrompt(item.prompt);
  forgetAllBut(item, following);
  let images;
  try {
    images = await load(item).catch(() => loadAgain(item));
  } catch (error) {
    if (state !== shown) return;
    broken = error.status !== 401;
    const why = error instanceof Refused ? error.message : "this browser cannot read it";
    return showBanner(broken ? `An image cannot be shown: ${why}. Skip the pair, or try again.` : why, "Try again", refresh);
  }
  if (state !== shown) return;
  $("images").replaceChildren(...images);
  nameSides();
  if (following) load(following).catch(() => {}); // shown at once when its turn comes
  await painted();
  if (state !== shown) return;
  watch.start();
  setTimeout(() => {
    if (state !== shown) return;
    ready = true;
    $("images").dataset.ready = item.ticket;
  }, SETTLE_MS);
}

function showPrompt(text) {
  const prompt = $("prompt");
  prompt.textContent = text;
  prompt.scrollTop = 0;
  const long = prompt.scrollHeight > prompt.clientHeight + 1;
  prompt.classList.toggle("long", long);
  prompt.tabIndex = long ? 0 : -1; // so that keys can scroll it
}

const loading = new Map(); // ticket -> promise of its two decoded images

function load(item) {
  if (!loading.has(item.ticket)) loading.set(item.ticket, Promise.all([picture(item.left), picture(item.right)]));
  return loading.get(item.ticket);
}

/** An image does not say why it failed: ask for the files, which waits for a lost connection, and decode once more. */
async function loadAgain(item) {
  for (const url of [item.left, item.right]) await reach(url, {}, (response) => response.blob());
  loading.delete(item.ticket);
  return load(item);
}

function forgetAllBut(...items) {
  const kept = new Set(items.map((item) => item?.ticket));
  for (const ticket of loading.keys()) if (!kept.has(ticket)) loading.delete(ticket);
}

async function picture(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  image.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) < TINY);
  return image;
}

/** Waits until what is in the page has been on the screen; in a hidden tab, until it is looked at. */
function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}

/** Stacked images have no left and right: the page then says top and bottom. */
const word = (answer) => (stacked.matches ? { left: "top", right: "bottom" }[answer] : undefined) ?? answer;

function nameSides() {
  for (const element of document.querySelectorAll("[data-side]")) {
    const name = word(element.dataset.side);
    element.textContent = name[0].toUpperCase() + name.slice(1);
  }
  for (const [k, image] of [...$("images").children].entries()) image.alt = `${word(["left", "right"][k])} image`;
}

function answer(what) {
  if (!(ready || (broken && what === "skip"))) return;
  act(async () => {
    const vote = { rater, ticket: state.item.ticket, answer: what, seconds: watch.seconds() };
    mark("");
    const before = state.progress.total;
    const next = await post("/api/vote", vote);
    const fewer = next.progress.total < before ? "; others answered some of your pairs, so fewer are left for you" : "";
    take(next, `saved: ${word(what)}${fewer}`);
  });
}

function undo() {
  if (!state?.can_undo) return;
  act(async () => {
    const next = await post("/api/undo", { rater });
    take(next, next.undone ? "undone" : "nothing to undo");
  });
}

// ---- screens and panels

function screen(name) {
  if (!$(name).hidden) return;
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  $(name).focus(); // the focused button may be gone with its screen
}

function showEnd({ answered, skipped, total, labelled, pairs }) {
  screen("end");
  list($("written"), []);
  const held = total - answered - skipped; // pairs on other people's screens, which may come back
  $("nothing-left").textContent = held ? "Nothing left right now" : `Nothing left to ${words.give}`;
  $("thanks").textContent = `Thank you, ${rater}.`;
  $("again").hidden = !held;
  list($("counts"), [
    `You answered ${answered} and skipped ${skipped}.`,
    `${labelled} of ${pairs} pairs have ${words.one}.`,
    ...(held ? [`Other people are looking at the last ones (${held}).`] : []),
  ]);
}

function openDialog(dialog) {
  dialog.showModal();
  watch.look();
}

function closeDialogs() {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
}

function zoom() {
  if ($("zoom").open) return closeDialogs();
  if ($("images").children.length === 0) return;
  $("zoom").append($("images")); // the same images: nothing to load
  openDialog($("zoom"));
}

function save() {
  act(async () => {
    const written = await post("/api/export", {});
    const what = written.path ? `${written.labels} labels in ${written.path}` : `the answers on ${written.labels} pairs`;
    list($("written"), [`Saved ${what}.`, ...written.sentences]);
  });
}

function summary() {
  act(async () => {
    const found = await reach("/api/summary");
    const sentences = document.createElement("ul");
    list(sentences, found.sentences);
    $("figures").replaceChildren(sentences, ...figures(found));
    openDialog($("summary"));
  });
}

// ---- the start, and what the person does

const ACTIONS = { summary, save, undo, zoom, refresh, leave, keys: () => openDialog($("keys")), close: closeDialogs };
for (const what of ["left", "tie", "right", "skip"]) ACTIONS[what] = () => answer(what);

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-do]");
  if (button) ACTIONS[button.dataset.do]();
  else if (target.closest("#images, #zoom")) zoom(); // never a vote: a tap is too easily made by accident
});

// A click leaves the focus where it was, so that the space bar still means a tie.
document.addEventListener("mousedown", (event) => {
  if (event.target.closest("[data-do]")) event.preventDefault();
});

document.addEventListener("keydown", (event) => {
  const { key } = event;
  const focused = event.target.closest("button, input, #prompt");
  if (panelOpen() || focused?.matches("input")) return;
  if (focused && (key === " " || (key === "ArrowDown" && focused.id === "prompt"))) return; // presses the button, scrolls the prompt
  const undoes = (event.ctrlKey || event.metaKey) && key === "z";
  if (event.altKey || ((event.ctrlKey || event.metaKey) && !undoes)) return; // the browser's own
  const place = key > "~" ? event.code.replace("Key", "") : key; // alphabets without these letters: where they stand
  const what = undoes ? "undo" : KEYS[place.toLowerCase()];
  const here = !$("vote").hidden || (what === "undo" && !$("end").hidden);
  if ((what && here) || (event.repeat && key === "Enter")) event.preventDefault();
  if (what && here && !event.repeat) ACTIONS[what](); // a key held down is one answer
});

document.addEventListener("visibilitychange", () => watch.look());
stacked.addEventListener("change", nameSides);
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("close", () => {
    if (dialog.contains($("banner"))) document.body.prepend($("banner"));
    if (dialog.contains($("images"))) $("prompt").after($("images"));
    watch.look();
  });
}

function start(name) {
  act(async () => {
    rater = name.trim();
    nameWho();
    take(await reach(nextPath()));
    remember(rater);
  });
}

/** Somebody else takes over this screen: the name is asked for again. */
function leave() {
  act(async () => {
    closeDialogs();
    forget();
    rater = "";
    introduce(await reach("/api/session"));
    screen("start");
    $("name").value = "";
    $("name").focus();
  });
}

function nameWho() {
  $("who").textContent = `${$("dataset").textContent} · ${rater}`;
}

/** The name last used here; a browser may forbid the storage. */
function remember(name) {
  try {
    if (name) {
      localStorage.setItem("rater", name);
      sessionStorage.setItem("rater", name);
    }
    return localStorage.getItem("rater") ?? "";
  } catch {
    return "";
  }
}

/** Who votes in this tab. A reload is the same person; a new tab may be another one, and is asked. */
function inThisTab() {
  try {
    return sessionStorage.getItem("rater") ?? "";
  } catch {
    return "";
  }
}

function forget() {
  try {
    sessionStorage.removeItem("rater");
  } catch {} // nothing was kept either
  history.replaceState(null, "", "/"); // a name in the address would vote again after a reload
}

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  start($("name").value);
});

function introduce(session) {
  if (session.blind) words = ANSWERS;
  document.querySelector("[data-do=save]").textContent = `Save ${words.many}`;
  document.title = `${session.dataset} · dedpo vote`;
  $("dataset").textContent = session.dataset;
  nameWho();
  $("raters").replaceChildren(...session.raters.map((name) => new Option("", name)));
  $("so-far").textContent = `${session.pairs} pairs, ${session.votes} answers so far. Give the same name again to continue.`;
}

nameSides();
const given = new URLSearchParams(location.search).get("rater");
$("name").value = given ?? remember();
$("name").select();
await reach("/api/session").then(introduce).catch(explain);
const known = given?.trim() ? given : inThisTab();
if (known) start(known);
