// The live view: asks /debug/engine a few times a second and draws what it says. Draws nothing while hidden or paused.
import { $, call } from "/page/common.js";
import { bars, histogram, lines, pool, timeline } from "/page/draw.js";

const POLL_MS = 400;
const KEPT = 150; // samples of running and waiting
const PHASES = { schedule: "schedule", build: "build batch", dispatch: "dispatch", grammar: "grammar", wait: "wait for device", commit: "commit", no_work: "no work" };
const samples = [];
const recent = []; // the last steps, also those that have left the timeline's window
let last = null;
let paused = false;

function legend() {
  const entries = [...Object.entries(PHASES), ["decode", "decode step"], ["prompt", "prompt step"]];
  $("legend").replaceChildren(...entries.map(([name, text]) => {
    const item = document.createElement("li");
    const mark = document.createElement("i");
    mark.className = `i-${name}`;
    item.append(mark, text);
    return item;
  }));
}

function tiles(view) {
  const { gauges, figures } = view;
  const before = samples.findLast((sample) => sample.now < view.now - 1.5) ?? samples[0];
  const seconds = Math.max(1e-3, view.now - before.now);
  const rate = (name) => (figures[name] - before.figures[name]) / seconds;
  const idle = Object.entries(figures.device_idle_seconds)
    .filter(([cause]) => cause !== "no_work")
    .reduce((sum, [cause, value]) => sum + value - before.figures.device_idle_seconds[cause], 0);
  const batched = rate("batched_tokens");
  const values = {
    "running": gauges.running, "waiting": gauges.waiting,
    "output tokens/s": rate("generated_tokens").toFixed(1), "steps/s": rate("steps").toFixed(1),
    "padding": batched ? `${(100 * rate("padding_tokens") / batched).toFixed(0)} %` : "–",
    "idle, with work": `${(100 * idle / seconds).toFixed(1)} %`,
    "KV pages": `${gauges.used_pages} / ${gauges.num_pages}`,
    "in flight": `${gauges.inflight_steps} / ${gauges.max_inflight_steps}`,
    "preemptions": figures.preemptions, "late compiles": figures.compiles_after_ready,
  };
  $("tiles").replaceChildren(...Object.entries(values).map(([name, value]) => {
    const tile = document.createElement("div");
    tile.className = "tile";
    const strong = document.createElement("b");
    strong.textContent = value;
    const label = document.createElement("span");
    label.textContent = name;
    tile.append(strong, label);
    return tile;
  }));
}

function causes(view, seconds) {
  const sums = {};
  for (const [start, end, cause] of view.idle) sums[cause] = (sums[cause] ?? 0) + end - start;
  const told = Object.entries(sums).filter(([, sum]) => sum > 1e-4).sort((a, b) => b[1] - a[1])
    .map(([cause, sum]) => `${PHASES[cause]} ${(1000 * sum).toFixed(1)} ms`);
  const text = told.length ? `Device idle in the last ${seconds} s: ${told.join(", ")}` : "No gap between steps in view.";
  $("causes").textContent = text;
  $("timeline").setAttribute("aria-label", `${view.steps.length} steps. ${text}`);
}

function draw(view) {
  const seconds = Number($("window").value);
  timeline($("timeline"), view, seconds);
  causes(view, seconds);
  tiles(view);
  lines($("load"), samples.map((sample) => [sample.gauges.running, sample.gauges.waiting]), ["running", "waiting"]);
  bars($("fill"), recent);
  histogram($("ttft"), view.histograms.time_to_first_token);
  histogram($("itl"), view.histograms.inter_token);
  pool($("pool"), view.pages);
  const pages = view.pages.per_cell === 1 ? "blue: kept for its prefix; with a mark: shared" : `a cell is ${view.pages.per_cell} pages`;
  $("pool-caption").textContent = `KV pool: ${view.gauges.used_pages} of ${view.gauges.num_pages} pages in use (${view.limits.page_size} tokens each); ${pages}`;
}

function status(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function poll() {
  if (document.hidden || paused) return;
  try {
    last = await (await call(`/debug/engine?seconds=${$("window").value}`)).json();
    samples.push(last);
    if (samples.length > KEPT) samples.shift();
    for (const sample of samples.slice(0, -1)) sample.host = sample.steps = sample.idle = sample.pages = null;
    recent.push(...last.steps.filter((step) => step.number > (recent.at(-1)?.number ?? -1)));
    recent.splice(0, recent.length - 60);
    $("model").textContent = `${last.model} · ${last.limits.scheduling} · up to ${last.limits.max_num_seqs} sequences, ${last.limits.max_num_batched_tokens} tokens a step`;
    status(last.draining ? "shutting down" : "ready", last.draining);
    draw(last);
  } catch (error) {
    status(error instanceof TypeError ? "no connection" : error.message, true);
  }
}

async function run() {
  await poll();
  setTimeout(run, POLL_MS);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").textContent = paused ? "Go on" : "Pause";
  $("pause").setAttribute("aria-pressed", String(paused));
});
$("window").addEventListener("change", poll);
$("theme").addEventListener("click", () => last && draw(last));
window.addEventListener("resize", () => last && draw(last));
$("trace").addEventListener("click", async (event) => { // with the key, which a plain link would not send
  event.preventDefault();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await call("/debug/trace")).blob());
  link.download = "jax-engine-trace.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
legend();
run();
