// The page of `dedpo vote`: shows one pair at a time and sends what the person prefers.
// Texts from the server are not trusted (prompts come from anywhere): they are only ever set as textContent.

import { $, list, post, reach, Refused, requests, showBanner } from "./link.js";
import {
  asked, begin, closeDialogs, forget, mark, nameDataset, nameWho, openDialog, painted, panelOpen, pictures, remember, screen, showProgress,
  showPrompt, showSummary, watch, watchDialogs,
} from "./screens.js";

const SETTLE_MS = 250; // an answer sooner than this after a pair appears was meant for the pair before it
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

const { act, explain, next, refresh, takeBack } = requests({ rater: () => rater, take });
const { load, loadAgain, forgetAllBut } = pictures((item) => [item.left, item.right]);

// ---- one pair

/** Take over the server's state: `said` is what was just done. */
function take(next, said = "") {
  state = next;
  ready = broken = false;
  watch.reset();
  closeDialogs();
  $("images").replaceChildren(); // the last pair is never under the new prompt
  delete $("images").dataset.ready;
  showProgress(state.progress, words.given);
  mark(said);
  for (const button of document.querySelectorAll("[data-do=undo]")) button.setAttribute("aria-disabled", !state.can_undo);
  if (state.item) showPair(state);
  else showEnd(state.progress);
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
    const after = await post("/api/vote", vote);
    const fewer = after.progress.total < before ? "; others answered some of your pairs, so fewer are left for you" : "";
    take(after, `saved: ${word(what)}${fewer}`);
  });
}

function undo() {
  if (state?.can_undo) takeBack();
}

// ---- screens and panels

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
  act(async () => showSummary(await reach("/api/summary")));
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
  const wish = asked(event, KEYS);
  if (!wish) return;
  const { what, here } = wish;
  if ((what && here) || (event.repeat && key === "Enter")) event.preventDefault();
  if (what && here && !event.repeat) ACTIONS[what](); // a key held down is one answer
});

stacked.addEventListener("change", nameSides);
watchDialogs((dialog) => {
  if (dialog.contains($("images"))) $("prompt").after($("images"));
});

function start(name) {
  act(async () => {
    rater = name.trim();
    nameWho(rater);
    take(await next());
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

function introduce(session) {
  if (session.blind) words = ANSWERS;
  document.querySelector("[data-do=save]").textContent = `Save ${words.many}`;
  nameDataset(session);
  nameWho(rater);
  $("so-far").textContent = `${session.pairs} pairs, ${session.votes} answers so far. Give the same name again to continue.`;
}

nameSides();
await begin({ introduce, explain, start });
