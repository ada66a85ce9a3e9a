// What the user has set. All but the API key outlives the tab.

const KEY = "nvlm-trt.key";
const SETTINGS = "nvlm-trt.settings";
const THEME = "nvlm-trt.theme";
const TEXTS = ["system", "json_schema"];
const NUMBERS = ["temperature", "top_p", "seed", "max_tokens", "max_tiles"];
const DEFAULTS = { max_tokens: "512" };
const darkSystem = matchMedia("(prefers-color-scheme: dark)");

// A browser that keeps nothing throws on every access to a storage.
function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

function remember(storage, name, value) {
  try {
    if (value) window[storage].setItem(name, value);
    else window[storage].removeItem(name);
  } catch {
    // it holds until the page is left
  }
}

const apiKey = () => byId("key").value.trim();
const systemMessage = () => byId("system").value.trim();

// The numbers that are set: a field that is empty is left to the server, whose message tells of one that is wrong.
function sampling() {
  const filled = NUMBERS.filter((name) => byId(name).value !== "");
  return Object.fromEntries(filled.map((name) => [name, byId(name).valueAsNumber]));
}

// What the answer must be. A text that is no JSON is sent as it is: the server's message tells of that, too.
function responseFormat() {
  const text = byId("json_schema").value.trim();
  if (!text) return {};
  let schema = text;
  try {
    schema = JSON.parse(text);
  } catch {
    // it stays a text
  }
  return { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
}

function loadPreferences() {
  const stored = { ...DEFAULTS, ...JSON.parse(recall("localStorage", SETTINGS)) };
  for (const name of [...TEXTS, ...NUMBERS]) byId(name).value = stored[name] ?? "";
  byId("key").value = recall("sessionStorage", KEY) ?? "";
  document.documentElement.dataset.theme = recall("localStorage", THEME) ?? "";
}

function savePreferences() {
  const values = [...TEXTS, ...NUMBERS].map((name) => [name, byId(name).value]);
  remember("localStorage", SETTINGS, JSON.stringify(Object.fromEntries(values)));
  remember("sessionStorage", KEY, apiKey());
}

// --- light and dark --------------------------------------------------------------------------------------------------

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : darkSystem.matches;
}

function showTheme() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
}

// Switch. A choice that is the system's own is forgotten, so that the page follows the system again.
function switchTheme() {
  const dark = !isDark();
  const theme = dark === darkSystem.matches ? "" : dark ? "dark" : "light";
  document.documentElement.dataset.theme = theme;
  remember("localStorage", THEME, theme);
  showTheme();
}

// --- the panel -------------------------------------------------------------------------------------------------------

const wide = matchMedia("(min-width: 64rem)");

function openSettings(focused) {
  byId("settings").hidden = false;
  byId("settings-button").setAttribute("aria-expanded", "true");
  if (focused) byId(focused).focus();
}

function closeSettings() {
  byId("settings").hidden = true;
  byId("settings-button").setAttribute("aria-expanded", "false");
}

function wirePreferences(onChange) {
  loadPreferences();
  showTheme();
  if (wide.matches) openSettings();
  darkSystem.addEventListener("change", showTheme);
  wide.addEventListener("change", () => (wide.matches ? openSettings() : closeSettings()));
  onClick(byId("theme"), switchTheme);
  onClick(byId("settings-button"), () => (byId("settings").hidden ? openSettings("system") : closeSettings()));
  onClick(byId("close-settings"), () => {
    closeSettings();
    byId("settings-button").focus();
  });
  byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
  byId("settings-form").addEventListener("input", savePreferences);
  byId("settings-form").addEventListener("change", (event) => onChange(event.target.id));
}
