// Draws the charts of the page in place of the static figures, once they come into view.
(async () => {
  const specifications = JSON.parse(document.getElementById("charts").textContent);
  const packed = document.getElementById("plotly").textContent.trim();
  if (!("DecompressionStream" in window)) return;
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(unpacked).text();
  document.head.append(library);

  const AXIS = 62, TOP = 10, ROW = 22, FONT = 13, SWATCH = 48, LETTER = 7.2;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Rows of a legend as wide as the figure: plotly gives all its entries the width of the widest.
  function legendRows(data, width) {
    const names = data.filter((t) => t.showlegend !== false && t.type !== "heatmap").map((t) => t.name || "");
    if (names.length < 2) return 0;
    const widest = Math.max(...names.map((n) => n.length)) * LETTER + SWATCH;
    return Math.ceil(names.length / Math.max(1, Math.floor(width / widest)));
  }

  function styled(specification, width) {
    const ink = colour("--ink"), line = colour("--line"), soft = colour("--soft");
    const data = specification.data.map((trace) => {
      const copy = { ...trace };
      if (trace.line?.color === "#1b1c1f") copy.line = { ...trace.line, color: ink };
      return copy;
    });
    const rows = legendRows(data, width);
    const axis = { gridcolor: line, linecolor: soft, tickcolor: soft, zeroline: false, automargin: true };
    const titled = (given = {}) => ({ ...axis, ...given, title: { ...given.title, font: { size: FONT }, standoff: 8 } });
    const layout = {
      ...specification.layout,
      xaxis: titled(specification.layout.xaxis),
      yaxis: titled(specification.layout.yaxis),
      font: { family: "system-ui, sans-serif", size: FONT, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 12, t: TOP, b: AXIS + rows * ROW },
      height: specification.height + TOP + AXIS + rows * ROW,
      width,
      hovermode: "closest",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: soft, font: { color: ink, size: FONT }, align: "left" },
      showlegend: rows > 0,
      legend: {
        orientation: "h", traceorder: "normal", x: 0, xanchor: "left", y: -AXIS / specification.height, yanchor: "top",
      },
      dragmode: false,
    };
    return { data, layout };
  }

  function draw(figure) {
    const place = figure.querySelector(".interactive");
    const specification = specifications[place.dataset.chart];
    const width = Math.floor(figure.querySelector(".drawing").clientWidth);
    if (!width) return;
    const { data, layout } = styled(specification, width);
    const hidden = place.data?.map((trace) => trace.visible);
    if (hidden) data.forEach((trace, i) => { trace.visible = hidden[i]; });
    window.Plotly.react(place, data, layout, { displayModeBar: false, responsive: false });
    place.dataset.width = width;
    figure.classList.add("drawn");
  }

  const figures = [...document.querySelectorAll("figure:has(.interactive)")];
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !entry.target.classList.contains("drawn")) draw(entry.target);
    }
  }, { rootMargin: "300px" });
  figures.forEach((figure) => seen.observe(figure));

  const again = () => figures.filter((f) => f.classList.contains("drawn")).forEach(draw);
  dark.addEventListener("change", again);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(again, 150); });
  document.documentElement.dataset.interactive = "ready";
})();
