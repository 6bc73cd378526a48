// The gallery of the report. Prompts come from anywhere: they are only ever set as textContent or as attributes.
"use strict";

const STEP = matchMedia("(max-width: 760px)").matches ? 12 : 24; // cards made at once
const AHEAD = "600px"; // how far below the window images are read

const $ = (id) => document.getElementById(id);
const whole = new Promise((done) => (document.readyState === "loading" ? addEventListener("DOMContentLoaded", done) : done()));
const near = new IntersectionObserver(arrive, { rootMargin: `${AHEAD} 0px` });
const state = { show: "all", view: "slider", scorer: 0, arm: 1, category: "", order: "sampled", words: "" };
let known = null;
let listed = []; // the pairs that pass the filters, in order
let built = 0; // how many of them have cards
let at = 0; // which one is enlarged

// ---- numbers

/** The change of a pair by a scorer from base to an arm; null where it is not known. */
function change(pair, scorer = state.scorer, arm = state.arm) {
  const values = pair.scores[scorer];
  if (known.scorers[scorer].people || values[arm] === null || values[0] === null) return values[arm];
  return values[arm] - values[0];
}

const SHOWS = {
  all: ["All", () => true],
  wins: ["Wins", (gain) => gain !== null && gain > 0],
  losses: ["Losses", (gain) => gain !== null && gain < 0],
  ties: ["Ties", (gain) => gain === 0],
  regressions: ["Largest regressions", (gain) => gain !== null && gain < 0],
};

const ORDERS = {
  sampled: () => 0,
  best: (a, b) => (change(b) ?? -Infinity) - (change(a) ?? -Infinity) || 0,
  worst: (a, b) => (change(a) ?? Infinity) - (change(b) ?? Infinity) || 0,
};

const VIEWS = { slider: "Slider", beside: "Side by side" };

const written = (value, digits, sign = false) =>
  value === null ? "–" : `${sign && value > 0 ? "+" : ""}${value.toFixed(digits)}`.replace("-", "−");

// ---- small parts

function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

function facts(pair) {
  return [`seed ${pair.seed}`, pair.category].filter((fact) => fact !== null && fact !== undefined).join(" · ");
}

/** A line for each scorer: its scores of base and arm, and the change. */
function marks(table, pair) {
  const places = [...known.scorers.keys()].filter((place) => !known.scorers[place].people || change(pair, place) !== null);
  table.replaceChildren(
    ...places.map((place) => {
      const row = make("tr");
      const [scorer, gain, values] = [known.scorers[place], change(pair, place), pair.scores[place]];
      const kind = gain === null || gain === 0 ? "" : gain > 0 ? "up" : "down";
      row.toggleAttribute("data-chosen", place === state.scorer);
      const name = make("th", scorer.name);
      name.title = scorer.name;
      row.append(
        name,
        make("td", scorer.people ? "" : `${written(values[0], scorer.digits)} → ${written(values[state.arm], scorer.digits)}`),
        make("td", `${written(gain, scorer.digits, true)} ${{ up: "▲", down: "▼" }[kind] ?? ""}`, kind),
      );
      return row;
    }),
  );
}

/** Give an image of a pair its picture; blocks that the browser has not read yet are waited for. */
async function picture(image, pair, arm) {
  image.alt = `${known.arms[arm]}: ${pair.prompt}`;
  image.classList.toggle("small", pair.small);
  await whole;
  image.src = `data:${$(`image-${pair.row}-${arm}`).textContent}`;
}

// ---- cards

function card(pair) {
  const element = $("pair").content.cloneNode(true).firstElementChild;
  const [stage, slider] = [element.querySelector(".stage"), element.querySelector("input")];
  const [base, arm] = [known.arms[0], known.arms[state.arm]];
  element.dataset.row = pair.row;
  stage.style.setProperty("--ratio", pair.size[0] / pair.size[1]);
  element.querySelector(".name.left").textContent = base;
  element.querySelector(".name.right").textContent = arm;
  slider.setAttribute("aria-label", `${base} left of the line, ${arm} right of it: ${pair.prompt}, seed ${pair.seed}`);
  const cut = () => {
    stage.style.setProperty("--cut", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % ${base}`);
  };
  slider.addEventListener("input", cut);
  cut();
  element.querySelector(".enlarge").addEventListener("click", () => enlarge(listed.indexOf(pair)));
  element.querySelector(".prompt").textContent = pair.prompt;
  element.querySelector(".facts").textContent = facts(pair);
  marks(element.querySelector("table"), pair);
  element.pair = pair;
  near.observe(element);
  return element;
}

function arrive(entries) {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    picture(target.querySelector("img.left"), target.pair, 0);
    picture(target.querySelector("img.right"), target.pair, state.arm);
  }
}

function grow() {
  const next = listed.slice(built, built + STEP);
  built += next.length;
  $("pairs").append(...next.map(card));
  const left = listed.length - built;
  $("more").hidden = !left;
  $("more").textContent = `Show ${Math.min(STEP, left)} more (${left} left)`;
}

// ---- filters

function matches(pair) {
  const asked = state.category === "" || (pair.category ?? "") === state.category.slice(1);
  return asked && pair.prompt.toLowerCase().includes(state.words.toLowerCase());
}

function update() {
  const found = known.pairs.filter(matches);
  for (const button of $("shows").children) {
    const [name, test] = SHOWS[button.value];
    const count = found.filter((pair) => test(change(pair))).length;
    button.textContent = button.value === "regressions" ? name : `${name} ${count}`;
    button.setAttribute("aria-pressed", button.value === state.show);
  }
  for (const button of $("arms").children) button.setAttribute("aria-pressed", Number(button.value) === state.arm);
  for (const button of $("views").children) button.setAttribute("aria-pressed", button.value === state.view);
  $("pairs").dataset.view = state.view;
  listed = found.filter((pair) => SHOWS[state.show][1](change(pair))).sort(ORDERS[state.order]);
  near.disconnect();
  $("order").value = state.order;
  $("pairs").replaceChildren();
  $("count").textContent = listed.length
    ? `${listed.length} of ${known.pairs.length} pairs: ${known.arms[0]} against ${known.arms[state.arm]}`
    : "No pair is like that.";
  built = 0;
  grow();
}

function choices(group, texts, chosen) {
  group.replaceChildren(
    ...texts.map(([value, text]) => {
      const button = make("button", text);
      button.type = "button";
      button.value = value;
      button.addEventListener("click", () => {
        chosen(value);
        update();
      });
      return button;
    }),
  );
}

function choose(show) {
  state.show = show;
  if (show === "regressions") state.order = "worst";
}

function fill() {
  const others = known.arms.map((name, place) => [place, name]).slice(1);
  choices($("arms"), others, (arm) => (state.arm = arm));
  $("arms").dataset.label = `${known.arms[0]} against`;
  $("arms").hidden = others.length < 2;
  choices($("views"), Object.entries(VIEWS), (view) => (state.view = view));
  choices($("shows"), Object.entries(SHOWS).map(([value, [name]]) => [value, name]), choose);
  $("scorer").replaceChildren(...known.scorers.map(({ name }, place) => new Option(name, place)));
  $("scorer").value = state.scorer;
  $("scorer").parentElement.hidden = known.scorers.length < 2;
  const categories = [...new Set(known.pairs.map(({ category }) => category ?? ""))].sort();
  $("category").replaceChildren(new Option("all", ""), ...categories.map((name) => new Option(name || "none", `=${name}`)));
  $("category").parentElement.hidden = categories.length < 2;
  for (const name of ["scorer", "category", "order", "words"]) {
    $(name).addEventListener("input", () => {
      state[name] = name === "scorer" ? Number($(name).value) : $(name).value;
      update();
    });
  }
}

// ---- the enlarged pair

function enlarge(place) {
  at = place;
  const [box, pair] = [$("large"), listed[place]];
  $("place").textContent = `${place + 1} of ${listed.length}`;
  box.querySelector(".prompt").textContent = pair.prompt;
  box.querySelector(".both + .facts").textContent = facts(pair);
  for (const [side, arm] of [["left", 0], ["right", state.arm]]) {
    const image = box.querySelector(`img.${side}`);
    image.removeAttribute("src"); // the last pair never stands under the new prompt
    [image.width, image.height] = pair.size;
    image.style.setProperty("--ratio", pair.size[0] / pair.size[1]);
    picture(image, pair, arm);
    image.nextElementSibling.textContent = known.arms[arm];
  }
  marks(box.querySelector("table"), pair);
  box.querySelector("[data-go='-1']").disabled = place === 0;
  box.querySelector("[data-go='1']").disabled = place === listed.length - 1;
  if (!box.open) box.showModal();
}

function go(step) {
  const next = at + step;
  if (next >= 0 && next < listed.length) enlarge(next);
}

$("large").addEventListener("click", ({ target }) => {
  const step = target.closest("[data-go]")?.dataset.go;
  if (step === "0" || target === $("large")) $("large").close();
  else if (step) go(Number(step));
});
$("large").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  go(step);
});
$("more").addEventListener("click", () => {
  const first = built;
  grow();
  $("pairs").children[first].querySelector(state.view === "slider" ? "input" : "button").focus({ preventScroll: true });
});

// ---- the start: this script stands before its data

function start() {
  known = JSON.parse($("known").textContent);
  Object.assign(state, { arm: known.best, scorer: known.scorer });
  fill();
  $("gallery").hidden = false;
  for (const element of document.querySelectorAll(".script")) element.hidden = false;
  update();
}

/** What is known of the pairs stands before the images, which take long to read: do not wait for those. */
if ($("known")) start();
else new MutationObserver((_, watch) => $("known")?.nextSibling && (watch.disconnect(), start())).observe(document.body, { childList: true });
