"use strict";
(() => {
  const meta = document.querySelector('meta[name="fedpilot-live"]');
  const note = document.getElementById("live");
  const look = async () => {
    let found;
    try {
      found = await (await fetch("version", { cache: "no-store" })).json();
    } catch {
      note.textContent = "The run is no longer watched; this is its last known state.";
      return;
    }
    if (found.version !== meta.content) {
      location.reload();
      return;
    }
    if (found.over) note.textContent = "The run is over.";
    else setTimeout(look, found.poll_ms);
  };
  setTimeout(look, 500);
})();
