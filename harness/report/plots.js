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
    ["xaxis", "yaxis"].forEach(function (axis) {
      themed[axis].gridcolor = colour("--grid");
      themed[axis].zerolinecolor = colour("--muted");
      themed[axis].title.font = { size: size };
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
      var figure = JSON.parse(document.getElementById("data-" + place.id).textContent);
      Plotly.react(place, figure.data, theme(figure.layout), { displayModeBar: false, responsive: true });
    });
  }

  function print(begins) {
    printing = begins;
    document.documentElement.classList.toggle("printing", printing);
    draw();
  }

  if (window.DecompressionStream) { unpack("plotly").then(run).then(draw); } else { refuse(); }
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", function () { print(true); });
  window.addEventListener("afterprint", function () { print(false); });
})();
