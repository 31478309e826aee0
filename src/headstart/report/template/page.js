"use strict";
(() => {
  const root = document.documentElement;
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const resolve = (name) => {
    probe.style.color = "";
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const specs = new Map();
  for (const holder of document.querySelectorAll("script[data-figure]")) {
    specs.set(holder.dataset.figure, holder.textContent);
  }
  const chosen = new Map();

  /* Colours are the page's own, so that a figure follows light, dark and paper. */
  const scales = () => ({
    sequential: [[0, resolve("--sequential-low")], [0.55, resolve("--sequential-mid")], [1, resolve("--sequential-high")]],
    diverging: [[0, resolve("--diverging-low")], [0.5, resolve("--diverging-mid")], [1, resolve("--diverging-high")]],
  });
  const coloured = (text) => {
    const known = new Map();
    return text.replace(/var\((--[a-z0-9-]+)\)/g, (_, name) => {
      if (!known.has(name)) known.set(name, resolve(name));
      return known.get(name);
    });
  };
  const axis = (own, narrow) => ({
    gridcolor: resolve("--rule"), linecolor: resolve("--rule"), zerolinecolor: resolve("--quiet"), zerolinewidth: 1.5,
    zeroline: false, tickfont: { size: narrow ? 11 : 12 }, ticks: "", automargin: true, fixedrange: true,
    ...own, title: { standoff: 10, font: { size: 12, color: resolve("--soft") }, ...(own && own.title) },
  });
  const front = (data) => {
    const at = data.filter((t) => t.name !== "front").map((t) => [t.x[0], t.y[0]]).sort((a, b) => a[0] - b[0] || b[1] - a[1]);
    const line = data.find((t) => t.name === "front");
    line.x = []; line.y = [];
    let best = -Infinity;
    for (const [x, y] of at) if (y > best) { line.x.push(x); line.y.push(y); best = y; }
    line.x.push(at[at.length - 1][0]); line.y.push(best);
  };
  const describe = (id) => {
    const spec = JSON.parse(coloured(specs.get(id)));
    const place = document.getElementById(`plot-${id}`);
    const narrow = place.clientWidth < 480;
    const palette = scales();
    for (const trace of spec.data) {
      if (palette[trace.colorscale]) trace.colorscale = palette[trace.colorscale];
      if (trace.colorbar) trace.colorbar.tickfont = { size: 11 };
    }
    if (spec.choices) {
      const name = chosen.get(id) || Object.keys(spec.choices)[0];
      spec.choices[name].forEach((value, i) => { spec.data[i].x = [value]; });
      spec.layout.xaxis.title.text = name;
    }
    if (spec.layout.front) { front(spec.data); delete spec.layout.front; }
    if (narrow) for (const trace of spec.data) if (trace.colorbar) trace.showscale = false;
    const layout = {
      margin: { l: 52, r: 18, t: 12, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: resolve("--ink") },
      hoverlabel: { bgcolor: resolve("--ink"), bordercolor: resolve("--ink"), font: { color: resolve("--paper"), size: 12.5 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left", font: { size: 12 }, itemclick: "toggle" },
      dragmode: false, colorway: Array.from({ length: 12 }, (_, i) => resolve(`--m${i}`)), ...spec.layout,
      xaxis: axis(spec.layout.xaxis, narrow), yaxis: axis(spec.layout.yaxis, narrow),
    };
    return { place, data: spec.data, layout };
  };
  const config = { displayModeBar: false, responsive: true, displaylogo: false };
  const draw = (id) => {
    const { place, data, layout } = describe(id);
    return Plotly.react(place, data, layout, config).then(() => { place.dataset.drawn = "yes"; });
  };
  /* One after another, so that the page answers while it draws. */
  const drawAll = async () => {
    root.dataset.drawn = "no";
    for (const id of specs.keys()) {
      await draw(id);
      await new Promise((next) => setTimeout(next));
    }
    root.dataset.drawn = "yes";
  };

  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", drawAll);
  const toggle = document.getElementById("theme");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); drawAll(); });
  dark.addEventListener("change", label);
  label();

  addEventListener("beforeprint", () => {
    root.dataset.before = root.dataset.theme || "";
    root.dataset.theme = "light";
    for (const id of specs.keys()) draw(id);
  });
  addEventListener("afterprint", () => {
    if (root.dataset.before) root.dataset.theme = root.dataset.before; else delete root.dataset.theme;
    drawAll();
  });

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const words = head.classList.contains("words");
        const first = words || head.dataset.small !== undefined ? "ascending" : "descending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => (row.cells[column] ? row.cells[column].dataset.value ?? row.cells[column].textContent.trim() : "");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");   // what is not known stays at the end
          return sign * (words ? x.localeCompare(y) : Number(x) - Number(y));
        });
        table.tBodies[0].append(...rows);
        say(`Sorted by ${button.textContent.trim()}, ${order}.`);
      });
    });
  }
  const live = document.getElementById("live");
  const say = (text) => { live.textContent = text; };

  for (const select of document.querySelectorAll("select[data-for]")) {
    select.addEventListener("change", () => { chosen.set(select.dataset.for, select.value); draw(select.dataset.for); });
  }
  const save = (name, text, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const csv = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => `"${cell.innerText.trim().replace(/\s*\n\s*/g, " ").replace(/"/g, '""')}"`).join(",")).join("\n") + "\n";
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-do]");
    if (!button) return;
    const { do: what, for: id } = button.dataset;
    if (what === "svg" || what === "png") {
      const place = document.getElementById(`plot-${id}`);
      await Plotly.downloadImage(place, { format: what, filename: `headstart-${id}`, width: place.clientWidth, height: place.clientHeight, scale: what === "png" ? 2 : 1 });
    } else if (what === "csv") {
      save(`headstart-${id}.csv`, csv(document.getElementById(`table-${id}`)), "text/csv");
    } else if (what === "copy") {
      const text = document.getElementById(id).innerText;
      const was = button.textContent;
      try { await navigator.clipboard.writeText(text); }
      catch {
        const range = document.createRange();
        range.selectNodeContents(document.getElementById(id));
        getSelection().removeAllRanges(); getSelection().addRange(range);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      say("Copied.");
      setTimeout(() => { button.textContent = was; }, 1600);
    }
  });

  const links = new Map([...document.querySelectorAll("nav a[href^='#']")].map((a) => [a.getAttribute("href").slice(1), a]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("section[id]").forEach((section) => watch.observe(section));

  drawAll();
})();
