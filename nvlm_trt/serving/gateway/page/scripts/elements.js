// Elements of the document. All text enters it through textContent.

const byId = (id) => document.getElementById(id);

function fromTemplate(id) {
  // imported, for the document of a template has no fonts that a canvas could write with
  return document.importNode(byId(id).content, true).firstElementChild;
}

// Set texts of parts of an element: {".name": "receipt.png"}.
function write(element, texts) {
  for (const [selector, text] of Object.entries(texts)) element.querySelector(selector).textContent = text;
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function onClick(element, action) {
  element.addEventListener("click", action);
}

// Tell a screen reader.
function announce(text) {
  byId("announcement").textContent = text;
}

async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // a page that came over http from another machine has no clipboard of its own
  const area = make("textarea", text, "unseen");
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// Make a button copy what `content` returns, and say that it did.
function copyOnClick(button, content) {
  const label = button.textContent;
  onClick(button, async () => {
    try {
      await copy(content());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    announce(button.textContent);
    setTimeout(() => (button.textContent = label), 1500);
  });
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
