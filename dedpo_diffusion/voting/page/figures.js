// The figures of `dedpo vote`: what the answers so far are worth, as tables.

import { make } from "./link.js";

// ---- the summary: a statistic is {value, ci: [low, high], n}; value and ci are null where they do not exist

const percent = (x) => `${Math.round(100 * x)}%`;
const decimal = (x) => x.toFixed(2).replace("-", "−");

/** All that there is to show, as elements. */
export function figures(found) {
  return [raters(found.raters), between(found.between), judges(found.judges)].filter(Boolean);
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
