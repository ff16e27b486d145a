// An answer as a person reads it.

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function worthSentence(worth) {
  const [right, given] = worth.found ? worth.right_of_yes : worth.right_of_no;
  return `in validation on ${worth.stratum} ${right} of ${given} such answers were right ` +
    `(sensitivity ${worth.sensitivity.toFixed(2)}, specificity ${worth.specificity.toFixed(2)})`;
}

function captionOf(answer) {
  if (answer.source === "header" && !answer.abstained) return "What the picture alone looks like";
  return answer.abstained ? "What it considered" : "Runners-up";
}

// `look` is called for an answer that has a map to show.
export function card(answer, about, look) {
  const made = element("article");
  made.append(element("h2", answer.question));
  if (answer.abstained) {
    made.append(element("p", "NO ANSWER", "given none"), element("p", answer.reason));
  } else {
    made.append(element("p", answer.answer, "given"));
    const sure = answer.worth ? worthSentence(answer.worth)
      : answer.source === "header" ? "" : answer.probability === null ? "" : `confidence ${Math.round(100 * answer.probability)}%`;
    if (sure) made.append(element("p", sure));
  }
  if (!answer.abstained || answer.candidates.length) { // else nothing was looked at
    made.append(element("p", answer.source === "header" && !answer.abstained ? "from the file's header" : "from the picture", "soft"));
  }
  const others = answer.worth ? [] : answer.candidates.slice(answer.abstained || answer.source === "header" ? 0 : 1, 4);
  if (others.length) {
    const table = element("table"), caption = element("caption", captionOf(answer), "soft");
    table.append(caption);
    for (const other of others) {
      const row = element("tr"), bar = element("meter");
      bar.value = other.probability;
      bar.setAttribute("aria-label", `${other.answer}, ${Math.round(100 * other.probability)}%`);
      const cell = element("td");
      cell.append(bar);
      const name = element("th", other.answer, "soft");
      name.scope = "row";
      row.append(name, cell, element("td", `${Math.round(100 * other.probability)}%`, "soft"));
      table.append(row);
    }
    made.append(table);
  }
  if (answer.note) made.append(element("p", answer.note, "soft"));
  made.append(element("p", about, "soft"));
  if (answer.worth?.found && look) {
    const button = element("button", "Where it looked");
    button.addEventListener("click", () => look(answer.worth.finding));
    made.append(button);
  }
  return made;
}

export function matches(found) {
  const made = element("article"), list = element("ol");
  made.append(element("h2", "Similar cases in the index"));
  for (const match of found) list.append(element("li", `${match.id} (${match.score.toFixed(3)})`));
  made.append(list);
  return made;
}
