// Starts the page: finds the model, and connects the controls.

const READY_PAUSE = 2000; // ms between two looks at a server that is starting

async function findModels() {
  try {
    showModels(await listModels());
    byId("count-fault").replaceChildren();
    recount();
  } catch (error) {
    const fault = asFault(error);
    showFault(byId("count-fault"), fault, findModels);
    if (fault.status === 401) openSettings(wide.matches ? "key" : undefined);
    if (fault.status === 503) setTimeout(findModels, READY_PAUSE);
  }
}

function showModels(cards) {
  const select = byId("model");
  select.replaceChildren(...cards.map((card) => make("option", card.id)));
  select.hidden = false;
  chooseModel(cards, 0);
  select.onchange = () => {
    chooseModel(cards, select.selectedIndex);
    recount();
  };
}

function chooseModel(cards, index) {
  const card = (conversation.card = cards[index]);
  byId("send").disabled = false;
  byId("max_tiles").max = card.max_tiles;
  byId("max_tiles").placeholder = card.max_tiles;
  byId("model-facts").textContent = `${card.max_model_len} tokens, ${card.max_tiles} tiles per image`;
}

function onPreference(id) {
  if (id === "key") findModels();
  else recount(); // the server says at once which value it refuses
}

function onEscape(event) {
  if (event.key !== "Escape") return;
  if (conversation.running) stop();
  else if (!wide.matches && !byId("settings").hidden) closeSettings();
  else if (conversation.editing !== null) cancelEditing();
}

wirePreferences(onPreference);
wireComposer(submit);
onClick(byId("stop"), stop);
onClick(byId("new"), startAnew);
onClick(byId("export"), exportConversation);
onClick(byId("cancel-editing"), cancelEditing);
document.addEventListener("keydown", onEscape);
byId("text").focus();
findModels();
