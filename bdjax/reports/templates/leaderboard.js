"use strict";
(() => {
  const form = document.getElementById("filters");
  const table = document.getElementById("rows-table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const selects = [...form.querySelectorAll("select")];
  const cell = (row, column) => [...row.cells].find((one) => one.dataset.column === column);
  const value = (row, column) => {
    const one = cell(row, column);
    return one && one.dataset.value !== "" ? Number(one.dataset.value) : NaN;
  };
  const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;
  const median = (numbers) => {
    const sorted = [...numbers].sort((one, two) => one - two);
    const half = Math.floor(sorted.length / 2);
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  };

  const duration = (seconds) =>
    seconds < 1 ? String(Number(seconds.toPrecision(2))) : seconds.toFixed(seconds < 100 ? 1 : 0);

  function summary(shown, defense) {
    const own = shown.filter((row) => row.dataset.defense === defense && !Number.isNaN(value(row, "der")));
    if (!own.length) return null;
    const memory = own.map((row) => value(row, "peak_memory_mib")).filter((one) => !Number.isNaN(one));
    return {
      der: mean(own.map((row) => value(row, "der"))),
      asr_after: mean(own.map((row) => value(row, "asr_after"))),
      acc_change: mean(own.map((row) => Number(row.dataset.change))),
      seconds: median(own.map((row) => value(row, "seconds"))),
      memory: memory.length ? Math.max(...memory) : NaN,
      n_rows: own.length,
    };
  }

  function position(data, name, number) {
    const log = data[name + "Log"] === "1";
    const of = (one) => (log ? Math.log10(Math.max(one, 1e-9)) : one);
    const low = of(Number(data[name + "Low"]));
    const high = of(Number(data[name + "High"]));
    const start = Number(data[name + "Start"]);
    const end = Number(data[name + "End"]);
    const share = Math.min(Math.max((of(number) - low) / (high - low), 0), 1);
    return Math.round(10 * (start + share * (end - start))) / 10;
  }

  function draw(svg, summaries, across, up) {
    const points = [];
    for (const point of svg.querySelectorAll(".point")) {
      const numbers = summaries.get(point.dataset.defense);
      point.style.display = numbers ? "" : "none";
      if (!numbers) continue;
      const x = position(svg.dataset, "x", numbers[across]);
      const y = position(svg.dataset, "y", numbers[up]);
      point.setAttribute("transform", `translate(${x} ${y})`);
      points.push([x, y]);
    }
    points.sort((one, two) => one[0] - two[0] || one[1] - two[1]);
    let path = "";
    let best = Infinity;
    for (const [x, y] of points) {
      if (y >= best) continue;
      path += path ? `H${x}V${y}` : `M${x} ${y}`;
      best = y;
    }
    svg.querySelector(".front").setAttribute("d", path);
  }

  function update() {
    const shown = rows.filter((row) => {
      row.hidden = selects.some((one) => one.value && row.getAttribute("data-" + one.dataset.column) !== one.value);
      return !row.hidden;
    });
    document.getElementById("count").textContent = `${shown.length} of ${rows.length} rows`;
    const defenses = [...document.getElementById("by-defense").tBodies[0].rows];
    const summaries = new Map(defenses.map((row) => [row.dataset.defense, summary(shown, row.dataset.defense)]));
    for (const row of defenses) {
      const numbers = summaries.get(row.dataset.defense);
      row.hidden = !numbers;
      if (!numbers) continue;
      const texts = {
        der: numbers.der.toFixed(1),
        asr_after: numbers.asr_after.toFixed(1),
        acc_change: (numbers.acc_change < 0 ? "" : "+") + numbers.acc_change.toFixed(1),
        seconds: duration(numbers.seconds),
        memory: Number.isNaN(numbers.memory) ? "–" : numbers.memory.toFixed(0),
        n_rows: String(numbers.n_rows),
      };
      for (const [column, text] of Object.entries(texts)) cell(row, column).textContent = text;
    }
    const rating = (row) => (summaries.get(row.dataset.defense) || { der: -Infinity }).der;
    defenses.sort((one, two) => rating(two) - rating(one));
    document.getElementById("by-defense").tBodies[0].append(...defenses);
    const plots = [["acc-asr", "asr_after", "acc_change"], ["der-seconds", "seconds", "der"]];
    for (const [name, across, up] of plots) {
      const svg = document.getElementById(name);
      if (svg) draw(svg, summaries, across, up);
    }
  }

  function sort(heading) {
    const column = heading.dataset.column;
    const numeric = heading.classList.contains("number");
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    rows.sort((one, two) => {
      const first = cell(one, column).dataset.value;
      const second = cell(two, column).dataset.value;
      if (first === "" || second === "") return (first === "") - (second === "");
      return sign * (numeric ? Number(first) - Number(second) : first.localeCompare(second));
    });
    body.append(...rows);
  }

  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (heading) sort(heading);
  });
  form.addEventListener("change", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
})();
