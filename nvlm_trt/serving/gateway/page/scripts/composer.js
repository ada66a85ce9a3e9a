// The form of the next question: its images, its text, and what both will cost.

const TYPING_PAUSE = 250; // ms
// While someone types, images beyond this are not sent again and again only to count a text.
const LIGHT_BYTES = 4 << 20;

const draft = { pictures: [], text: () => byId("text").value.trim() };
let adding = Promise.resolve(); // settles when all files that were added have been read
let counting = null; // the AbortController of the count that is under way
let typing = 0; // the timer of a pause

const isDraftEmpty = () => !draft.text() && !draft.pictures.length;
const isLight = (exchanges) => picturesOf(exchanges).reduce((sum, picture) => sum + picture.bytes, 0) < LIGHT_BYTES;

function addFiles(files) {
  adding = adding.then(() => addInOrder(files));
}

async function addInOrder(files) {
  for (const file of files) {
    try {
      draft.pictures.push(await readPicture(file));
    } catch (error) {
      showFault(byId("count-fault"), asFault(error));
      return;
    }
  }
  showDraft();
  recount();
  byId("text").focus();
}

function removePicture(picture) {
  draft.pictures = draft.pictures.filter((other) => other !== picture);
  showDraft();
  recount();
  byId("text").focus();
}

function showDraft() {
  const views = draft.pictures.map((picture) => {
    const view = pictureView(picture, () => removePicture(picture));
    view.querySelector("details").open = true;
    return view;
  });
  byId("attachments").replaceChildren(...views);
}

function setDraft({ text, pictures }) {
  byId("text").value = text;
  draft.pictures = [...pictures];
  showDraft();
  fitText();
  recount();
}

// Return the question, and begin an empty one.
function takeDraft() {
  const question = { text: draft.text(), pictures: draft.pictures };
  setDraft({ text: "", pictures: [] });
  return question;
}

function fitText() {
  const area = byId("text");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`; // with both borders; the style sheet has a limit
}

// --- counting --------------------------------------------------------------------------------------------------------

// Ask the server what the conversation with this draft would be, and show it.
async function recount() {
  clearTimeout(typing);
  counting?.abort();
  byId("count-fault").replaceChildren();
  byId("count").textContent = "";
  if (isDraftEmpty() || !conversation.card) return;
  const own = (counting = new AbortController());
  const exchanges = exchangesToAsk({ text: draft.text(), pictures: draft.pictures });
  const pictures = picturesOf(exchanges);
  try {
    const count = await countTokens(chatBody(exchanges, conversation.card.id), own.signal);
    if (!own.signal.aborted) showCount(count, pictures);
  } catch (error) {
    if (own.signal.aborted) return;
    for (const view of byId("attachments").children) showNoTiles(view);
    showFault(byId("count-fault"), asFault(error), recount);
  }
}

function recountAfterTyping() {
  clearTimeout(typing);
  const exchanges = exchangesToAsk({ text: draft.text(), pictures: draft.pictures });
  if (isLight(exchanges)) typing = setTimeout(recount, TYPING_PAUSE);
}

function showCount(count, pictures) {
  pictures.forEach((picture, index) => (picture.count = count.images[index]));
  draft.pictures.forEach((picture, index) => showTiles(byId("attachments").children[index], picture));
  const { image_tiles: tiles, cross_attended_tokens: crossed } = count.input_tokens_details;
  const parts = [`${count.input_tokens} of ${conversation.card.max_model_len} tokens`];
  if (tiles) parts.push(plural(tiles, "tile"));
  if (crossed) parts.push(`${crossed} cross-attended`);
  byId("count").textContent = parts.join(" · ");
}

// --- input -----------------------------------------------------------------------------------------------------------

const imagesOf = (transfer) => [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

function wireComposer(submit) {
  const [form, text, files] = [byId("composer"), byId("text"), byId("files")];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  text.addEventListener("keydown", (event) => {
    // Enter that ends the composition of a character belongs to the input method
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  text.addEventListener("input", () => {
    fitText();
    recountAfterTyping();
  });
  text.addEventListener("change", () => !isDraftEmpty() && recount());
  for (const id of ["attach", "choose"]) onClick(byId(id), () => files.click());
  files.addEventListener("change", () => {
    addFiles([...files.files]);
    files.value = ""; // the same file may be chosen again
  });
  document.addEventListener("paste", (event) => {
    const images = imagesOf(event.clipboardData);
    if (!images.length) return;
    event.preventDefault();
    addFiles(images);
  });
  wireDropping();
}

function wireDropping() {
  let inside = 0; // dragenter and dragleave come for every element on the way
  const show = (count) => {
    inside = count;
    byId("dropping").hidden = !inside;
  };
  document.addEventListener("dragenter", (event) => hasFiles(event) && show(inside + 1));
  document.addEventListener("dragleave", (event) => hasFiles(event) && show(Math.max(0, inside - 1)));
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(0);
    // all files: a system that knows no type for an image may drop it, and the server says what it cannot read
    addFiles([...event.dataTransfer.files]);
  });
}
