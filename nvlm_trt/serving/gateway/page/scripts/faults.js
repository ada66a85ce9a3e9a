// Errors, as a person reads them: what happened, what the server says, what to do.

class Fault extends Error {
  constructor(title, message, remedy, status = 0) {
    super(message);
    Object.assign(this, { title, remedy, status });
  }
}

const unreachable = () =>
  new Fault("The server cannot be reached", "", `See whether it still runs at ${location.origin}, then try again.`);

const brokenOff = () =>
  new Fault("The answer broke off", "The connection ended before the answer did.", "Try again.");

const BY_CODE = {
  invalid_image: ["The server cannot read an image", "Remove the image, or save it as PNG or JPEG and add it again."],
  too_many_images: ["There are too many images", "Remove some, or start a new conversation."],
  context_length_exceeded: [
    "The conversation is too long for the engine",
    "Start a new one, remove an image, or lower the most tiles of an image in Settings.",
  ],
  model_not_found: ["The model is not served here", "Reload the page, which lists the models."],
};
const BY_STATUS = {
  400: ["The server refused the request", "Change what the message names: a setting, or the text."],
  401: ["The API key is missing or wrong", "Enter a key in Settings."],
  408: ["The images took too long to arrive", "Try again, or send fewer or smaller images."],
  413: ["The images are too large together", "Remove some, or make them smaller."],
  429: ["The server is busy", "All its places are taken."],
  503: ["The server is not ready", "It is starting or stopping."],
};

async function faultOf(response) {
  const body = await response.json().catch(() => ({}));
  return faultOfError(body.error ?? {}, response.status, response.headers.get("retry-after"));
}

// `error` is the object that OpenAI's interface has; `status` is 0 within a stream.
function faultOfError(error, status, retryAfter) {
  const unknown = [status ? `The server answered with status ${status}` : "The server ended the answer", "Try again."];
  const [title, remedy] = BY_CODE[error.code] ?? BY_STATUS[status] ?? unknown;
  const wait = retryAfter ? ` Try again in ${plural(Number(retryAfter), "second")}.` : "";
  const message = status === 401 ? "" : error.message ?? ""; // that one is for programs: which header to send
  return new Fault(title, message, remedy + wait, status);
}

// Whatever else is thrown is a fault of this page.
const asFault = (error) => (error instanceof Fault ? error : new Fault("The page failed", String(error), "Reload it."));

// The same request would be refused again.
const REFUSED = [400, 404, 413];

// Show a fault, with a button that opens the settings or calls `retry`, if that may help.
function showFault(place, fault, retry) {
  const box = fromTemplate("fault-template");
  write(box, { ".title": fault.title, ".message": fault.message, ".remedy": fault.remedy });
  const button = box.querySelector(".act");
  if (fault.status === 401) {
    button.textContent = "Enter a key";
    onClick(button, () => openSettings("key"));
  } else if (retry && !REFUSED.includes(fault.status)) {
    button.textContent = "Try again";
    onClick(button, retry);
  } else {
    button.remove();
  }
  place.replaceChildren(box);
}
