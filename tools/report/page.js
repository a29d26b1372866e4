// Reads values off the curves, shows their numbers, and filters and orders the samples.
"use strict";
(() => {
  const points = JSON.parse(document.getElementById("points").textContent);
  const LEFT = 46, RIGHT = 16, WIDTH = 340; // as tools/report/charts.py draws

  const element = (tag, text) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const shown = (value) => Number(value.toPrecision(5)).toString();

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const name = svg.dataset.chart;
    const lines = points[name].lines;
    const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const first = steps[0], last = steps[steps.length - 1];
    const cursor = svg.querySelector(".cursor");
    const readout = document.querySelector(`[data-readout="${name}"]`);
    let place = -1;

    const show = (index) => {
      place = Math.min(Math.max(index, 0), steps.length - 1);
      const step = steps[place];
      const x = last > first
        ? LEFT + ((step - first) / (last - first)) * (WIDTH - RIGHT - LEFT) : (LEFT + WIDTH - RIGHT) / 2;
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.classList.add("on");
      const values = lines.filter((line) => line.x.includes(step))
        .map((line) => `${line.label} ${shown(line.y[line.x.indexOf(step)])}`);
      readout.textContent = `${step}: ${values.join(", ")}`;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      const step = first + ((x - LEFT) / (WIDTH - RIGHT - LEFT)) * (last - first);
      let nearest = 0;
      steps.forEach((one, i) => {
        if (Math.abs(one - step) < Math.abs(steps[nearest] - step)) nearest = i;
      });
      show(nearest);
    });
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
      if (event.key in moves) {
        show(moves[event.key]);
        event.preventDefault();
      }
    });
    const hide = () => cursor.classList.remove("on");
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
  }

  for (const details of document.querySelectorAll("details[data-table]")) {
    details.addEventListener("toggle", () => {
      if (details.querySelector("table")) return;
      const lines = points[details.dataset.table].lines;
      const table = element("table"), head = element("tr"), body = element("tbody");
      for (const label of ["step", ...lines.map((line) => line.label)]) {
        const cell = element("th", label);
        cell.scope = "col";
        head.append(cell);
      }
      const maps = lines.map((line) => new Map(line.x.map((x, i) => [x, line.y[i]])));
      for (const step of [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b)) {
        const row = element("tr");
        const start = element("th", String(step));
        start.scope = "row";
        row.append(start, ...maps.map((map) => element("td", map.has(step) ? String(map.get(step)) : "–")));
        body.append(row);
      }
      const top = element("thead"), scroll = element("div");
      top.append(head);
      table.append(top, body);
      scroll.className = "scroll";
      scroll.tabIndex = 0;
      scroll.setAttribute("role", "group");
      scroll.setAttribute("aria-label", `Numbers of ${details.dataset.label}`);
      scroll.append(table);
      details.append(scroll);
    });
  }

  const list = document.getElementById("sample-list");
  if (list) {
    const samples = [...list.children];
    const filter = document.getElementById("filter");
    const order = document.getElementById("order");
    const count = document.getElementById("shown");
    const apply = () => {
      const words = filter.value.toLowerCase();
      for (const one of samples) one.hidden = !one.textContent.toLowerCase().includes(words);
      count.textContent = `${samples.filter((one) => !one.hidden).length} of ${samples.length} prompts`;
    };
    filter.addEventListener("input", apply);
    order.addEventListener("change", () => {
      const change = (one) => JSON.parse(one.dataset.changes)[order.value] ?? 0;
      const sorted = order.value ? [...samples].sort((a, b) => change(a) - change(b)) : samples;
      list.append(...sorted);
    });
    apply();
  }
})();
