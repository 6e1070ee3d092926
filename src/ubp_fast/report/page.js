"use strict";
(() => {
  const figure = document.getElementById("client-map");
  if (!figure) return;
  const data = JSON.parse(document.getElementById("client-map-data").textContent);
  const svg = figure.querySelector("svg");
  const tip = figure.querySelector(".tip");
  const marks = [...svg.querySelectorAll("circle")];
  const places = marks.map((mark) => [mark.cx.baseVal.value, mark.cy.baseVal.value]);
  const reach = 12;
  let shown = -1;

  figure.querySelector(".choice").addEventListener("change", (event) => {
    figure.dataset.by = event.target.value;
  });

  const lines = (client) => {
    const found = Object.entries(data.kinds).map(([kind, counts]) => `${counts[client]} ${kind}`);
    if (data.ids) found.unshift(`client ${data.ids[client]}`);
    if (data.days[client] !== null) found.push(`newest event ${data.days[client]} days before the cutoff`);
    if (data.main[client] >= 0) found.push(`mostly ${data.mains[data.main[client]]}`);
    found.push(data.buys[client] ? "buys behind the cutoff" : "does not buy behind the cutoff");
    return found;
  };

  const hide = () => {
    if (shown >= 0) marks[shown].classList.remove("at");
    shown = -1;
    tip.hidden = true;
  };

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    let nearest = -1;
    let least = reach * reach;
    places.forEach(([px, py], client) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [least, nearest] = [distance, client];
    });
    if (nearest === shown) return;
    hide();
    if (nearest < 0) return;
    shown = nearest;
    marks[shown].classList.add("at");
    tip.replaceChildren(...lines(shown).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    tip.hidden = false;
    const [px, py] = places[shown];
    tip.style.left = `${Math.max(0, Math.min(px / scale + 10, box.width - tip.offsetWidth))}px`;
    const above = py / scale - tip.offsetHeight - 10;
    tip.style.top = `${above > 0 ? above : py / scale + 14}px`;
  };

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
})();
