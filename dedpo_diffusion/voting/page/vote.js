// The page of `dedpo vote`: shows one pair at a time and sends what the person prefers.
// Texts from the server are not trusted (prompts come from anywhere): they are only ever set as textContent.

const SETTLE_MS = 250; // an answer sooner than this after a pair appears was meant for the pair before it
const RETRY_MS = 2000;
const LONGEST_RETRY_MS = 15000;
const TIMEOUT_MS = 30000; // a tunnel may hang without an error
const TINY = 128; // images smaller than this keep hard pixels when enlarged
const TOKEN_NEEDED = "The server asks for its token: open the address that dedpo vote printed once more.";

const KEYS = {
  arrowleft: "left", a: "left", 1: "left", arrowright: "right", d: "right", 2: "right", arrowdown: "tie", t: "tie", " ": "tie",
  s: "skip", u: "undo", backspace: "undo", z: "zoom", "?": "keys",
};

const LABELS = { one: "a label", many: "labels", give: "label", given: "labelled" };
const ANSWERS = { one: "an answer", many: "answers", give: "answer", given: "answered" };

const $ = (id) => document.getElementById(id);
const stacked = matchMedia("(max-aspect-ratio: 7/10)"); // the same as in vote.css

let rater = "";
let words = LABELS; // what this voting makes
let state = null; // the server's latest word: progress, item, following, can_undo
let ready = false; // both images of state.item are on the screen: only then an answer counts
let broken = false; // its images cannot be shown: it can be skipped
let busy = false; // a request is on its way
let retryNow = () => {};

// ---- talking to the server

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** Fetch until an answer comes. Asking again is safe: the server stores an answer to a ticket once. */
async function reach(path, options = {}, read = (response) => response.json()) {
  for (let wait = RETRY_MS; ; wait = Math.min(1.5 * wait, LONGEST_RETRY_MS)) {
    let trouble = "Connection lost. Your answers are safe; trying again every few seconds.";
    try {
      const response = await fetch(path, { ...options, signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (response.ok) {
        const answer = await read(response);
        hideBanner();
        return answer;
      }
      if (response.status < 500) throw new Refused(response.status, await refusal(response));
      trouble = `The server has a problem (${response.status}). Your answers are safe; trying again every few seconds.`;
    } catch (error) {
      if (error instanceof Refused) throw error;
    }
    showBanner(trouble, "Try now", () => retryNow());
    await new Promise((resolve) => {
      retryNow = resolve;
      setTimeout(resolve, wait);
    });
  }
}

async function refusal(response) {
  if (response.status === 401) return TOKEN_NEEDED;
  const answer = await response.json().catch(() => null);
  return answer?.error ?? `${response.status} ${response.statusText}`;
}

function post(path, body) {
  return reach(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

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

function showBanner(text, button, action) {
  const [words, knob] = $("banner").children;
  if (words.textContent !== text) words.textContent = text; // said aloud once, not with every retry
  knob.textContent = button;
  knob.onclick = action;
  (document.querySelector("dialog[open]") ?? document.body).prepend($("banner")); // what is outside an open dialog cannot be reached
  $("banner").hidden = false;
}

function hideBanner() {
  $("banner").hidden = true;
  $("banner").firstChild.textContent = "";
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

function mark(text) {
  $("saved").textContent = text; // emptied before each answer, so that the same words twice are said twice
  if (text && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
    $("saved").animate([{ opacity: 1 }, { opacity: 1, offset: 0.7 }, { opacity: 0 }], { duration: 2500, fill: "forwards" });
  }
}

/** Seconds that a pair was looked at: hidden tabs and open panels do not count. */
const watch = {
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

const panelOpen = () => document.querySelector("dialog.panel[open]") !== null;

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

function list(element, lines) {
  element.replaceChildren(...lines.map((line) => make("li", line)));
}

function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

function save() {
  act(async () => {
    const written = await post("/api/export", {});
    const what = written.path ? `${written.labels} labels in ${written.path}` : `the answers on ${written.labels} pairs`;
    list($("written"), [`Saved ${what}.`, ...written.sentences]);
  });
}

// ---- the summary: a statistic is {value, ci: [low, high], n}; value and ci are null where they do not exist

const percent = (x) => `${Math.round(100 * x)}%`;
const decimal = (x) => x.toFixed(2).replace("-", "−");

function summary() {
  act(async () => {
    const found = await reach("/api/summary");
    const sentences = document.createElement("ul");
    list(sentences, found.sentences);
    $("figures").replaceChildren(sentences, ...[raters(found.raters), between(found.between), judges(found.judges)].filter(Boolean));
    openDialog($("summary"));
  });
}

function raters(people) {
  const columns = ["Rater", "Answers", "Ties", "Chose left", "Repeated alike", "Median time"];
  return table(columns, people, (one) => [
    one.rater, one.votes, one.ties, figure(one.left, percent), figure(one.repeats, percent),
    one.seconds === null ? "–" : `${one.seconds.toFixed(1)} s`,
  ]);
}

function between({ raw, alpha }) {
  const rows = [
    ["Equal answers", raw, percent],
    ["Krippendorff's alpha", alpha, decimal],
  ];
  const known = rows.filter(([, statistic]) => statistic?.n);
  const columns = ["Between raters", "Agreement", "Pairs"];
  return table(columns, known, ([name, statistic, format]) => [name, figure(statistic, format), statistic.n]);
}

function judges(found) {
  const columns = ["Judge", "Agrees with people", "Pairs", "Lean to image 0"];
  return table(columns, found, (judge) => [judge.name, figure(judge, percent), judge.n, figure(judge.bias, decimal)]);
}

function figure(statistic, format) {
  if (typeof statistic?.value !== "number") return "–";
  const { value, ci } = statistic;
  return ci ? [format(value), ` ${format(ci[0])} to ${format(ci[1])}`] : format(value);
}

/** A table in a box that scrolls sideways; nothing without rows. A cell is text, or text and what stands quietly behind it. */
function table(columns, items, cells) {
  if (!items.length) return null;
  const box = document.createElement("div");
  const element = box.appendChild(document.createElement("table"));
  element.append(row("th", columns), ...items.map((item) => row("td", cells(item))));
  return box;
}

function row(tag, cells) {
  const element = document.createElement("tr");
  for (const [text, behind] of cells.map((cell) => [cell].flat())) {
    const cell = element.appendChild(make(tag, text));
    if (behind) cell.append(make("span", behind, "quiet"));
  }
  return element;
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
addEventListener("online", () => retryNow());
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

// what the banner covers is left free, so that progress and buttons stay in sight
new ResizeObserver(() => {
  const covered = $("banner").hidden ? 0 : $("banner").offsetHeight;
  document.documentElement.style.setProperty("--banner", `${covered}px`);
}).observe($("banner"));

nameSides();
const given = new URLSearchParams(location.search).get("rater");
$("name").value = given ?? remember();
$("name").select();
await reach("/api/session").then(introduce).catch(explain);
const known = given?.trim() ? given : inThisTab();
if (known) start(known);
