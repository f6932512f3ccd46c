// The plots and the threshold explorer of the report. All data come from the JSON in the page.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plots = data.plots;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // The slider's position: {threshold, far, frr}; null without a slider.
  let moved = null;

  function layout(x, y, more = {}) {
    const axis = (about) => ({
      gridcolor: css("line"), linecolor: css("line"), zeroline: false, automargin: true, fixedrange: true, ...about,
    });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("ink"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 52, r: 12, t: 28, b: 44 }, hovermode: "closest", dragmode: false,
      legend: { orientation: "h", x: 0, y: 1.12 }, showlegend: true,
      xaxis: axis(x), yaxis: axis(y), ...more,
    };
  }
  const upright = (x, line = {}) => ({
    type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: css("ink"), width: 1.5, dash: "dot", ...line },
  });
  const level = (y) => ({ ...upright(y), yref: "y", xref: "paper", x0: 0, x1: 1, y0: y, y1: y });
  const decades = { type: "log", exponentformat: "power", dtick: 1 };
  const middles = (edges) => edges.slice(1).map((edge, at) => (edge + edges[at]) / 2);

  function bars(id, histogram, title, shapes) {
    const traces = Object.entries(histogram.counts).map(([kind, counts]) => ({
      type: "bar", name: kind, x: middles(histogram.edges), y: counts.map((count) => count || null),
      width: histogram.edges[1] - histogram.edges[0], marker: { color: css(kind), opacity: 0.6 },
      hovertemplate: `%{x:.3f}: %{y} ${kind}<extra></extra>`,
    }));
    const most = Math.max(1, ...Object.values(histogram.counts).flat());
    const low = histogram.edges[0], high = histogram.edges[histogram.edges.length - 1];
    draw(id, traces, layout({ title: { text: title }, range: [low, high] }, { title: { text: "pairs" }, ...decades, range: [-0.3, Math.log10(most) + 0.15] },
      { barmode: "overlay", shapes }));
  }

  function histograms() {
    const { probability, similarity } = plots.histograms;
    const slider = moved ? [upright(moved.threshold, { color: css("slider"), width: 2, dash: "solid" })] : [];
    if (probability) bars("probability", probability, "probability that a pair shows two people", [...slider, upright(data.threshold)]);
    if (similarity) bars("similarity", similarity, "similarity", []);
  }

  function curves() {
    const { far, frr, here, floor } = plots.curves;
    const { roc, det } = dots();
    const above = (values, least) => values.map((value) => Math.max(value, least));
    const lowest = Math.log10(floor[0]) - 0.1;
    const point = ([x, y], name, marker) => ({
      type: "scatter", mode: "markers", name, x: [x], y: [y],
      marker: { size: 11, color: css("ink"), line: { color: css("paper"), width: 2 }, ...marker },
    });
    const slider = (at) => moved ? [point(at, "slider", { size: 13, color: css("slider"), symbol: "diamond" })] : [];
    const line = (x, y, name) => ({
      type: "scatter", mode: "lines", name, x, y, line: { color: css("run"), width: 2.5 },
    });
    const x = { title: { text: "false accept rate" }, ...decades, range: [lowest, 0.02] };
    const accepted = frr.map((value) => 1 - value);
    draw("roc", [line(above(far, floor[0]), accepted, "ROC"), point([Math.max(here[0], floor[0]), 1 - here[1]], "run"), ...slider(roc)],
      layout(x, { title: { text: "true accept rate" }, range: [Math.min(0.9, ...accepted.filter((_, at) => far[at] > 0)) - 0.02, 1.01] }));
    draw("det", [line(above(far, floor[0]), above(frr, floor[1]), "DET"), point(here.map((rate, at) => Math.max(rate, floor[at])), "run"), ...slider(det)],
      layout(x, { title: { text: "false reject rate" }, ...decades, range: [Math.log10(floor[1]) - 0.1, 0.02] }));
  }

  // The slider's point on both curves.
  function dots() {
    const { here, floor } = plots.curves, { far, frr } = moved || { far: here[0], frr: here[1] };
    const x = Math.max(far, floor[0]);
    return { roc: [x, 1 - frr], det: [x, Math.max(frr, floor[1])] };
  }

  function follow() {
    const histogram = plots.histograms && plots.histograms.probability;
    if (histogram) Plotly.relayout("plot-probability", { "shapes[0].x0": moved.threshold, "shapes[0].x1": moved.threshold });
    if (!plots.curves) return;
    for (const [name, [x, y]] of Object.entries(dots())) Plotly.restyle(`plot-${name}`, { x: [[x]], y: [[y]] }, [2]);
  }

  function calibration() {
    const { mean, share, low, high, pairs } = plots.calibration;
    const largest = Math.log10(Math.max(...pairs) + 1);
    draw("calibration", [
      { type: "scatter", mode: "lines", name: "perfect calibration", x: [0, 1], y: [0, 1], line: { color: css("quiet"), dash: "dash", width: 1 }, hoverinfo: "skip" },
      { type: "scatter", mode: "markers", name: "this run", x: mean, y: share, customdata: pairs,
        error_y: { type: "data", symmetric: false, array: share.map((value, at) => high[at] - value),
          arrayminus: share.map((value, at) => value - low[at]), color: css("quiet"), thickness: 1, width: 3 },
        marker: { size: pairs.map((count) => 6 + 14 * Math.log10(count + 1) / largest), color: css("run"), opacity: 0.85 },
        hovertemplate: "mean probability %{x:.3f}, share different %{y:.3f}<br>%{customdata} pairs<extra></extra>" },
    ], layout({ title: { text: "mean probability" }, range: [-0.06, 1.06] }, { title: { text: "share of different pairs" }, range: [-0.06, 1.06] }));
  }

  function drift() {
    const { edges, shares } = plots.drift;
    const least = Math.min(1, ...Object.values(shares).flat().filter((value) => value > 0)) / 2;
    const colours = { new: css("run"), reference: css("quiet") };
    draw("drift", Object.entries(shares).map(([name, values]) => ({
      type: "scatter", mode: "lines", line: { shape: "hvh", color: colours[name], width: 2, dash: name === "new" ? "solid" : "dot" },
      name, x: middles(edges), y: values.map((value) => Math.max(value, least)),
    })), layout({ title: { text: "probability" }, range: [0, 1] }, { title: { text: "share of pairs" }, ...decades, range: [Math.log10(least), 0.05] }));
  }

  function scatter() {
    const { truth, reference, threshold } = plots.scatter;
    const kinds = [["same", 0], ["different", 1], ["unknown", -1]].filter(([, code]) => truth.includes(code));
    draw("scatter", kinds.map(([name, code]) => ({
      type: "scatter", mode: "markers", name, marker: { color: css(name), size: 5, opacity: 0.6 },
      x: reference.filter((_, at) => truth[at] === code), y: plots.scatter.new.filter((_, at) => truth[at] === code),
    })), layout({ title: { text: "probability, reference" }, range: [-0.02, 1.02] }, { title: { text: "probability, new" }, range: [-0.02, 1.02] },
      { shapes: [upright(threshold[1]), level(threshold[0])] }));
  }

  // A place for each column of --quality; intervals as shades.
  function discards() {
    plots.discards.forEach((about, index) => {
      if (!about) return;
      const x = about.shares.map((share) => 100 * share);
      const shade = (name, colour) => {
        const known = about.intervals[name].map((span, at) => [x[at], span]).filter(([, span]) => span);
        const back = [...known].reverse();
        return { type: "scatter", mode: "lines", x: [...known, ...back].map(([share]) => share), y: [...known.map(([, span]) => span[0]), ...back.map(([, span]) => span[1])],
          fill: "toself", fillcolor: `${css(colour)}30`, line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      };
      const line = (name, y, more) => ({ type: "scatter", mode: "lines", name, x, y, hovertemplate: "%{x} %: %{y:.5f}<extra></extra>", line: { width: 2.5, ...more } });
      const traces = [shade("fnmr", "same"), shade("fmr", "different"), line("FNMR", about.fnmr, { color: css("same") }), line("FMR", about.fmr, { color: css("different") })];
      if (about.at_fmr) traces.push(line(`FNMR at FMR ${about.at_fmr.fmr}`, about.at_fmr.fnmr, { color: css("run"), dash: "dash" }));
      draw(`discards-${index + 1}`, traces, layout({ title: { text: "pairs discarded, %" }, range: [0, x[x.length - 1]] },
        { title: { text: "error rate" }, rangemode: "tozero" }, { shapes: about.fnmr[0] === null ? [] : [level(about.fnmr[0])] }));
    });
  }

  function draw(id, traces, about) {
    const place = document.getElementById(`plot-${id}`);
    if (place) Plotly.react(place, traces, about, { displayModeBar: false, responsive: true });
  }

  function drawAll() {
    for (const [name, drawing] of Object.entries({ histograms, curves, calibration, drift, scatter, discards })) {
      // One plot that fails must not stop the others.
      try { if (plots[name]) drawing(); } catch (error) { console.error(name, error); }
    }
  }

  function explore() {
    const about = plots.explorer, slider = document.getElementById("threshold");
    if (!about || !slider) return;
    const number = new Intl.NumberFormat("en");
    const share = (part, whole) => {
      if (!whole) return "–";
      return part && part / whole < 1e-4 ? (part / whole).toPrecision(3) : (part / whole).toFixed(5);
    };
    const say = (id, text) => { const place = document.getElementById(`explore-${id}`); if (place) place.textContent = text; };
    function update() {
      // The grid's values, given as --threshold, make the same verdicts.
      const at = Number(slider.value), { accepted, totals } = about, threshold = about.grid[at];
      const missed = accepted.different[at], found = totals.different - missed;
      const rejected = totals.same - accepted.same[at], known = totals.same + totals.different;
      const below = accepted.same[at] + missed + accepted.unknown[at];
      document.getElementById("threshold-value").textContent = String(threshold);
      slider.setAttribute("aria-valuetext", `threshold ${threshold}`);
      moved = { threshold, far: missed / totals.different, frr: rejected / totals.same };
      say("far", share(missed, totals.different));
      say("frr", share(rejected, totals.same));
      say("f1", totals.same && totals.different ? share(2 * found, 2 * found + missed + rejected) : "–");
      say("accuracy", share(known - missed - rejected, known));
      say("precision", share(found, found + rejected));
      say("recall", share(found, totals.different));
      say("false-accepts", number.format(missed));
      say("false-rejects", number.format(rejected));
      say("called-same", number.format(below));
      say("called-different", number.format(known + totals.unknown - below));
    }
    let waiting = false;
    function move() {
      update();
      // Plots are redrawn at most once per frame.
      if (!waiting) requestAnimationFrame(() => { waiting = false; follow(); });
      waiting = true;
    }
    slider.addEventListener("input", move);
    document.getElementById("threshold-reset").addEventListener("click", () => { slider.value = about.start; move(); });
    slider.value = about.start;
    update();
  }

  // The arrow keys move from pair to pair.
  function walk(event) {
    const card = event.target.closest ? event.target.closest(".gallery li") : null;
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!card || !step || !card[step]) return;
    event.preventDefault();
    card[step].focus();
  }

  // Tab stops once in a gallery, at the pair last focused.
  function rove(event) {
    const card = event.target.closest ? event.target.closest(".gallery li") : null;
    if (!card) return;
    for (const each of card.parentElement.children) each.tabIndex = each === card ? 0 : -1;
  }

  // The plots as files, for `evaluate --plots`: data URLs by name, left in the page.
  async function images() {
    const found = {};
    for (const place of document.querySelectorAll("div.plot")) {
      const figure = { data: place.data, layout: { ...place.layout, autosize: false, paper_bgcolor: css("paper") } };
      const name = place.id.replace("plot-", ""), size = { width: 720, height: 440 };
      found[`${name}.svg`] = await Plotly.toImage(figure, { format: "svg", ...size });
      found[`${name}.png`] = await Plotly.toImage(figure, { format: "png", scale: 2, ...size });
    }
    const left = document.createElement("script");
    Object.assign(left, { type: "application/json", id: "images", textContent: JSON.stringify(found) });
    document.body.append(left);
  }

  // For paper: all that is no wider than the paper is open, and there is no slider.
  function print() {
    document.documentElement.classList.add("print");
    for (const each of document.querySelectorAll("details")) {
      each.open = true;
      each.open = [...each.querySelectorAll("table")].every((table) => table.scrollWidth <= document.body.clientWidth);
    }
  }

  document.addEventListener("keydown", walk);
  document.addEventListener("focusin", rove);
  dark.addEventListener("change", drawAll);
  if (location.hash === "#print") print();
  if (!["#print", "#images"].includes(location.hash)) explore();
  drawAll();
  if (location.hash === "#images") images();
  document.documentElement.dataset.ready = "yes";
})();
