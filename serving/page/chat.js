// The chat: sends what is typed, shows the answer as it comes, measures it. Knows nothing of the engine view.
import { $, call } from "/page/common.js";

const history = [];
let stopping = null;
let measured = []; // the answers under way, one per stream

function show(role, text) {
  const node = document.createElement("div");
  node.className = `message ${role}`;
  node.textContent = text;
  $("messages").append(node);
  $("messages").scrollTop = $("messages").scrollHeight;
  return node;
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function body() {
  const common = {
    temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
    max_tokens: number("max_tokens"), seed: number("seed"), stream: true, stream_options: { include_usage: true },
  };
  if ($("mode").value === "text") return ["/v1/completions", { ...common, prompt: history.at(-1).content }];
  const system = $("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return ["/v1/chat/completions", { ...common, messages: [...opening, ...history] }];
}

// Yields the JSON of each event of a server-sent stream.
async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of response.body) {
    const frames = (rest + decoder.decode(bytes, { stream: true })).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (frame.startsWith("data: ") && frame !== "data: [DONE]") yield JSON.parse(frame.slice(6));
    }
  }
}

// One answer into `node`; returns its text and what was measured.
async function answer(node, path, request, signal) {
  const began = performance.now();
  const found = { text: "", tokens: 0, first: null, began, ended: began };
  measured.push(found);
  const response = await call(path, { method: "POST", body: JSON.stringify(request), signal });
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) found.tokens = event.usage.completion_tokens;
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    found.ended = performance.now();
    if (!piece) continue;
    found.first ??= found.ended;
    found.text += piece;
    if (!event.usage) found.tokens += 1;
    const atEnd = $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 40;
    node.textContent = found.text;
    if (atEnd) $("messages").scrollTop = $("messages").scrollHeight;
    tell(measured);
  }
  return found;
}

function tell(all) {
  const begun = all.filter((one) => one.first !== null);
  if (!begun.length) return;
  const tokens = begun.reduce((sum, one) => sum + one.tokens, 0);
  const seconds = (Math.max(...begun.map((one) => one.ended)) - Math.min(...begun.map((one) => one.first))) / 1000;
  const first = Math.max(...begun.map((one) => one.first - one.began));
  const rate = seconds > 0 ? `${(tokens / seconds).toFixed(1)} tokens/s, ` : "";
  $("rate").textContent = `${tokens} tokens, ${rate}first after ${first.toFixed(0)} ms`;
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
}

async function send(text) {
  history.push({ role: "user", content: text });
  show("user", text);
  busy(true);
  stopping = new AbortController();
  measured = [];
  const [path, request] = body();
  const count = Math.max(1, number("streams") ?? 1);
  const nodes = Array.from({ length: count }, () => show("assistant", "…"));
  try {
    const done = await Promise.all(nodes.map((node) => answer(node, path, request, stopping.signal)));
    tell(done);
    history.push({ role: "assistant", content: done[0].text });
  } catch (error) {
    if (error.name === "AbortError") {
      const kept = nodes[0].textContent === "…" ? "" : nodes[0].textContent;
      history.push({ role: "assistant", content: kept });
      $("rate").textContent += " (stopped)";
    } else {
      stopping.abort();
      history.pop();
      show("error", error.message);
    }
    for (const node of nodes) if (node.textContent === "…") node.remove();
  } finally {
    busy(false);
    $("input").focus();
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || $("send").disabled) return;
  $("input").value = "";
  send(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stopping?.abort());
$("stop").addEventListener("click", () => stopping?.abort());
$("clear").addEventListener("click", () => {
  stopping?.abort();
  history.length = 0;
  $("messages").replaceChildren();
  $("rate").textContent = "";
  $("input").focus();
});
$("input").focus();
