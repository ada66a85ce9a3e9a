// Calls the endpoint that served this page. Failed calls throw a Fault, aborted ones an AbortError.

async function call(path, body, signal) {
  const headers = new Headers();
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  if (body) headers.set("Content-Type", "application/json");
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (!response.ok) throw await faultOf(response);
  return response;
}

async function listModels() {
  return (await (await call("/v1/models")).json()).data;
}

async function countTokens(body, signal) {
  return (await call("/v1/chat/completions/input_tokens", body, signal)).json();
}

// Yield the chunks of a streamed answer.
async function* streamAnswer(body, signal) {
  const response = await call("/v1/chat/completions", streamed(body), signal);
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data: ")) continue; // the ends of events, and comments that keep the connection
    const data = line.slice("data: ".length);
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw faultOfError(chunk.error, 0);
    yield chunk;
  }
  throw brokenOff();
}

const streamed = (body) => ({ ...body, stream: true, stream_options: { include_usage: true } });

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw brokenOff();
  } finally {
    reader.cancel().catch(() => {}); // the connection is gone already
  }
}
