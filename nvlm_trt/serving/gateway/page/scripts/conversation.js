// The conversation: what was asked and answered, and the answer that is under way.

const conversation = {
  card: null, // of the chosen model, as /v1/models has it
  exchanges: [],
  running: null, // the AbortController of the answer that is under way
  editing: null, // the index of the exchange whose question is edited
};

// The exchanges of a request that asks `question` now.
function exchangesToAsk(question) {
  const kept = conversation.exchanges.slice(0, conversation.editing ?? undefined);
  return [...kept, { question, answer: null }];
}

async function submit() {
  await adding;
  if (conversation.running || isDraftEmpty() || !conversation.card) return;
  if (conversation.editing !== null) cutFrom(conversation.editing);
  stopEditing();
  const exchange = { question: takeDraft(), answer: null, asked: null, view: null };
  conversation.exchanges.push(exchange);
  exchange.view = exchangeView(exchange, conversation.card.id, {
    edit: () => startEditing(exchange),
    again: () => regenerate(exchange),
  });
  byId("exchanges").append(exchange.view);
  if (exchange.question.pictures.some((picture) => !picture.count)) countLate(exchange);
  answer(exchange);
}

// Count the tiles of a question that was sent before they were counted.
async function countLate({ question, view }) {
  const views = [...view.querySelectorAll(".picture")];
  try {
    const body = chatBody([{ question, answer: null }], conversation.card.id);
    const { images } = await countTokens(body);
    question.pictures.forEach((picture, index) => {
      picture.count = images[index];
      showTiles(views[index], picture);
    });
  } catch {
    views.forEach(showNoTiles); // the answer tells of what is wrong
  }
}

async function answer(exchange) {
  const controller = (conversation.running = new AbortController());
  const result = { text: "", state: "waiting", usage: null, finish: null, browserSeconds: null, fault: null };
  exchange.answer = result;
  const body = chatBody(upTo(exchange), conversation.card.id);
  exchange.asked = { body, pictures: picturesOf(upTo(exchange)) };
  const show = () => showAnswer(exchange.view, result, () => regenerate(exchange));
  show();
  showRunning();
  exchange.view.scrollIntoView({ block: "end" });
  try {
    await receive(exchange.view, result, streamAnswer(body, controller.signal), show);
    result.state = "done";
  } catch (error) {
    result.state = controller.signal.aborted ? "stopped" : "failed";
    if (!controller.signal.aborted) result.fault = asFault(error);
  }
  conversation.running = null;
  show();
  showRunning();
  showEndOf(exchange);
  recount(); // of what is written meanwhile
  announce(result.fault ? result.fault.title : `Answer ${result.state}: ${result.text}`);
  if (document.activeElement === document.body) byId("text").focus(); // the Stop button has gone
}

async function receive(view, result, chunks, show) {
  const started = performance.now();
  for await (const { choices, usage } of chunks) {
    if (usage) result.usage = usage;
    const text = choices[0]?.delta.content;
    result.finish = choices[0]?.finish_reason ?? result.finish;
    if (!text) continue;
    result.text += text;
    appendText(view, text);
    if (result.state === "streaming") continue;
    result.browserSeconds = (performance.now() - started) / 1000;
    result.state = "streaming";
    show();
  }
}

function stop() {
  conversation.running?.abort();
}

function regenerate(exchange) {
  if (conversation.running) return;
  if (conversation.editing !== null) cancelEditing();
  cutFrom(conversation.exchanges.indexOf(exchange) + 1);
  answer(exchange);
}

// --- changing what was asked -----------------------------------------------------------------------------------------

function startEditing(exchange) {
  if (conversation.running) return;
  conversation.editing = conversation.exchanges.indexOf(exchange);
  showEditing();
  setDraft(exchange.question);
  byId("text").focus();
}

function stopEditing() {
  conversation.editing = null;
  showEditing();
}

function cancelEditing() {
  stopEditing();
  setDraft({ text: "", pictures: [] });
  byId("text").focus();
}

function showEditing() {
  byId("editing").hidden = conversation.editing === null;
  conversation.exchanges.forEach((exchange, index) => {
    const isReplaced = conversation.editing !== null && index >= conversation.editing;
    exchange.view.classList.toggle("replaced", isReplaced);
  });
}

function cutFrom(index) {
  for (const exchange of conversation.exchanges.splice(index)) exchange.view.remove();
}

function startAnew() {
  stop();
  stopEditing();
  cutFrom(0);
  setDraft({ text: "", pictures: [] });
  showRunning();
  byId("text").focus();
}

// --- showing ---------------------------------------------------------------------------------------------------------

function showRunning() {
  const isRunning = conversation.running !== null;
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  const isEmpty = !conversation.exchanges.length;
  byId("empty").hidden = !isEmpty;
  for (const id of ["new", "export"]) byId(id).hidden = isEmpty;
  for (const button of document.querySelectorAll(".edit, .again")) button.disabled = isRunning;
}

function showEndOf(exchange) {
  const isLast = exchange === conversation.exchanges.at(-1);
  if (isLast) byId("conversation").scrollTop = byId("conversation").scrollHeight;
}

// --- taking along ----------------------------------------------------------------------------------------------------

const upTo = (exchange) => conversation.exchanges.slice(0, conversation.exchanges.indexOf(exchange) + 1);

function exported() {
  const last = conversation.exchanges.at(-1);
  const answered = messagesOf([...conversation.exchanges, { question: { text: "", pictures: [] } }]).slice(0, -1);
  return {
    model: conversation.card.id,
    exported_at: new Date().toISOString(),
    sampling: sampling(),
    messages: last.answer.text ? answered : messagesOf(conversation.exchanges),
    answers: conversation.exchanges.map(({ question, answer }) => ({
      images: question.pictures.map(({ name, count }) => ({ name, ...count })),
      state: answer.state,
      finish_reason: answer.finish,
      usage: answer.usage,
      error: answer.fault && `${answer.fault.title}. ${answer.fault.message}`,
    })),
  };
}

function exportConversation() {
  const blob = new Blob([JSON.stringify(exported(), null, 2)], { type: "application/json" });
  const link = make("a", "");
  link.href = URL.createObjectURL(blob);
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
