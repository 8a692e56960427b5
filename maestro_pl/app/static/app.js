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

// The page's own place survives a refresh of a part: htmx replaces it under the reader's eyes.
document.addEventListener("htmx:responseError", (event) => {
  const status = document.querySelector("[data-status]");
  if (status) status.textContent = `The server answered ${event.detail.xhr.status}.`;
});
document.addEventListener("htmx:sendError", () => {
  const status = document.querySelector("[data-status]");
  if (status) status.textContent = "The server does not answer: was the command ended?";
});
