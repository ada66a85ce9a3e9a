// Images that the user adds: the file for the server, and a drawing of it for the page.

const PREVIEW_EDGE = 2304; // longest; what the page draws needs no more, and 64 megapixels would take 256 MB
let pasted = 0;

async function readPicture(file) {
  const [uri, preview] = await Promise.all([readUri(file), drawPreview(file)]);
  return { name: nameOf(file), bytes: file.size, uri, preview, count: null };
}

function nameOf(file) {
  // browsers name every image of the clipboard so
  return file.name && file.name !== "image.png" ? file.name : `pasted-${++pasted}.png`;
}

function readUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    const type = file.type.startsWith("image/") ? file.type : "image/unknown"; // the server looks at the bytes
    reader.onload = () => resolve(`data:${type};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    reader.onerror = () => reject(new Fault(`${file.name} cannot be read`, "", "Add it again."));
    reader.readAsDataURL(file);
  });
}

// Return a canvas, or null for a format that this browser does not show (TIFF); the server may well read it.
async function drawPreview(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return null;
  const scale = Math.min(1, PREVIEW_EDGE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = onWhite(canvas);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

// The server puts transparent images on white, too.
function onWhite(canvas) {
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return context;
}
