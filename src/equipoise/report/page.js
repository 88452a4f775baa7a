// Draws the pictures of the page. Colours are CSS variables, so that both themes and every picture share them.
(function () {
  "use strict";

  const { looks, plots } = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset+autosize" };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  // Five colours, the middle one at 1: what is balanced fades into the page.
  function heatColours(trace) {
    const balanced = (1 - trace.zmin) / (trace.zmax - trace.zmin);
    const places = [0, balanced / 2, balanced, (1 + balanced) / 2, 1];
    return places.map((place, index) => [place, colour("--heat-" + (index + 1))]);
  }

  function paintHeatMap(trace) {
    const gap = trace.z[0].length > 40 ? 0 : 2;
    return {
      ...trace,
      xgap: gap,
      ygap: gap,
      colorscale: heatColours(trace),
      text: trace.z.map((row, index) => row.map(() => trace.meta.rows[index])),
    };
  }

  function paintLine(trace) {
    const { method, band } = trace.meta;
    const paint = colour(looks[method].colour);
    return {
      ...trace,
      visible: !hidden.has(method),
      fillcolor: paint + "2e", // hexadecimal opacity
      line: { color: paint, dash: looks[method].dash, width: band ? 0 : 2 },
      marker: { color: paint, size: 5 },
    };
  }

  function paintAxis(axis) {
    return {
      gridcolor: colour("--rule"),
      linecolor: colour("--rule"),
      zerolinecolor: colour("--rule"),
      tickcolor: colour("--rule"),
      automargin: true,
      fixedrange: coarse.matches, // a finger on a picture scrolls the page
      ...axis,
      title: { standoff: 12, font: { size: 13 }, ...axis.title },
    };
  }

  function paintLayout(layout) {
    const muted = colour("--muted");
    return {
      ...layout,
      margin: { l: 8, r: layout.annotations ? 44 : 12, t: 10, b: 8 }, // on the right: the words beside the floor
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false,
      dragmode: coarse.matches ? false : "zoom",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: muted },
      hoverlabel: {
        bgcolor: colour("--page"),
        bordercolor: colour("--rule"),
        font: { color: colour("--ink"), size: 13 },
        align: "left",
      },
      shapes: (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: muted, width: 1.5 } })),
      xaxis: paintAxis(layout.xaxis),
      yaxis: paintAxis(layout.yaxis),
    };
  }

  // The key of a view: what the picture's controls say, in their order.
  function key(figure) {
    const controls = figure.querySelectorAll("select, input:checked");
    return Array.from(controls, (control) => control.value).join("/");
  }

  function draw(figure) {
    const div = figure.querySelector(".plot");
    const plot = plots[div.id];
    const view = plot.views[key(figure)];
    const traces = view.traces.map((trace) => ({ ...plot.trace, ...trace }));
    const paint = plot.trace.type === "heatmap" ? paintHeatMap : paintLine;
    const layout = paintLayout({ ...plot.layout, ...view.layout });
    return Plotly.react(div, traces.map(paint), layout, config);
  }

  const figures = Array.from(document.querySelectorAll("figure"));
  const drawAll = () => figures.forEach(draw);

  function toggle(method) {
    if (!hidden.delete(method)) hidden.add(method);
    document.querySelectorAll(".legend button").forEach((button) => {
      button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.method)));
    });
    drawAll();
  }

  document.querySelectorAll(".legend button").forEach((button) => {
    button.addEventListener("click", () => toggle(button.dataset.method));
  });
  figures.forEach((figure) => figure.addEventListener("change", () => draw(figure)));
  dark.addEventListener("change", drawAll);
  drawAll();
})();
