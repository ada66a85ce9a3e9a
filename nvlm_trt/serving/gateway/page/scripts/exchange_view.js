// Shows a question and its answer. An answer is {text, state, usage, finish, browserSeconds, fault}, where state is
// "waiting", "streaming", "done", "stopped" or "failed".

const NEAR_END = 80; // pixels: who has scrolled further up reads, and is left there

function exchangeView(exchange, model, { edit, again }) {
  const element = fromTemplate("exchange-template");
  const { text, pictures } = exchange.question;
  write(element, { ".question .text": text, ".model": model });
  element.querySelector(".pictures").append(...pictures.map((picture) => pictureView(picture)));
  onClick(element.querySelector(".edit"), edit);
  onClick(element.querySelector(".again"), again);
  copyOnClick(element.querySelector(".copy"), () => exchange.answer.text);
  copyOnClick(element.querySelector(".curl"), () => curlSnippet(exchange.asked));
  copyOnClick(element.querySelector(".python"), () => pythonSnippet(exchange.asked));
  return element;
}

// Show all of an answer but its text, which `appendText` adds as it comes.
function showAnswer(element, answer, again) {
  const isOpen = answer.state === "waiting" || answer.state === "streaming";
  const article = element.querySelector(".answer");
  article.setAttribute("aria-busy", isOpen);
  article.dataset.state = answer.state;
  article.querySelector(".buttons").hidden = isOpen;
  article.querySelector(".copy").hidden = !answer.text;
  if (answer.state === "waiting") article.querySelector(".text").textContent = "";
  article.querySelector(".fault").replaceChildren();
  if (answer.fault) showFault(article.querySelector(".fault"), answer.fault, again);
  article.querySelector(".figures").replaceChildren(...figures(answer));
}

function appendText(element, text) {
  const scroller = byId("conversation");
  const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
  element.querySelector(".answer .text").append(text);
  if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
}

// --- figures ---------------------------------------------------------------------------------------------------------

const milliseconds = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

function figures({ usage, finish, state, browserSeconds }) {
  const list = usage ? countFigures(usage) : [];
  if (usage) list.push(...timeFigures(usage));
  // measured here, so with the way of the images to the server and of the text from it
  if (browserSeconds !== null) list.push(["first text here", milliseconds(browserSeconds)]);
  if (state === "stopped") list.push(["ended", "stopped by you"]);
  if (finish === "length") list.push(["ended", "at the most tokens"]);
  return list.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(make("dt", name), make("dd", value));
    return pair;
  });
}

function countFigures(usage) {
  const { nvlm, prompt_tokens_details: details } = usage;
  const list = [["prompt", plural(usage.prompt_tokens, "token")]];
  if (details.cached_tokens) list.push(["known already", plural(details.cached_tokens, "token")]);
  if (details.image_tiles) {
    list.push(["images", plural(details.image_tiles, "tile")]);
    list.push(["from the cache", nvlm.cached_images ? plural(nvlm.cached_images, "image") : "none"]);
  }
  if (nvlm.cross_attended_tokens) list.push(["cross-attended", plural(nvlm.cross_attended_tokens, "token")]);
  list.push(["answer", plural(usage.completion_tokens, "token")]);
  return list;
}

function timeFigures({ completion_tokens: tokens, prompt_tokens_details: details, nvlm }) {
  const list = [];
  const decoded = tokens - 1; // prefill makes the first
  if (decoded > 0) list.push(["speed", `${(decoded / (nvlm.total_s - nvlm.ttft_s)).toFixed(1)} tokens/s`]);
  // a request waits for its images and for a slot at the same time
  list.push([details.image_tiles ? "queue, images" : "queue", milliseconds(nvlm.queue_s)]);
  if (nvlm.ttft_s !== null) list.push(["first token", milliseconds(nvlm.ttft_s)]);
  return list;
}
