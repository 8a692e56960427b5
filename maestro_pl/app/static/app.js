// Keys and small things that every page shares. A page says in its HTML what a key does:
//   data-key="j"            the element is clicked (a link, a button) or focused (a field) when j is pressed
//   data-once               a key that is held down clicks it once, and no second time before the answer has come
//   data-submit             a form's field that submits its form when it changes
"use strict";

const writing = (target) => target instanceof Element && target.closest("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]");

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (writing(event.target)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const wanted = CSS.escape(event.key);
  const found = document.querySelector(`[data-key="${wanted}"]:not(:disabled)`);
  if (!found) return;
  event.preventDefault();
  if (event.repeat && found.matches("[data-once], [type=checkbox]")) return; // else a tick would come and go
  if (found.matches("[data-once]") && document.querySelector(".htmx-request[data-once]")) return;
  if (found.matches("input:not([type=checkbox]):not([type=radio]), textarea, select")) found.focus();
  else found.click();
});

document.addEventListener("change", (event) => {
  const field = event.target;
  if (field instanceof Element && field.matches("[data-submit]") && field.form) field.form.requestSubmit();
});

// What the page has to say of a request, in its status line.
const say = (text, failed) => {
  const status = document.querySelector("[data-status]");
  if (!status) return;
  status.textContent = text;
  status.toggleAttribute("data-failed", failed);
};
document.addEventListener("htmx:responseError", (event) => say(`The server answered ${event.detail.xhr.status}.`, true));
document.addEventListener("htmx:sendError", () => say("The server does not answer: was the command ended?", true));
document.addEventListener("standing", () => say("You had answered this one, in another tab perhaps; that answer stands.", false));
// Words stay until something is done, and what went wrong until the server answers again.
document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.requestConfig.verb !== "get") say("", false);
});
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful && document.querySelector("[data-status][data-failed]")) say("", false);
});
