"use strict";

// Swagger UI from the server's own cache; without it, a plain list of what there is.

const place = document.getElementById("docs");
const script = document.createElement("script");
script.src = "/vendor/swagger-ui.js";
script.onload = () => window.SwaggerUIBundle({ url: "/openapi.json", domNode: place, deepLinking: true });
script.onerror = plain;
document.head.append(script);

async function plain() {
  const description = await (await fetch("/openapi.json")).json();
  const list = document.createElement("dl");
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, one] of Object.entries(methods)) {
      const term = document.createElement("dt");
      const what = document.createElement("dd");
      term.textContent = `${method.toUpperCase()} ${path}`;
      what.textContent = one.description ?? one.summary ?? "";
      list.append(term, what);
    }
  }
  const title = document.createElement("h1");
  title.textContent = description.info.title;
  const note = document.createElement("p");
  note.append("The full description is at ");
  const link = document.createElement("a");
  link.href = link.textContent = "/openapi.json";
  note.append(link, ".");
  place.replaceChildren(title, note, list);
}
