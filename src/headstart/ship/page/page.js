// The page: pictures in, a card for each out. Talks to its own server only, and keeps nothing but the key.

import { camera } from "./camera.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 4; // requests; the server puts them into one batch
const SHOWN = 3; // labels of a card before it is opened,
const FEW = 5; // unless there are few altogether
const PATIENCE = 6; // times to come again when the server is busy
const THUMB = 480; // pixels of a thumbnail's longer side

const state = { card: null, labels: [], waiting: [], busy: 0, show: "all", rows: [] };

// ------------------------------------------------------------------------------------------- the server

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

async function ask(path, options = {}) {
  for (let turn = 0; ; turn += 1) {
    const key = sessionStorage.getItem("key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    let reply;
    try {
      reply = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
    } catch {
      throw new Error("The server cannot be reached. Is it still running?");
    }
    if (reply.status === 401) { await askForKey(key); continue; }
    if (reply.status === 429 && turn < PATIENCE) {
      await pause(Number(reply.headers.get("Retry-After") ?? 1) + Math.random());
      continue;
    }
    const said = await reply.json().catch(() => ({ error: `The server answered ${reply.status}.` }));
    if (!reply.ok) throw new Error(said.error);
    return said;
  }
}

let asking = null;
function askForKey(tried) {
  if (tried && tried !== sessionStorage.getItem("key")) return Promise.resolve(); // another request has asked
  asking ??= new Promise((done) => {
    $("key-note").textContent = tried ? "This key is not the right one." : "Whoever runs it has given you one.";
    $("asking").showModal();
    $("asking").addEventListener("cancel", (event) => event.preventDefault());
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", $("key").value.trim());
      $("key").value = "";
      $("asking").close();
      asking = null;
      done();
    }, { once: true });
  });
  return asking;
}

// -------------------------------------------------------------------------------------------- the model

const whole = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });

/** A probability for people: never a flat 0 % or 100 %, which no model can know. */
function percent(share) {
  if (share >= 0.995) return ">99%";
  return share < 0.005 ? "<1%" : whole.format(share);
}

function fact(name, value, note) {
  if (value === null || value === undefined || value === "") return;
  const dt = document.createElement("dt");
  const dd = document.createElement("dd");
  dt.textContent = name;
  dd.textContent = value;
  if (note) { const small = document.createElement("small"); small.textContent = note; dd.append(small); }
  const pair = document.createElement("div");
  pair.append(dt, dd);
  $("facts").append(pair);
}

function describe(about, labels) {
  state.card = about;
  state.labels = labels;
  const made = about.card;
  const many = labels.length;
  $("lead").textContent = `See which of ${many} labels fits a picture best, and how sure the model is.`;
  const shown = many > 14 ? labels.slice(0, 12) : labels;
  $("classes").replaceChildren(...shown.map((label) => { const li = document.createElement("li"); li.textContent = label; return li; }));
  if (shown.length < many) {
    const rest = document.createElement("li");
    rest.className = "rest";
    rest.textContent = `and ${many - shown.length} more`;
    $("classes").append(rest);
  }
  $("taken").textContent = `JPEG, PNG, WebP and others, up to ${Math.floor(about.limits.bytes / 2 ** 20) || "<1"} MB each`;
  $("version").textContent = `headstart ${about.headstart}.`;

  $("facts").replaceChildren();
  const test = made.test ?? {};
  if (typeof test.accuracy === "number") {
    fact("Right on test pictures", fine.format(test.accuracy), `of ${test.n} pictures that it had never seen`);
  }
  const { threshold, wanted, val, test: trust } = about.calibration;
  if (threshold) {
    fact("Sure from", fine.format(threshold), wanted && `so that ${whole.format(wanted)} of the sure answers are right`);
    const mark = document.createElement("i");
    $("legend").replaceChildren(mark, `Below this mark, ${fine.format(threshold)}, an answer is “unsure”: ask a human.`);
  } else if (threshold === null) {
    $("legend").textContent = `Every answer is “unsure”: on the validation pictures no threshold reached ${whole.format(wanted)}. Ask a human.`;
  } else {
    $("legend").textContent = "This model was not given a threshold: no answer is marked “unsure”.";
  }
  $("legend").hidden = false;
  if (trust?.answered && trust.accuracy !== null) {
    const range = trust.interval ? `between ${whole.format(trust.interval[0])} and ${whole.format(trust.interval[1])}; ` : "";
    fact("Right when sure", fine.format(trust.accuracy), `${range}sure of ${whole.format(trust.answered)} of the test pictures`);
  }
  if (!val) fact("Probabilities", "Not calibrated", "they are the network's own, and mostly too high");
  fact("Labels", String(many), many <= 6 ? labels.join(", ") : null);
  fact("Network", made.model, made.method ? `tuned with ${made.method}` : null);
  fact("Learnt from", made.counts?.train && `${made.counts.train} pictures`);
  fact("Licence", made.licence, "inherited from the source weights");
  if (about.readme) { $("readme").replaceChildren(render(about.readme)); $("whole").hidden = false; }
}

// ----------------------------------------------------------------------------------------- the pictures

function take(files) {
  if (!files.length) return;
  $("results").hidden = false;
  for (const file of files) {
    const item = $("card").content.firstElementChild.cloneNode(true);
    item.querySelector(".name").textContent = file.name;
    item.querySelector(".name").title = file.name;
    $("cards").append(item);
    const row = { file, item, state: "waiting", said: null, error: null };
    state.rows.push(row);
    state.waiting.push(row);
  }
  $("said").textContent = files.length === 1 ? "One picture added." : `${files.length} pictures added.`;
  count();
  work();
}

function work() {
  while (state.busy < AT_ONCE && state.waiting.length) {
    state.busy += 1;
    look(state.waiting.shift()).finally(() => {
      state.busy -= 1;
      if (!state.busy && !state.waiting.length) sum();
      work();
    });
  }
}

async function look(row) {
  const drawn = thumbnail(row);
  try {
    const most = state.card?.limits.bytes;
    if (most && row.file.size > most) throw new Error(`Too large: at most ${Math.floor(most / 2 ** 20)} MB are taken.`);
    const body = new FormData();
    body.append("files", row.file, row.file.name);
    const said = await ask(`predict?top=${Math.max(1, Math.min(state.labels.length || 5, 100))}`, { method: "POST", body });
    tell(row, said.predictions[0]);
  } catch (error) {
    fail(row, error.message);
  }
  await drawn;
}

async function thumbnail(row) {
  const canvas = row.item.querySelector("canvas");
  try {
    const picture = await createImageBitmap(row.file);
    const scale = Math.min(1, THUMB / Math.max(picture.width, picture.height));
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff"; // where it is transparent: the network sees it on white too
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    picture.close();
    canvas.setAttribute("aria-label", row.file.name);
  } catch {
    canvas.hidden = true;
    const instead = row.item.querySelector(".no-thumb");
    instead.textContent = "No preview";
    instead.hidden = false;
  }
}

function bar({ label, probability }, mark) {
  const made = $("row").content.firstElementChild.cloneNode(true);
  made.querySelector(".row-label").textContent = label;
  made.querySelector(".row-label").title = label;
  made.querySelector(".row-share").textContent = percent(probability);
  made.querySelector(".fill").style.width = `${100 * probability}%`;
  if (mark) {
    made.querySelector(".mark").style.left = `${100 * mark}%`;
    made.querySelector(".mark").hidden = false;
  }
  return made;
}

function tell(row, said) {
  row.said = said;
  settle(row, said.unsure ? "unsure" : "sure");
  row.item.querySelector(".label-text").textContent = said.label;
  row.item.querySelector(".share").textContent = percent(said.probability);
  if (said.unsure) badge(row, "unsure: ask a human");
  const [first, more] = row.item.querySelectorAll(".bars");
  const shown = said.best.length <= FEW ? said.best.length : SHOWN;
  first.replaceChildren(...said.best.slice(0, shown).map((each, index) => bar(each, index === 0 && state.card?.calibration.threshold)));
  if (said.best.length > shown) {
    more.replaceChildren(...said.best.map((each) => bar(each)));
    row.item.querySelector(".more").hidden = false;
    row.item.querySelector("summary").textContent = said.best.length < state.labels.length ? `The first ${said.best.length} labels` : `All ${said.best.length} labels`;
  }
}

function fail(row, sentence) {
  const start = `${row.file.name}: `;
  const said = sentence.startsWith(start) ? sentence.slice(start.length) : sentence;
  row.error = said.charAt(0).toUpperCase() + said.slice(1);
  settle(row, "error");
  row.item.querySelector(".label-text").textContent = "Not read";
  badge(row, row.error);
}

function badge(row, text) {
  const made = row.item.querySelector(".badge");
  made.textContent = text;
  made.hidden = false;
}

function settle(row, now) {
  row.state = now;
  row.item.dataset.state = now;
  count();
}

// ------------------------------------------------------------------------------------------ the results

function count() {
  const many = { all: state.rows.length, sure: 0, unsure: 0, error: 0, waiting: 0 };
  for (const row of state.rows) {
    many[row.state] += 1;
    row.item.hidden = state.show !== "all" && row.state !== state.show;
  }
  for (const button of $("filters").children) {
    button.querySelector("b").textContent = many[button.dataset.show];
    button.setAttribute("aria-pressed", String(button.dataset.show === state.show));
  }
  $("nothing").hidden = state.rows.some((row) => !row.item.hidden);
  $("save").disabled = many.all === many.waiting;
}

function sum() {
  const of = (kind) => state.rows.filter((row) => row.state === kind).length;
  $("said").textContent = `Done: ${of("sure")} sure, ${of("unsure")} unsure, ${of("error")} not read.`;
}

function save() {
  const quote = (value) => {
    const text = String(value ?? "");
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text; // a spreadsheet would run it as a formula
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const lines = [["name", "label", "probability", "unsure", "error"]];
  for (const { file, said, error } of state.rows) {
    if (said || error) lines.push([file.name, said?.label, said?.probability.toFixed(6), said ? String(said.unsure) : "", error]);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.map((line) => line.map(quote).join(",")).join("\r\n") + "\r\n"], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function clear() {
  state.rows = [];
  state.waiting = [];
  state.show = "all";
  $("cards").replaceChildren();
  $("results").hidden = true;
  $("said").textContent = "Cleared.";
  $("files").focus();
}

// --------------------------------------------------------------------------------------------- the start

const carries = (event) => event.dataTransfer?.types.includes("Files");
let depth = 0;
addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; $("drop").classList.add("over"); } });
addEventListener("dragleave", (event) => { if (carries(event)) { depth -= 1; if (depth <= 0) { depth = 0; $("drop").classList.remove("over"); } } });
addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  depth = 0;
  $("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => take([...(event.clipboardData?.files ?? [])]));
$("files").addEventListener("change", () => { take([...$("files").files]); $("files").value = ""; });
$("filters").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) { state.show = button.dataset.show; count(); }
});
$("save").addEventListener("click", save);
$("clear").addEventListener("click", clear);
camera(take);

const here = new URL(".", location.href).href;
$("curl").textContent = `curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' ${here}predict\ncurl -F files=@one.jpg -F files=@two.jpg ${here}predict\ncurl ${here}labels`;

try {
  const [about, { labels }] = await Promise.all([ask("card"), ask("labels")]);
  describe(about, labels);
} catch (error) {
  $("down").textContent = error.message;
  $("down").hidden = false;
}
