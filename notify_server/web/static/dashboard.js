// What every page does: times of day where the reader is, parts that are looked at again, buttons that copy.

const language = document.documentElement.lang;
const thisYear = new Date().getFullYear();

function momentFormat(moment) {
  const format = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  if (moment.getFullYear() !== thisYear) format.year = "numeric";
  return new Intl.DateTimeFormat(language, format).format(moment);
}

function relativeFormat(moment) {
  const seconds = (moment - Date.now()) / 1000;
  const format = new Intl.RelativeTimeFormat(language, { numeric: "auto" });
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(seconds) >= length) return format.format(Math.round(seconds / length), unit);
  }
  return format.format(Math.round(seconds), "second");
}

function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    if (!Number.isNaN(moment.getTime())) {
      time.textContent = "relative" in time.dataset ? relativeFormat(moment) : momentFormat(moment);
    }
  }
}

// A form shows times where the reader is, and sends them as UTC.
function localForm(form) {
  const inputs = form.querySelectorAll("input[type=datetime-local]");
  for (const input of inputs) {
    if (!input.dataset.utc) continue;
    const moment = new Date(input.dataset.utc);
    input.value = new Date(moment - moment.getTimezoneOffset() * 60000).toISOString().slice(0, 16);
  }
  form.addEventListener("formdata", (event) => {
    for (const input of inputs) {
      if (input.value) event.formData.set(input.name, new Date(input.value).toISOString());
    }
  });
}

// The state of the connection: figures that are not refreshed are dimmed, with the time since when.
let disconnectedSince = null;

export function connected(on) {
  const banner = document.getElementById("disconnected");
  if (on === (disconnectedSince === null)) return;
  disconnectedSince = on ? null : new Date();
  document.body.classList.toggle("stale", !on);
  banner.hidden = on;
  if (!on) {
    const format = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
    const since = new Intl.DateTimeFormat(language, format).format(disconnectedSince);
    banner.textContent = document.body.dataset.disconnected.replace("%", since);
  }
}

let toastTimer = 0;

function toast(text) {
  const box = document.getElementById("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 10000);
}

function requestFailed(event) {
  if (event.detail.elt.dataset.refresh !== undefined) {
    connected(false);
  } else {
    const status = event.detail.xhr?.status;
    if (status === 401) return;
    toast(status ? document.body.dataset.failed.replace("%", status) : document.body.dataset.noResponse);
  }
}

// A part that the reader is using is not refreshed.
function busy(element) {
  const selection = document.getSelection();
  return (
    element.querySelector(".confirm, .act .notice") !== null ||
    (selection !== null && !selection.isCollapsed && element.contains(selection.anchorNode))
  );
}

function lookAgain() {
  if (document.visibilityState !== "visible") return;
  const now = performance.now();
  for (const element of document.querySelectorAll("[data-refresh]")) {
    const last = Number(element.dataset.looked ?? 0) || Number((element.dataset.looked = String(now)));
    if (now - last >= Number(element.dataset.refresh) * 1000 && !busy(element)) {
      element.dataset.looked = String(now);
      window.htmx.trigger(element, "refresh");
    }
  }
}

async function copy(button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
  } catch {
    // Browsers give the clipboard to https and loopback only: elsewhere it is taken from a field.
    const field = document.createElement("textarea");
    field.value = button.dataset.copy;
    button.after(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = button.dataset.copied;
  setTimeout(() => (button.textContent = label), 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-copy]");
  if (button) copy(button);
});
// A link that acts as a button is pressed with the space bar as well.
document.addEventListener("keydown", (event) => {
  if (event.key === " " && event.target.matches("a[role=button]")) {
    event.preventDefault();
    event.target.click();
  }
});
document.addEventListener("htmx:load", (event) => {
  localTimes(event.detail.elt);
  event.detail.elt.querySelector?.("[data-focus]")?.focus();
  if (event.detail.elt.matches?.("[data-focus]")) event.detail.elt.focus();
});
document.addEventListener("htmx:sendError", requestFailed);
document.addEventListener("htmx:timeout", requestFailed);
document.addEventListener("htmx:responseError", requestFailed);
document.addEventListener("htmx:afterOnLoad", (event) => {
  // The overview's state is that of its live connection.
  if (event.detail.successful && document.getElementById("live") === null) connected(true);
});
localTimes(document);
document.querySelectorAll("form[data-times]").forEach(localForm);
setInterval(lookAgain, 500);
