// Makes requests. An exchange is {question: {text, pictures}, answer: {text, ...} or null}, and for an answer, asked:
// {body, pictures}, the request that it answers.

// The body of a request that asks the last of some exchanges.
function chatBody(exchanges, model) {
  return { model, messages: messagesOf(exchanges), ...sampling(), ...responseFormat() };
}

function messagesOf(exchanges) {
  const system = systemMessage();
  const messages = system ? [{ role: "system", content: system }] : [];
  exchanges.forEach((exchange, index) => {
    const isLast = index === exchanges.length - 1;
    // a question without an answer is left out, for roles must take turns
    if (!isLast && !exchange.answer?.text) return;
    messages.push({ role: "user", content: contentOf(exchange.question) });
    if (!isLast) messages.push({ role: "assistant", content: exchange.answer.text });
  });
  return messages;
}

// Images come first and the text in a new line: so the models were trained, and so `nvlm-trt ask` sends them.
function contentOf({ text, pictures }) {
  if (!pictures.length) return text;
  const parts = pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.uri } }));
  if (text) parts.push({ type: "text", text: `\n${text}` });
  return parts;
}

// The pictures of a request, in its order.
function picturesOf(exchanges) {
  const asked = exchanges.filter((exchange, index) => index === exchanges.length - 1 || exchange.answer?.text);
  return asked.flatMap((exchange) => exchange.question.pictures);
}
