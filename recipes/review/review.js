const $ = id => document.getElementById(id);
const {key, place, count} = document.body.dataset;
const fields = [...document.querySelectorAll("[name]")];
const shown = fields.map(field => field.value);  // as this page was sent
let busy = false;

// What is written but not decided yet outlives a reload and a closed tab.
function keep() {
  const written = fields.map((field, i) => field.value === shown[i] ? null : field.value);
  if (written.every(text => text === null)) localStorage.removeItem(key);
  else localStorage.setItem(key, JSON.stringify({shown, written}));
  $("state").textContent = written.some(text => text !== null) ? "changed, not stored yet" : $("state").dataset.stored;
}
$("state").dataset.stored = $("state").textContent;
const kept = JSON.parse(localStorage.getItem(key) ?? "null");
if (kept && kept.written.length === fields.length) {
  kept.written.forEach((text, i) => { if (text !== null) fields[i].value = text });
  if (kept.written.some((text, i) => text !== null && kept.shown[i] !== shown[i]))
    $("problem").textContent = "another reviewer has changed this since you began; yours is shown";
  keep();
}
fields.forEach(field => field.addEventListener("input", keep));

// Only what this reviewer changed is sent, so that an accept never undoes another's edit.
function changes() {
  const said = {note: $("note").value};
  fields.forEach((field, i) => {
    if (field.value === shown[i] || field.name === "note") return;
    if (field.name === "query") (said.queries ??= {})[field.dataset.number] = field.value;
    else if (field.name === "rubric") said.rubric = field.value.split("\n").filter(line => line.trim());
    else said[field.name] = field.value;
  });
  return said;
}

function go(to) { if (to >= 1 && to <= +count) location.href = `./${to}` }

async function decide(decision, reason) {
  if (busy) return;
  busy = true;
  try {
    const body = JSON.stringify({decision, reason, ...changes()});
    const reply = await fetch(location.pathname, {method: "POST", body});
    const text = await reply.text();
    if (!reply.ok) throw Error(text);
    localStorage.removeItem(key);
    sessionStorage.setItem("last", place);
    if (text) go(+text); else location.reload();
  } catch (error) {
    $("problem").textContent = `not stored: ${error.message}`;
    if (reason === "other") $("note").focus();
    busy = false;
  }
}

$("accept").onclick = () => decide("accept");
document.querySelectorAll("[data-reason]").forEach(button =>
  button.onclick = () => decide("reject", button.dataset.reason));
$("back").onclick = () => go(+place - 1);
$("forth").onclick = () => go(+place + 1);
$("undo").onclick = () => go(+sessionStorage.getItem("last"));

const keys = {
  a: () => decide("accept"),
  r: () => $("reasons").classList.toggle("asked"),
  e: () => document.querySelector("[name=query]")?.focus(),
  n: () => $("note").focus(),
  d: () => { const field = document.querySelector("[name=domain]");
    field.selectedIndex = (field.selectedIndex + 1) % field.length; keep() },
  u: () => $("undo").onclick(),
  ArrowLeft: () => $("back").onclick(),
  ArrowRight: () => $("forth").onclick(),
};
document.onkeydown = event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;  // a key held down decides once
  if (event.target.matches("textarea, select, input")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const reasons = [...document.querySelectorAll("[data-reason]")];
  if ($("reasons").classList.contains("asked") && reasons[event.key - 1]) reasons[event.key - 1].click();
  else if (keys[event.key]) keys[event.key]();
  else return;
  event.preventDefault();
};
