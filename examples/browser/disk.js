// Opened from the disk, the page cannot work: say so, and how it can. (Browsers do not load modules from the disk.)
if (location.protocol === "file:")
  addEventListener("DOMContentLoaded", () => {
    const folder = decodeURIComponent(location.pathname).replace(/\/[^/]*$/, "");
    const quoted = /^[\w./-]+$/.test(folder) ? folder : `'${folder.replaceAll("'", "'\\''")}'`;
    document.querySelector("#disk pre").textContent =
      `python3 -m http.server 8000 --bind 127.0.0.1 --directory ${quoted}`;
    document.getElementById("disk").hidden = false;
    for (const id of ["empty", "form", "set", "theme"]) document.getElementById(id).hidden = true;
  });
