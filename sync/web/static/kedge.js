"use strict";
// Keeps a page up to date by the patches that the server sends, and tells when it can't be. Without it a page is whole, and
// loads itself anew now and then.

const main = document.getElementById("main");
const state = document.getElementById("live");
const stale = document.getElementById("stale");
const title = document.title;
document.documentElement.classList.add("scripted");

// Time that passes.
const spans = [[86400 * 2, 86400, "d"], [3600, 3600, "h"], [60, 60, "min"], [0, 1, "s"]];
function brief(seconds) {
  const [, unit, name] = spans.find(([from]) => seconds >= from);
  return Math.floor(seconds / unit) + " " + name;
}
function tick(root) {
  const now = Date.now();
  for (const t of root.querySelectorAll("time[data-ago], time[data-left]")) {
    t.title ||= t.textContent;
    const away = (new Date(t.dateTime) - now) / 1000;
    const text = "left" in t.dataset ? brief(Math.max(0, away)) : brief(Math.max(0, -away)) + " ago";
    if (t.textContent !== text) t.textContent = text;
  }
}
setInterval(() => tick(document), 1000);

// What is to be copied gets a button.
function buttons(root) {
  for (const code of root.querySelectorAll(".commands code[data-copy], .releases code[data-copy]")) {
    if (code.nextElementSibling?.className === "copy") continue;
    const b = document.createElement("button");
    b.type = "button";
    b.className = "copy";
    b.textContent = "Copy";
    b.setAttribute("aria-label", "Copy " + code.textContent);
    code.after(b);
  }
}
document.addEventListener("click", async (e) => {
  const b = e.target.closest("button.copy");
  if (!b) return;
  const code = b.previousElementSibling;
  try {
    await navigator.clipboard.writeText(code.textContent);
    b.textContent = "Copied";
  } catch { // not a secure context
    getSelection().selectAllChildren(code);
    b.textContent = "Selected";
  }
  setTimeout(() => { b.textContent = "Copy"; }, 2000);
});

// Patches.
let waiting = [];
function parse(html) {
  const t = document.createElement("template");
  t.innerHTML = html;
  return t.content.firstElementChild;
}
// What somebody is about to copy stays until they have.
function held(element) {
  const s = getSelection();
  return !s.isCollapsed && s.containsNode(element, true);
}
function put(id, html, fresh) {
  const old = document.getElementById(id);
  if (!old) return;
  if (held(old)) {
    waiting.push([id, html]);
    return;
  }
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  const next = parse(html);
  tick(next);
  buttons(next);
  if (fresh) next.classList.add("fresh");
  old.replaceWith(next);
  if (!focused) return;
  const same = focused.id ? document.getElementById(focused.id)
    : [...next.querySelectorAll(focused.localName)].find((e) => e.getAttribute("href") === focused.getAttribute("href")
      && e.getAttribute("aria-label") === focused.getAttribute("aria-label"));
  same?.focus({ preventScroll: true });
}
function apply(patch) {
  if (patch.reload) {
    location.reload();
    return;
  }
  const html = { ...patch.html };
  for (const [name, ids] of Object.entries(patch.lists ?? {})) {
    const list = document.getElementById(name);
    if (!list) continue;
    const keep = new Set(ids ?? []);
    for (const child of [...list.children]) if (!keep.has(child.id)) child.remove();
    let at = list.firstElementChild;
    for (const id of ids ?? []) {
      if (at?.id === id) {
        at = at.nextElementSibling;
        continue;
      }
      let element = document.getElementById(id);
      if (!element && html[id]) {
        element = parse(html[id]);
        delete html[id];
        tick(element);
      }
      if (element) list.insertBefore(element, at);
    }
  }
  const few = Object.keys(html).length < 12;
  for (const [id, text] of Object.entries(html)) put(id, text, few && id.includes(":") && !id.startsWith("m:"));
  names = null;
}
document.addEventListener("selectionchange", () => {
  if (!waiting.length || !getSelection().isCollapsed) return;
  const all = waiting;
  waiting = [];
  for (const [id, html] of all) put(id, html, false);
});

// Whether the page is up to date. The server says something every two seconds.
const quiet = 4500;
let heard = Date.now(), tag = main.dataset.tag, events;
function lives() {
  heard = Date.now();
  const word = document.querySelector("#away .banner") ? "not up to date" : "live";
  if (state.className === "on" && state.textContent === word) return;
  state.className = "on";
  state.textContent = word;
  stale.hidden = true;
  document.body.classList.remove("old");
  document.title = title;
}
function old() {
  if (state.className === "off" || Date.now() - heard < quiet) return;
  state.className = "off";
  state.textContent = "not connected";
  stale.textContent = "Not connected since " + new Date(heard).toLocaleTimeString() + ": what you see is from then.";
  stale.hidden = false;
  document.body.classList.add("old");
  document.title = "(old) " + title;
}
function connect() {
  events?.close();
  const address = main.dataset.live;
  events = new EventSource(address + (address.includes("?") ? "&" : "?") + "have=" + tag);
  events.addEventListener("beat", lives);
  events.onmessage = (e) => {
    lives();
    tag = e.lastEventId;
    apply(JSON.parse(e.data));
    lives();
  };
}
setInterval(() => {
  old();
  if (Date.now() - heard > 3 * quiet || events.readyState === EventSource.CLOSED && Date.now() - heard > quiet) {
    heard = Math.max(heard, Date.now() - 2 * quiet); // not again at once
    connect();
  }
}, 500);
addEventListener("pagehide", () => events.close());
addEventListener("pageshow", (e) => { if (e.persisted) connect(); });

// The form searches while somebody types.
const form = document.querySelector(".search");
if (form) {
  let typed;
  const search = () => {
    const query = new URLSearchParams([...new FormData(form)].filter(([, v]) => v));
    const address = form.getAttribute("action") + (query.size ? "?" + query : "");
    if (address !== location.pathname + location.search) location.replace(address + "#units-head");
  };
  form.addEventListener("change", (e) => { if (e.target.localName === "select") search(); });
  form.addEventListener("input", (e) => {
    if (e.target.type !== "search") return;
    clearTimeout(typed);
    typed = setTimeout(() => {
      sessionStorage.setItem("typing", "1");
      search();
    }, 400);
  });
  const field = form.querySelector("input[type=search]");
  if (sessionStorage.getItem("typing")) {
    sessionStorage.removeItem("typing");
    field.focus({ preventScroll: true });
    field.setSelectionRange(field.value.length, field.value.length);
  }
  document.addEventListener("keydown", (e) => {
    if (e.key !== "/" || e.ctrlKey || e.metaKey || e.target.closest("input, select, textarea")) return;
    e.preventDefault();
    field.focus();
  });
}

// A map of nodes tells what stands in a cell, and leads there.
const cells = document.getElementById("cells");
let names = null, asked = 0;
async function cellOf(e) {
  const row = e.target.closest("svg");
  if (!row || row.parentElement !== cells) return null;
  const columns = row.viewBox.baseVal.width, box = row.getBoundingClientRect();
  const at = [...cells.children].indexOf(row) * columns + Math.floor((e.clientX - box.left) / box.width * columns);
  if (!names && Date.now() - asked > 1000) {
    asked = Date.now();
    const answer = await fetch("/-/nodes/" + cells.dataset.map);
    if (answer.ok) names = await answer.json();
  }
  return names?.[at];
}
if (cells) {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  cells.addEventListener("pointermove", async (e) => {
    const node = await cellOf(e);
    tip.hidden = !node;
    if (!node) return;
    tip.textContent = node[0] + " · " + node[1] + " · " + node[2];
    tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = e.clientY + 18 + "px";
  });
  cells.addEventListener("pointerleave", () => { tip.hidden = true; });
  cells.addEventListener("click", async (e) => {
    const node = await cellOf(e);
    if (node) location.assign("/" + cells.dataset.map + "/" + encodeURIComponent(node[0]));
  });
}

tick(document);
buttons(document);
connect();
