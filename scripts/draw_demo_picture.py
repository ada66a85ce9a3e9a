"""Draw docs/images/receipt.png, the picture the demo asks about; its 3:2 shape makes 3 x 2 tiles and a thumbnail."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LINES = [("Tea", "4.20"), ("Two scones", "6.80"), ("Jam", "1.50")]
SIZE = (504, 336)


def draw_receipt() -> Image.Image:
    image = Image.new("RGB", SIZE, "#fbfaf5")
    draw = ImageDraw.Draw(image)
    title, body = ImageFont.load_default(size=34), ImageFont.load_default(size=28)
    draw.text((32, 24), "Corner Cafe", font=title, fill="#20303c")
    draw.line([(32, 76), (SIZE[0] - 32, 76)], fill="#20303c", width=2)
    for row, (item, price) in enumerate(LINES):
        _row(draw, 96 + 44 * row, item, price, body, "#303030")
    draw.line([(32, 236), (SIZE[0] - 32, 236)], fill="#20303c", width=2)
    total = sum(float(price) for _, price in LINES)
    _row(draw, 256, "Total", f"{total:.2f}", title, "#a01818")
    return image


def _row(draw: ImageDraw.ImageDraw, y: int, left: str, right: str, font: ImageFont.FreeTypeFont, fill: str) -> None:
    draw.text((32, y), left, font=font, fill=fill)
    draw.text((SIZE[0] - 32, y), right, font=font, fill=fill, anchor="ra")


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "images" / "receipt.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_receipt().save(target, optimize=True)
