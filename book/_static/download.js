// The theme opens a chapter's notebook in a new tab, as text; readers want a file, with all that it needs to run.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".btn-download-source-button").forEach((link) => {
    link.href = link.href.replace(/_sources\/(.*)\.ipynb$/, "_downloads/$1.zip");
    link.setAttribute("download", "");
    link.removeAttribute("target");
  });
});
