// One switch a page: the story alone, or all of its code. Without this script everything is shown.
document.documentElement.classList.add("mm-story");
document.addEventListener("DOMContentLoaded", () => {
  const place = document.querySelector(".article-header-buttons");
  if (!place || !document.querySelector(".cell_input")) return;
  const root = document.documentElement;
  const remembered = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("mm-code", value);
      return localStorage.getItem("mm-code");
    } catch {
      return value; // a page opened from a file may have no storage
    }
  };
  const button = document.createElement("button");
  button.type = "button";
  button.className = "btn btn-sm mm-code-switch";
  const set = (on) => {
    root.classList.toggle("mm-all-code", on);
    button.setAttribute("aria-pressed", on);
    button.textContent = on ? "Hide plumbing" : "Show all code";
  };
  button.addEventListener("click", () => {
    const on = !root.classList.contains("mm-all-code");
    set(on);
    remembered(on ? "on" : "off");
  });
  set(remembered() === "on");
  place.prepend(button);
});
