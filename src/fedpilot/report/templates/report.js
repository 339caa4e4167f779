"use strict";
(() => {
  const WIDTH = 460, LEVELS = 7, TALLEST = 720, MOST_NAMES = 40;
  const SVG = "http://www.w3.org/2000/svg";
  const root = document.documentElement;
  root.classList.add("js");
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");

  // --- what is pointed at -------------------------------------------------------------------------------------------

  let byKey = false; // what a key has shown stays until another key, or a pointer, or the focus moves on
  const say = (plot, text, x, y, aloud) => {
    byKey = aloud;
    tip.textContent = text;
    tip.hidden = false;
    document.querySelectorAll(".plot.on").forEach((other) => other.classList.remove("on"));
    plot.classList.add("on");
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
    const above = y + 14 + box.height > innerHeight ? y - 14 - box.height : y + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, above)}px`;
    if (aloud) said.textContent = text;
  };
  const hush = (plot) => {
    tip.hidden = true;
    plot.classList.remove("on");
  };

  // Each kind of plot: the item at a place of the drawing, the item beside another, and what to say of it where.

  const lines = (svg, data) => {
    const cursor = svg.querySelector(".cursor");
    const shown = () => data.lines.filter((line) => !line.off);
    const places = () => [...new Set(shown().flatMap((line) => line.x))].sort((a, b) => a - b);
    return {
      data,
      at: (x) => places().reduce((best, place) => (Math.abs(place - x) < Math.abs(best - x) ? place : best), Infinity),
      first: () => places()[0],
      beside: (place, dx) => {
        const all = places();
        return all[Math.min(all.length - 1, Math.max(0, all.indexOf(place) + dx))];
      },
      tell: (place) => {
        const parts = [];
        let where = "", y = 100;
        for (const line of shown()) {
          line.x.forEach((x, index) => {
            if (Math.abs(x - place) > 0.6) return;
            where = `${data.xName}: ${line.at[index]}`;
            y = line.y[index] ?? y;
            parts.push(`${line.name}: ${line.is[index]}`);
          });
        }
        cursor.setAttribute("transform", `translate(${place} 0)`);
        return { text: [where, ...parts].join("\n"), x: place, y };
      },
    };
  };

  const bars = (svg, data) => ({
    at: (x, y) => Math.min(data.said.length - 1, Math.max(0, Math.floor(y / data.rowHeight))),
    first: () => 0,
    beside: (index, dx, dy) => Math.min(data.said.length - 1, Math.max(0, index + dx + dy)),
    tell: (index) => ({ text: data.said[index], x: WIDTH / 3, y: (index + 0.7) * data.rowHeight }),
  });

  const columns = (svg, data) => ({
    at: (x) => Math.min(data.said.length - 1, Math.max(0, Math.floor((x - data.left) / data.step))),
    first: () => 0,
    beside: (index, dx, dy) => Math.min(data.said.length - 1, Math.max(0, index + dx + dy)),
    tell: (index) => ({ text: data.said[index], x: data.left + (index + 0.5) * data.step, y: 100 }),
  });

  const map = (svg, data) => {
    let [left, top, cell, row, bottom] = data.box;
    let visible = data.rows.map((_, index) => index);
    const cursor = svg.querySelector(".cursor");
    const within = (value, length) => Math.min(length - 1, Math.max(0, value));
    const shade = (value) => (value < 0 ? -1 : Math.ceil((value * (LEVELS - 1)) / data.peak));
    const label = (parent, text, x, y, name, anchor) => {
      const element = document.createElementNS(SVG, "text");
      element.textContent = text;
      element.setAttribute("x", x.toFixed(1));
      element.setAttribute("y", y.toFixed(1));
      element.setAttribute("text-anchor", anchor);
      if (name) element.setAttribute("class", name);
      parent.append(element);
    };
    const short = (text, most) => (text.length <= most ? text : `${text.slice(0, most - 1)}…`);

    const draw = () => {
      const count = Math.max(visible.length, 1);
      row = Math.min(24, TALLEST / count);
      const gap = row >= 8 ? 1 : 0;
      const paths = new Map();
      const names = svg.querySelector(".names");
      const numbers = svg.querySelector(".numbers");
      names.replaceChildren();
      numbers.replaceChildren();
      visible.forEach((number, index) => {
        const y = top + index * row;
        const line = data.values[number];
        let start = 0;
        for (let j = 1; j <= line.length; j += 1) {
          if (!gap && j < line.length && shade(line[j]) === shade(line[start])) continue;
          const width = (j - start) * cell - gap;
          const key = shade(line[start]);
          const box = `M${(left + start * cell).toFixed(1)} ${y.toFixed(2)}h${width.toFixed(1)}v${(row - gap).toFixed(2)}h-${width.toFixed(1)}z`;
          paths.set(key, (paths.get(key) ?? "") + box);
          start = j;
        }
        if (count <= MOST_NAMES) label(names, short(data.rows[number], 15), left - 6, y + row / 2 + 4, "", "end");
        if (count <= MOST_NAMES && cell >= 20 && row >= 14) {
          line.forEach((value, j) => {
            const x = left + (j + 0.5) * cell - 0.5;
            if (value >= 0) label(numbers, String(value), x, y + row / 2 + 4, `n${shade(value)}`, "middle");
          });
        }
      });
      if (count > MOST_NAMES) {
        let start = 0;
        for (let i = 1; i <= visible.length; i += 1) {
          const group = data.groups[visible[start]];
          if (i < visible.length && data.groups[visible[i]] === group) continue;
          if ((i - start) * row >= 13) {
            label(names, short(group, 15), left - 6, top + ((start + i) / 2) * row + 4, "", "end");
          }
          start = i;
        }
      }
      const cells = svg.querySelector(".cells");
      const drawn = [...paths].map(([key, box]) => {
        const path = document.createElementNS(SVG, "path");
        if (key < 0) path.setAttribute("fill", `url(#${svg.parentElement.id}-hatch)`);
        else path.setAttribute("class", `l${key}`);
        path.setAttribute("d", box);
        return path;
      });
      cells.replaceChildren(...drawn);
      const below = svg.querySelector(".below");
      const end = top + row * visible.length;
      below.setAttribute("transform", `translate(0 ${(end - Number(below.dataset.y)).toFixed(1)})`);
      svg.setAttribute("viewBox", `0 0 ${WIDTH} ${(end + bottom).toFixed(1)}`);
    };

    return {
      at: (x, y) => [within(Math.floor((y - top) / row), visible.length), within(Math.floor((x - left) / cell), data.columns.length)],
      first: () => [0, 0],
      beside: ([i, j], dx, dy) => [within(i + dy, visible.length), within(j + dx, data.columns.length)],
      tell: ([i, j]) => {
        if (i < 0 || !visible.length) return null;
        const number = visible[i];
        const value = data.values[number][j];
        const parts = [data.rows[number], data.about[number], `${data.columnName} ${data.columns[j]}: ${value < 0 ? data.absent : `${value} ${value === 1 ? data.unit.replace(/s$/, "") : data.unit}`}`];
        for (const [name, matrix] of data.further) {
          if (matrix[number][j] !== null) parts.push(`${name}: ${matrix[number][j]}`);
        }
        cursor.setAttribute("x", left + j * cell);
        cursor.setAttribute("y", top + i * row);
        cursor.setAttribute("width", cell);
        cursor.setAttribute("height", Math.max(row, 3));
        return { text: parts.filter(Boolean).join("\n"), x: left + (j + 0.5) * cell, y: top + (i + 0.5) * row };
      },
      filter: (wanted) => {
        visible = data.rows.map((_, index) => index).filter((index) => wanted(data.groups[index], data.rows[index]));
        draw();
      },
    };
  };

  const kinds = { lines, bars, columns, map };
  const plots = new Map();
  const ready = (plot) => {
    // Data of a plot are parsed when somebody comes near it: a page of many opens at once.
    if (!plots.has(plot)) {
      const data = JSON.parse(document.getElementById(`${plot.id}-data`).textContent);
      plots.set(plot, kinds[plot.dataset.kind](plot.querySelector("svg"), data));
    }
    return plots.get(plot);
  };

  for (const plot of document.querySelectorAll(".plot")) {
    const svg = plot.querySelector("svg");
    let item = null;
    plot.tabIndex = 0;
    const tell = (aloud, pointer) => {
      const found = ready(plot).tell(item);
      if (!found) return;
      const box = svg.getBoundingClientRect();
      const scale = box.width / WIDTH;
      const place = pointer ?? { x: box.left + found.x * scale, y: box.top + found.y * scale };
      say(plot, found.text, place.x, place.y, aloud);
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = WIDTH / box.width;
      item = ready(plot).at((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
      tell(false, { x: event.clientX, y: event.clientY });
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => byKey || hush(plot));
    plot.addEventListener("blur", () => hush(plot));
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") hush(plot);
      if (!step) return;
      event.preventDefault();
      item = item === null ? ready(plot).first() : ready(plot).beside(item, ...step);
      tell(true);
    });
  }
  addEventListener("scroll", () => byKey || document.querySelectorAll(".plot.on").forEach(hush), { passive: true });

  // --- filters ------------------------------------------------------------------------------------------------------

  for (const button of document.querySelectorAll(".lines button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(on));
      const section = button.closest("section");
      for (const line of section.querySelectorAll(`svg [data-s="${button.dataset.line}"]`)) line.style.display = on ? "" : "none";
      for (const plot of section.querySelectorAll('.plot[data-kind="lines"]')) {
        for (const line of ready(plot).data.lines) if (String(line.s) === button.dataset.line) line.off = !on;
      }
    });
  }

  for (const filters of document.querySelectorAll(".filters")) {
    const [tier, name] = [filters.querySelector("select"), filters.querySelector("input")];
    const section = filters.closest("section");
    const apply = () => {
      const part = name.value.trim().toLowerCase();
      const wanted = (group, row) => (!tier.value || group === tier.value) && row.toLowerCase().includes(part);
      let count = 0;
      for (const plot of section.querySelectorAll('.plot[data-kind="map"]')) ready(plot).filter(wanted);
      for (const table of section.querySelectorAll("table[data-clients]")) {
        count = 0;
        for (const row of table.tBodies[0].rows) {
          row.hidden = !wanted(row.dataset.tier, row.cells[0].textContent);
          count += row.hidden ? 0 : 1;
        }
      }
      filters.querySelector("output").textContent = `${count} of ${filters.dataset.clients} clients shown`;
    };
    tier.addEventListener("change", apply);
    name.addEventListener("input", apply);
  }

  // --- theme and print ----------------------------------------------------------------------------------------------

  const theme = document.getElementById("theme");
  theme.setAttribute("aria-pressed", String(matchMedia("(prefers-color-scheme: dark)").matches));
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    theme.setAttribute("aria-pressed", String(!dark));
  });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((one) => one.querySelectorAll("tr").length <= 80);
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
})();
