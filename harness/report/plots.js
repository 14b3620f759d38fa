// Unpack Plotly, which the page carries compressed, and draw each plot from the JSON beside it, in the page's colours.
(function () {
  "use strict";
  var printing = false;
  var dark = window.matchMedia("(prefers-color-scheme: dark)");

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function theme(layout) {
    var themed = JSON.parse(JSON.stringify(layout));
    var size = printing ? 10 : window.innerWidth < 600 ? 12 : 13;
    themed.font = { family: colour("--font"), size: size, color: colour("--muted") };
    themed.hoverlabel = {
      bgcolor: colour("--card"), bordercolor: colour("--line"), align: "left",
      font: { family: colour("--font"), size: size, color: colour("--ink") }
    };
    Object.keys(themed).filter(function (key) { return /^[xy]axis/.test(key); }).forEach(function (axis) {
      themed[axis].gridcolor = colour("--grid");
      themed[axis].zerolinecolor = colour("--muted");
      themed[axis].title.font = { size: size };
    });
    // Only labels of limits have a colour of their own; the mid-tone of their line is too faint for letters.
    (themed.annotations || []).forEach(function (label) {
      if (label.font && label.font.color) { label.font.color = colour("--missed"); }
    });
    return themed;
  }

  function unpack(id) {
    var packed = atob(document.getElementById(id).textContent);
    var bytes = Uint8Array.from(packed, function (letter) { return letter.charCodeAt(0); });
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function run(code) {
    var script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
  }

  function refuse() {
    document.querySelectorAll(".plot").forEach(function (place) {
      place.textContent = "This browser cannot draw the plot; a newer one can, and the tables hold its figures.";
    });
  }

  function draw() {
    if (!window.Plotly) { return; }
    document.querySelectorAll(".plot").forEach(function (place) {
      if (place.closest("details:not([open])")) { return; } // folded: drawn when it is opened
      var figure = JSON.parse(document.getElementById("data-" + place.id).textContent);
      Plotly.react(place, figure.data, theme(figure.layout), { displayModeBar: false, responsive: true });
    });
  }

  // Paper has no clicks: what is folded is opened for it, and folded again afterwards.
  function print(begins) {
    printing = begins;
    document.documentElement.classList.toggle("printing", printing);
    document.querySelectorAll(begins ? "details:not([open])" : "details[data-folded]").forEach(function (part) {
      part.open = begins;
      part.toggleAttribute("data-folded", begins);
    });
    draw();
  }

  if (window.innerWidth <= 760) {
    document.querySelectorAll("details.long").forEach(function (part) { part.open = false; });
  }
  document.querySelectorAll("details").forEach(function (part) {
    part.addEventListener("toggle", function () { if (part.open && part.querySelector(".plot")) { draw(); } });
  });

  if (window.DecompressionStream) { unpack("plotly").then(run).then(draw); } else { refuse(); }
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", function () { print(true); });
  window.addEventListener("afterprint", function () { print(false); });
})();
