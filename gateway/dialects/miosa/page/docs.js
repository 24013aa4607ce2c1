// Shows the OpenAPI document. Everything from it is set as text, never as markup.
"use strict";

const METHODS = ["get", "post", "put", "patch", "delete"];

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function resolve(api, schema) {
  while (schema && schema.$ref) schema = api.components.schemas[schema.$ref.split("/").pop()];
  return schema || {};
}

// "string, at most 120 characters", "array of Sandbox", "integer | null".
function typeText(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeText))].join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `array of ${typeText(schema.items || {})}`;
  const limits = [
    ["minimum", "≥"], ["maximum", "≤"], ["minLength", "length ≥"], ["maxLength", "length ≤"], ["maxItems", "items ≤"],
  ].filter(([key]) => key in schema).map(([key, words]) => `${words} ${schema[key]}`);
  return [schema.type || "any", ...limits].join(", ");
}

function fieldsTable(api, schema) {
  const { properties = {}, required = [], description } = resolve(api, schema);
  const rows = Object.entries(properties).map(([name, field]) => element("tr", {},
    element("td", {}, element("code", {}, name), required.includes(name) ? " required" : ""),
    element("td", {}, element("code", {}, typeText(field))),
    element("td", { class: "soft" }, "default" in field ? `default ${JSON.stringify(field.default)}` : "")));
  return element("div", {},
    description ? element("p", { class: "soft" }, description) : null,
    rows.length ? element("table", {}, ...rows) : null);
}

function answerSchema(schema) {
  if (!schema) return null;
  if (schema.allOf) return schema.allOf[0];
  return schema.properties && schema.properties.data ? schema.properties.data.items : schema;
}

function example(method, path, operation) {
  const lines = [`curl -X ${method.toUpperCase()} "$SANDGATE_URL${path}"`];
  if (!operation.security) lines.push(`-H "Authorization: Bearer $SANDGATE_KEY"`);
  if (operation.requestBody && operation.requestBody.content["application/json"]) {
    lines.push(`-H "Content-Type: application/json"`, "-d '{}'");
  }
  return lines.join(" \\\n  ");
}

function section(title, content) {
  return content ? [element("h3", {}, title), content] : [];
}

function operationView(api, path, method, operation) {
  const parameters = operation.parameters.filter((one) => one.in !== "header").map((one) => element("tr", {},
    element("td", {}, element("code", {}, one.name), one.required ? " required" : ""),
    element("td", {}, one.in),
    element("td", {}, element("code", {}, typeText(one.schema)))));
  const bodies = Object.entries(operation.requestBody ? operation.requestBody.content : {});
  const answers = Object.entries(operation.responses).filter(([status]) => status !== "default");
  const details = element("details", { id: operation.operationId },
    element("summary", {},
      element("code", { class: `method ${method}` }, method.toUpperCase()),
      element("code", {}, path), operation.summary));
  details.dataset.text = `${method} ${path} ${operation.summary}`.toLowerCase();
  // Filled when opened: a hundred tables at once would make the page slow.
  details.addEventListener("toggle", () => {
    if (!details.open || details.dataset.filled) return;
    details.dataset.filled = "yes";
    details.append(
      element("p", {}, operation.description || ""),
      ...section("Parameters", parameters.length ? element("table", {}, ...parameters) : null),
      ...bodies.flatMap(([type, body]) => section(`Body: ${type}`, body.schema ? fieldsTable(api, body.schema) : element("p", { class: "soft" }, "The file's bytes."))),
      ...answers.flatMap(([status, answer]) => Object.entries(answer.content || { "no content": {} }).flatMap(([type, body]) =>
        section(`Answer ${status}: ${type}`, body.schema ? fieldsTable(api, answerSchema(body.schema)) : element("p", { class: "soft" }, answer.description)))),
      ...section("Example", element("pre", {}, example(method, path, operation))));
  });
  return details;
}

function show(api) {
  const main = document.getElementById("operations");
  main.replaceChildren(element("pre", {}, api.info.description));
  for (const { name } of api.tags) {
    const id = `family-${name.toLowerCase().replaceAll(" ", "-")}`;
    const family = element("section", {}, element("h2", { id }, name));
    for (const [path, methods] of Object.entries(api.paths)) {
      for (const method of METHODS) {
        const operation = methods[method];
        if (operation && operation.tags[0] === name) family.append(operationView(api, path, method, operation));
      }
    }
    main.append(family);
    document.getElementById("families").append(element("a", { href: `#${id}` }, name));
  }
  openLinked();
  main.append(element("section", {}, element("h2", {}, "Errors"), element("pre", {}, api.components.responses.Error.description)));
}

// #post_sandboxes opens that operation.
function openLinked() {
  const linked = document.getElementById(location.hash.slice(1));
  if (linked && linked.tagName === "DETAILS") {
    linked.open = true;
    linked.scrollIntoView();
  }
}

function filter(text) {
  const words = text.toLowerCase().split(/\s+/);
  for (const family of document.querySelectorAll("section")) {
    let found = 0;
    for (const one of family.querySelectorAll("details")) {
      one.hidden = !words.every((word) => one.dataset.text.includes(word));
      found += one.hidden ? 0 : 1;
    }
    family.hidden = found === 0 && text !== "";
  }
}

document.getElementById("search").addEventListener("input", (event) => filter(event.target.value));
window.addEventListener("hashchange", openLinked);
fetch("/api/v1/openapi.json").then((answer) => answer.json()).then(show).catch((error) => {
  document.getElementById("status").textContent = `The document cannot be loaded: ${error}`;
});
