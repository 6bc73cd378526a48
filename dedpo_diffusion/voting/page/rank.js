// The page of `dedpo vote --rank`: shows all images of a prompt and sends their order.
// Texts from the server are not trusted (prompts come from anywhere): they are only ever set as textContent.

import { $, list, make, post, reach, Refused, requests, showBanner } from "./link.js";
import {
  asked, begin, closeDialogs, forget, kept, mark, nameDataset, nameWho, openDialog, painted, panelOpen, pictures, remember, screen,
  showProgress, showPrompt, showSummary, watch, watchDialogs,
} from "./screens.js";

const SETTLE_MS = 250; // a step sooner than this after the images appear was meant for those before
const FAR = 8; // pixels that a pointer moves before it drags

const KEYS = { t: "tie", "=": "tie", enter: "done", s: "skip", u: "undo", backspace: "undo", z: "zoom", "?": "keys" };

let rater = "";
let state = null; // the server's latest word: progress, item, following, can_undo
let ready = false; // all images of state.item are on the screen: only then a step counts
let broken = false; // an image cannot be shown: the prompt can be skipped
let tiers = []; // places on the page, best first, those that tie together
let past = []; // what `tiers` was before each step

const size = () => state?.item?.images.length ?? 0;
const ranked = () => tiers.flat();

const { act, explain, next, refresh, takeBack, isBusy } = requests({ rater: () => rater, take });
const { load, loadAgain, forgetAllBut } = pictures((item) => item.images);

// ---- what is kept in this tab until it is sent: a reload loses no step

const keepDraft = () => kept("draft", JSON.stringify({ ticket: state.item.ticket, tiers, past }));

/** The steps taken on these images before a reload; none where the draft is of others. */
function draft(item) {
  try {
    const found = JSON.parse(kept("draft") || "{}");
    if (found.ticket === item.ticket) return { tiers: found.tiers, past: found.past };
  } catch {}
  return { tiers: [], past: [] };
}

// ---- one prompt

/** Take over the server's state: `said` is what was just done. */
function take(next, said = "") {
  state = next;
  ready = broken = false;
  watch.reset();
  closeDialogs();
  $("tiles").replaceChildren(); // the last images are never under the new prompt
  delete $("tiles").dataset.ready;
  ({ tiers, past } = state.item ? draft(state.item) : { tiers: [], past: [] });
  showProgress(state.progress, "ranked");
  mark(said);
  showOrder();
  if (state.item) showImages(state);
  else showEnd(state.progress);
}

async function showImages(shown) {
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
    return showBanner(broken ? `An image cannot be shown: ${why}. Skip the prompt, or try again.` : why, "Try again", refresh);
  }
  if (state !== shown) return;
  const phone = matchMedia("(max-aspect-ratio: 7/10)").matches;
  const columns = phone ? (images.length > 6 ? 3 : 2) : images.length > 3 ? Math.ceil(images.length / 2) : images.length;
  $("tiles").style.setProperty("--columns", phone || images.length < 7 ? columns : Math.ceil(Math.sqrt(2 * images.length)));
  $("tiles").replaceChildren(...images.map(tile));
  showOrder();
  if (following) load(following).catch(() => {}); // shown at once when its turn comes
  await painted();
  if (state !== shown) return;
  watch.start();
  setTimeout(() => {
    if (state !== shown) return;
    ready = true;
    $("tiles").dataset.ready = item.ticket;
  }, SETTLE_MS);
}

function tile(image, place) {
  const button = make("button", "", "tile");
  button.type = "button";
  button.dataset.place = place;
  Object.assign(image, { alt: "", draggable: false });
  button.append(image, make("span", "", "badge"), make("kbd", place + 1));
  return button;
}

// ---- the order

function step(change) {
  if (!ready || isBusy()) return;
  past.push(structuredClone(tiers));
  change();
  tiers = tiers.filter((tier) => tier.length);
  keepDraft();
  showOrder();
}

function without(place) {
  tiers = tiers.map((tier) => tier.filter((other) => other !== place)).filter((tier) => tier.length);
}

/** The next best image; one that has its place already loses it. */
function pick(place) {
  if (place >= size()) return;
  step(() => (ranked().includes(place) ? without(place) : tiers.push([place])));
}

/** The last two become equal; where they are, the last one comes after the other again. */
function tie() {
  if (ranked().length < 2) return;
  step(() => {
    const last = tiers.pop();
    if (last.length > 1) tiers.push(last.slice(0, -1), last.slice(-1));
    else tiers.at(-1).push(...last);
  });
}

/** An image was dragged onto one that it beats. */
function putBefore(place, other) {
  step(() => {
    without(place);
    const at = tiers.findIndex((tier) => tier.includes(other));
    if (at < 0) tiers.push([place], [other]);
    else tiers.splice(at, 0, [place]);
  });
}

/** All images in order; the only one that was left out comes last. */
function whole() {
  const left = [...Array(size()).keys()].filter((place) => !ranked().includes(place));
  return left.length > 1 ? null : [...tiers, left].filter((tier) => tier.length);
}

function showOrder() {
  for (const button of $("tiles").children) {
    const rank = tiers.findIndex((tier) => tier.includes(Number(button.dataset.place)));
    const before = tiers.slice(0, Math.max(rank, 0)).flat().length + 1;
    const equal = rank >= 0 && tiers[rank].length > 1 ? "=" : "";
    if (rank < 0) delete button.dataset.rank;
    else button.dataset.rank = before;
    button.querySelector(".badge").textContent = rank < 0 ? "–" : `${before}${equal}`;
    const number = Number(button.dataset.place) + 1;
    button.setAttribute("aria-label", rank < 0 ? `Image ${number}, no place yet` : `Image ${number}, place ${before}${equal && ", a tie"}`);
  }
  $("order").textContent = tiers.map((tier) => tier.map((place) => place + 1).join(" = ")).join(" > ");
  document.querySelector("[data-do=done]").setAttribute("aria-disabled", !whole());
  document.querySelector("[data-do=tie]").setAttribute("aria-disabled", ranked().length < 2);
  for (const button of document.querySelectorAll("[data-do=undo]")) {
    button.setAttribute("aria-disabled", !past.length && !state?.can_undo);
  }
}

function send(answer, said) {
  act(async () => {
    const vote = { rater, ticket: state.item.ticket, answer, seconds: watch.seconds() };
    mark("");
    const after = await post("/api/vote", vote);
    kept("draft", "");
    take(after, said);
  });
}

function done() {
  if (ready && whole()) send(whole(), "saved");
}

function skip() {
  if (ready || broken) send("skip", "saved: skip");
}

function undo() {
  if (past.length && ready) {
    tiers = past.pop();
    keepDraft();
    return showOrder();
  }
  if (!past.length && state?.can_undo) takeBack();
}

// ---- screens and panels

function showEnd({ answered, skipped, total, labelled, pairs }) {
  screen("end");
  list($("written"), []);
  const held = total - answered - skipped; // on other people's screens, and may come back
  $("nothing-left").textContent = held ? "Nothing left right now" : "Nothing left to rank";
  $("thanks").textContent = `Thank you, ${rater}.`;
  $("again").hidden = !held;
  list($("counts"), [
    `You ranked ${answered} and skipped ${skipped}.`,
    `${labelled} of ${pairs} prompts have a ranking.`,
    ...(held ? [`Other people are looking at the last ones (${held}).`] : []),
  ]);
}

function zoom() {
  if ($("zoom").open) return closeDialogs();
  const figures = [...$("tiles").querySelectorAll("img")].map((image, place) => {
    const figure = document.createElement("figure");
    figure.append(image.cloneNode(), make("figcaption", place + 1));
    return figure;
  });
  if (!figures.length) return;
  $("large").replaceChildren(...figures);
  openDialog($("zoom"));
}

function save() {
  act(async () => {
    const written = await post("/api/export", {});
    list($("written"), [`Saved ${written.labels} labels in ${written.path}.`, ...written.sentences]);
  });
}

function summary() {
  act(async () => showSummary(await reach("/api/summary")));
}

// ---- what the person does

const ACTIONS = { tie, done, skip, undo, zoom, refresh, save, summary, leave, keys: () => openDialog($("keys")), close: closeDialogs };

let drag = null; // {place, x, y, id, moved}
let dragged = false; // a drag has just ended: the click that follows it is none

document.addEventListener("pointerdown", (event) => {
  const held = event.target.closest(".tile");
  if (!held || event.button || (event.pointerType === "touch" && !event.target.closest(".badge"))) return;
  drag = { place: Number(held.dataset.place), x: event.clientX, y: event.clientY, id: event.pointerId, moved: false };
});

document.addEventListener("pointermove", (event) => {
  if (drag?.id !== event.pointerId) return;
  drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > FAR;
  if (drag.moved) showDrag(under(event));
});

// A drag is no scroll; else a quick one starts a fling, and the next tap would only halt that.
const still = (event) => drag && event.cancelable && event.preventDefault();
document.addEventListener("touchmove", still, { passive: false });

function under(event) {
  const found = document.elementFromPoint(event.clientX, event.clientY)?.closest(".tile");
  return found && Number(found.dataset.place) !== drag.place ? found : null;
}

function showDrag(over) {
  for (const button of $("tiles").children) {
    button.classList.toggle("dragged", drag?.moved === true && Number(button.dataset.place) === drag.place);
    button.classList.toggle("over", button === over);
  }
}

function drop(event) {
  if (drag?.id !== event.pointerId) return;
  const [over, { place, moved }] = [event.type === "pointerup" && drag.moved ? under(event) : null, drag];
  drag = null;
  showDrag(null);
  if (!moved) return;
  dragged = true;
  setTimeout(() => (dragged = false));
  if (over) putBefore(place, Number(over.dataset.place));
}

document.addEventListener("pointerup", drop);
document.addEventListener("pointercancel", drop);

document.addEventListener("click", ({ target }) => {
  const [button, image] = [target.closest("[data-do]"), target.closest(".tile")];
  if (button) ACTIONS[button.dataset.do]();
  else if (image && !dragged) pick(Number(image.dataset.place));
  else if (target.closest("#large")) closeDialogs();
});

// A click leaves the focus where it was, so that Enter still means done.
document.addEventListener("mousedown", (event) => {
  if (event.target.closest("[data-do], .tile")) event.preventDefault();
});

document.addEventListener("keydown", (event) => {
  const { key } = event;
  const focused = event.target.closest("button, input, #prompt");
  if (panelOpen() || focused?.matches("input")) return;
  if (focused?.matches("button") && (key === " " || key === "Enter")) return; // presses the button
  const wish = asked(event, KEYS);
  if (!wish) return;
  const { what, here } = wish;
  if (what && here) event.preventDefault();
  if (event.repeat || !here) return; // a key held down is one step
  if (what) ACTIONS[what]();
  else if (/^[1-9]$/.test(key)) pick(Number(key) - 1);
});

watchDialogs();

// ---- who ranks

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
    kept("draft", "");
    rater = "";
    introduce(await reach("/api/session"));
    screen("start");
    $("name").value = "";
    $("name").focus();
  });
}

function introduce(session) {
  nameDataset(session);
  nameWho(rater);
  $("so-far").textContent = `${session.pairs} prompts, ${session.votes} rankings so far. Give the same name again to continue.`;
}

await begin({ introduce, explain, start });
