// What the pages of `dedpo vote` share: asking the server until it answers, and what is said when it does not, and what is noted.

const RETRY_MS = 2000;
const LONGEST_RETRY_MS = 15000;
const TIMEOUT_MS = 30000; // a tunnel may hang without an error
const TOKEN_NEEDED = "The server asks for its token: open the address that dedpo vote printed once more.";


export const $ = (id) => document.getElementById(id);

let retryNow = () => {};

// ---- talking to the server

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** Fetch until an answer comes. Asking again is safe: the server stores an answer to a ticket once. */
export async function reach(path, options = {}, read = (response) => response.json()) {
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

export function post(path, body) {
  return reach(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

export function showBanner(text, button, action) {
  const [words, knob] = $("banner").children;
  if (words.textContent !== text) words.textContent = text; // said aloud once, not with every retry
  knob.textContent = button;
  knob.onclick = action;
  (document.querySelector("dialog[open]") ?? document.body).prepend($("banner")); // what is outside an open dialog cannot be reached
  $("banner").hidden = false;
}

export function hideBanner() {
  $("banner").hidden = true;
  $("banner").firstChild.textContent = "";
}

addEventListener("online", () => retryNow());

export function list(element, lines) {
  element.replaceChildren(...lines.map((line) => make("li", line)));
}

export function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

// what the banner covers is left free, so that progress and buttons stay in sight
new ResizeObserver(() => {
  const covered = $("banner").hidden ? 0 : $("banner").offsetHeight;
  document.documentElement.style.setProperty("--banner", `${covered}px`);
}).observe($("banner"));

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
