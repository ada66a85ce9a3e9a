// Writes a request as a command or a program. Images are named, not contained: their text would fill pages.

// Return the body as JSON whose images are marks, and what each mark stands for.
function markedJson({ body, pictures }) {
  const marks = new Map(pictures.map((picture, index) => [picture.uri, { mark: `@image-${index}@`, picture }]));
  const marked = (key, value) => (key === "url" ? (marks.get(value)?.mark ?? value) : value);
  const json = JSON.stringify(body, marked, 2);
  return { json, marks: [...marks.values()] };
}

// With its key and quotes, a mark is not found in a message's text, whose quotes are escaped.
const urlOf = (mark) => `"url": "${mark}"`;

function dataPrefix(picture) {
  return picture.uri.slice(0, picture.uri.indexOf(",") + 1);
}

function curlSnippet(asked) {
  const { json, marks } = markedJson(asked);
  let data = json.replace(/[\\$`]/g, "\\$&"); // what a shell would read in the text
  for (const { mark, picture } of marks) {
    const encoded = `$(base64 < ${shellQuoted(picture.name)} | tr -d '\\n')`;
    data = data.replaceAll(urlOf(mark), () => `"url": "${dataPrefix(picture)}${encoded}"`);
  }
  const key = apiKey() ? ` -H "Authorization: Bearer $NVLM_TRT_API_KEY"` : "";
  const url = `${location.origin}/v1/chat/completions`;
  return `curl -H 'Content-Type: application/json'${key} --data @- ${url} <<EOF\n${data}\nEOF\n`;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

// Keys that the openai package does not know go through its extra_body.
const EXTRA_KEYS = ["max_tiles"];

function pythonSnippet(asked) {
  const { json, marks } = markedJson(asked);
  const hasImages = marks.length > 0;
  const request = JSON.parse(json);
  const extra = EXTRA_KEYS.filter((key) => key in request).map((key) => [key, request[key]]);
  const { messages, ...rest } = request;
  for (const key of EXTRA_KEYS) delete rest[key];
  let written = pythonOf(messages);
  for (const { mark, picture } of marks) {
    const call = `data_uri(${JSON.stringify(dataPrefix(picture))}, ${JSON.stringify(picture.name)})`;
    written = written.replaceAll(urlOf(mark), () => `"url": ${call}`);
  }
  const fields = Object.entries(rest).map(([name, value]) => `    ${name}=${pythonOf(value)},\n`);
  if (extra.length) fields.push(`    extra_body=${pythonOf(Object.fromEntries(extra))},\n`);
  const key = apiKey() ? `os.environ["NVLM_TRT_API_KEY"]` : `"none"`;
  const modules = [hasImages && "import base64", apiKey() && "import os"].filter(Boolean);
  return [
    ...modules,
    ...(modules.length ? [""] : []),
    "from openai import OpenAI",
    "",
    ...(hasImages ? [DATA_URI] : []),
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${key})`,
    `messages = ${written}`,
    `answer = client.chat.completions.create(\n    messages=messages,\n${fields.join("")})`,
    "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}

const DATA_URI = `
def data_uri(prefix, path):
    with open(path, "rb") as file:
        return prefix + base64.b64encode(file.read()).decode()

`;

// Write a value of JSON in Python.
function pythonOf(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = `${indent}    `;
  const items = Array.isArray(value)
    ? value.map((item) => pythonOf(item, inner))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${pythonOf(item, inner)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return items.length ? `${open}\n${inner}${items.join(`,\n${inner}`)}\n${indent}${close}` : open + close;
}
