// Shows an image as the model sees it. The server says the grid, the tags and the tokens; the page draws them.

const WHOLE_SIZE = [440, 300]; // pixels of the canvas at most, twice those on the screen
const TILE_EDGE = 192;

// Return the element of a picture. `remove` is called by its button, which is absent without it.
function pictureView(picture, remove) {
  const view = fromTemplate("picture-template");
  write(view, { ".name": picture.name, ".tiling": "Counting tiles…" });
  if (remove) {
    view.querySelector(".remove").setAttribute("aria-label", `Remove ${picture.name}`);
    onClick(view.querySelector(".remove"), remove);
  } else {
    view.querySelector(".remove").remove();
  }
  drawWhole(view.querySelector(".whole"), picture);
  if (picture.count) showTiles(view, picture);
  return view;
}

// Fill in what the server has counted: `picture.count`, an entry of `images` of input_tokens.
function showTiles(view, picture) {
  const count = picture.count;
  write(view, {
    ".size": `${count.width} × ${count.height} px`,
    ".tiling": tilingOf(count),
    ".tokens": tokensOf(count),
  });
  drawWhole(view.querySelector(".whole"), picture);
  const tiles = count.tags.map((tag, index) => tileView(picture, tag, index));
  const thumbnail = tiles.pop();
  const [ofTiles, ofThumbnail] = placesOf(count);
  view.querySelector(".tiles").hidden = !tiles.length;
  write(view, { ".tiles h4": ofTiles, ".thumbnail h4": ofThumbnail });
  view.querySelector(".tiles ol").style.setProperty("--columns", count.columns);
  view.querySelector(".tiles ol").replaceChildren(...tiles);
  view.querySelector(".thumbnail ol").replaceChildren(thumbnail);
  view.querySelector("details").hidden = false;
}

function showNoTiles(view) {
  write(view, { ".tiling": "", ".tokens": "" });
}

function tilingOf(count) {
  if (count.tiles === 1) return `1 tile of ${count.tile_size} px`;
  return `${count.columns} × ${count.rows} grid + thumbnail = ${count.tiles} tiles of ${count.tile_size} px`;
}

function tokensOf(count) {
  const parts = [];
  if (count.image_tokens) parts.push(`${count.image_tokens} in the prompt`);
  if (count.cross_tokens) parts.push(`${count.cross_tokens} cross-attended`);
  return `Tokens: ${parts.join(", ")}`;
}

// NVLM-D has all tiles in the prompt and NVLM-X all in cross-attention; NVLM-H has the thumbnail alone in the prompt.
function tokensOfTile(count, index) {
  if (!count.cross_tokens) return count.image_tokens / count.tiles;
  if (!count.image_tokens) return count.cross_tokens / count.tiles;
  const isThumbnail = index === count.tiles - 1;
  return isThumbnail ? count.image_tokens : count.cross_tokens / (count.tiles - 1);
}

// Where the tokens of the tiles go, and where those of the thumbnail.
function placesOf(count) {
  const [prompt, crossed] = ["In the prompt", "Cross-attended"];
  return [count.cross_tokens ? crossed : prompt, count.image_tokens ? prompt : crossed];
}

function tileView(picture, tag, index) {
  const view = fromTemplate("tile-template");
  write(view, { ".tag": tag, ".count": plural(tokensOfTile(picture.count, index), "token") });
  const canvas = view.querySelector("canvas");
  canvas.setAttribute("aria-label", `What the model sees as ${tag}`);
  drawTile(canvas, picture, index);
  return view;
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function drawTile(canvas, { preview, count }, index) {
  const edge = Math.min(count.tile_size, TILE_EDGE);
  canvas.width = canvas.height = edge;
  const context = onWhite(canvas);
  if (!preview) return;
  const isThumbnail = index === count.tiles - 1;
  const columns = isThumbnail ? 1 : count.columns;
  const rows = isThumbnail ? 1 : count.rows;
  const [column, row] = isThumbnail ? [0, 0] : [index % columns, Math.floor(index / columns)];
  // the image is stretched over the grid, whatever its shape
  context.drawImage(preview, -column * edge, -row * edge, columns * edge, rows * edge);
}

function drawWhole(canvas, picture) {
  const { width, height } = picture.count ?? picture.preview ?? { width: 4, height: 3 };
  const scale = Math.min(WHOLE_SIZE[0] / width, WHOLE_SIZE[1] / height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = onWhite(canvas);
  if (picture.preview) context.drawImage(picture.preview, 0, 0, canvas.width, canvas.height);
  else writeNoPreview(context, canvas);
  if (picture.count && picture.count.tiles > 1) drawGrid(context, canvas, picture.count);
  const grid = picture.count ? `, ${tilingOf(picture.count)}` : "";
  canvas.setAttribute("aria-label", `${picture.name}${grid}`);
}

function writeNoPreview(context, canvas) {
  context.fillStyle = "#555";
  context.font = "22px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillText("no preview in this browser", canvas.width / 2, canvas.height / 2, canvas.width);
  context.textAlign = "start";
}

function drawGrid(context, canvas, { columns, rows }) {
  const [across, down] = [canvas.width / columns, canvas.height / rows];
  context.beginPath();
  for (let column = 1; column < columns; column++) {
    context.moveTo(column * across, 0);
    context.lineTo(column * across, canvas.height);
  }
  for (let row = 1; row < rows; row++) {
    context.moveTo(0, row * down);
    context.lineTo(canvas.width, row * down);
  }
  // a dark line on a light one is seen on every image
  for (const [colour, width] of [["white", 6], ["#0b7a6b", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  }
  for (let tile = 0; tile < columns * rows; tile++) {
    drawNumber(context, tile + 1, (tile % columns) * across + 6, Math.floor(tile / columns) * down + 6);
  }
}

function drawNumber(context, number, left, top) {
  context.font = "bold 22px system-ui, sans-serif";
  context.textBaseline = "top";
  context.fillStyle = "#0b7a6b";
  context.fillRect(left, top, context.measureText(number).width + 14, 30);
  context.fillStyle = "white";
  context.fillText(number, left + 7, top + 4);
}
