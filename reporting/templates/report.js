"use strict";
// Tables that go on beyond their frame can be scrolled by keys.
function reach(frame) {
  if (frame.scrollWidth > frame.clientWidth) frame.tabIndex = 0;
  else frame.removeAttribute("tabindex");
}
const frames = new ResizeObserver(entries => entries.forEach(entry => reach(entry.target)));
for (const frame of document.querySelectorAll(".wide")) {
  reach(frame);
  frames.observe(frame);
}

// The cases of a table: chosen, sorted and shown by the page. Without a script all of them stand there, by error.
const PAGE = 24;
for (const look of document.querySelectorAll(".look")) {
  const classes = JSON.parse(look.dataset.classes);
  const list = look.querySelector(".cards");
  const cards = [...list.children].map((place, order) => ({
    place, order, label: Number(place.dataset.label), group: place.dataset.group, name: place.dataset.name,
    answers: JSON.parse(place.dataset.answers),  // of each model: predicted class, its probability, the own class's, all
  }));
  const chosen = name => look.querySelector(`select[name="${name}"]`)?.value ?? "";
  const model = () => Number(chosen("model"));
  const answer = card => card.answers[model()];
  const words = new Intl.Collator(undefined, { numeric: true });
  const byError = (a, b) => answer(a)[2] - answer(b)[2] || a.order - b.order;
  const orders = {
    error: byError,
    sure: (a, b) => answer(b)[1] - answer(a)[1] || a.order - b.order,
    patient: (a, b) => words.compare(a.group, b.group) || words.compare(a.name, b.name),
    label: (a, b) => a.label - b.label || byError(a, b),
  };
  const nearest = c => (a, b) => answer(b)[3][c] - answer(a)[3][c] || a.order - b.order;
  const percent = p => (100 * p).toFixed(1) + "%";
  const more = look.querySelector(".further"), count = look.querySelector("output");
  let most = PAGE;

  function arrange() {
    const show = chosen("show"), only = chosen("class"), sort = chosen("sort");
    const shown = cards.filter(card => {
      if (!answer(card) || (only !== "" && card.label !== Number(only))) return false;
      return show === "all" || (answer(card)[0] !== card.label) === (show === "wrong");
    });
    shown.sort(orders[sort] ?? nearest(Number(sort)));
    for (const card of cards) card.place.hidden = true;
    for (const card of shown.slice(0, most)) {
      const [predicted, itsOwn, own] = answer(card), said = card.place.querySelector(".said");
      said.textContent = `said: ${classes[predicted]} ${percent(itsOwn)}`
        + (predicted === card.label ? "" : `, its own class ${percent(own)}`)
        + (orders[sort] ? "" : `; ${classes[Number(sort)]} ${percent(answer(card)[3][Number(sort)])}`);
      said.classList.toggle("wrong", predicted !== card.label);
      card.place.hidden = false;
    }
    list.append(...shown.map(card => card.place));
    const number = Math.min(most, shown.length);
    count.textContent = `${number} of ${shown.length} shown`;
    more.hidden = number === shown.length;
    more.textContent = `Show ${Math.min(PAGE, shown.length - number)} more`;
    return shown;
  }
  for (const select of look.querySelectorAll("select")) {
    select.addEventListener("change", () => { most = PAGE; arrange(); });
  }
  more.addEventListener("click", () => {
    const first = most;
    most += PAGE;
    const next = arrange()[first].place;  // whoever reads by keys goes on with the first new one
    next.tabIndex = -1;
    next.focus();
  });
  look.querySelector(".controls").hidden = false;
  arrange();
}
