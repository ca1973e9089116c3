// The theme opens a chapter's notebook in a new tab, as text; readers want the file.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".btn-download-source-button").forEach((link) => {
    link.setAttribute("download", "");
    link.removeAttribute("target");
  });
});
