// What the pages of `dedpo vote` share: asking the server until it answers, and what is said when it does not.

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

// ---- the requests of one person

/** One request at a time; what the server refuses is said. `rater` gives the name, and `take` takes over the server's state. */
export function requests({ rater, take }) {
  let busy = false; // a request is on its way
  const next = () => reach(`/api/next?rater=${encodeURIComponent(rater())}`);

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
    if (rater() && (error.status === 404 || error.status === 409)) {
      try {
        take(await next());
        text = `That was not saved: ${text}. Here is where you are now.`;
      } catch (again) {
        text = again.message;
      }
    }
    showBanner(text, "Close", hideBanner);
    if (!(error instanceof Refused)) throw error; // a mistake of this page belongs on the console
  }

  const refresh = () => act(async () => take(await next()));

  const takeBack = () =>
    act(async () => {
      const state = await post("/api/undo", { rater: rater() });
      take(state, state.undone ? "undone" : "nothing to undo");
    });

  return { act, explain, next, refresh, takeBack, isBusy: () => busy };
}

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
