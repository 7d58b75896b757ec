"use strict";
// Puts the page's main part in place as the server sends it, whenever something changed.
const main = document.getElementById("main");
const state = document.getElementById("state");
let next = null;

function show() {
  // What somebody is about to copy stays until they have.
  if (next === null || !document.getSelection().isCollapsed) return;
  const focused = main.contains(document.activeElement) && document.activeElement.getAttribute("href");
  main.innerHTML = next;
  next = null;
  if (!focused) return;
  const link = [...main.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused);
  if (link) link.focus({ preventScroll: true });
}

function connect() {
  const events = new EventSource("/-/live" + location.pathname);
  events.onopen = () => {
    state.textContent = "live";
    state.className = "good";
  };
  events.onmessage = (e) => {
    next = e.data;
    show();
  };
  events.onerror = () => {
    state.textContent = "not connected: what you see may be old";
    state.className = "bad";
    if (events.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
  };
}

document.addEventListener("selectionchange", show);
connect();
