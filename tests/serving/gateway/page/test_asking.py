"""Asking a model that can read, in a real browser: tiles, answers, turns, and what can be taken away."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Run
from gateway_calls import COUNT, image_part
from live_gateway import LiveGateway
from open_page import COUNTED, QUESTION, RECEIPT, OpenPage
from PIL import Image

from nvlm_trt.image.tiling import cut_tiles

Open = Callable[..., OpenPage]
ANSWER = "48.20"
HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>&amp;"


def test_the_answer_and_its_figures(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.add(RECEIPT)
    page.ask(QUESTION)
    page.wait_for_answer(ANSWER)
    reply = reading.chat([image_part(RECEIPT.read_bytes()), {"type": "text", "text": f"\n{QUESTION}"}], max_tokens=512)
    usage, figures = reply.json["usage"], page.figures()
    assert figures["prompt"] == f"{usage['prompt_tokens']} tokens"
    assert figures["cross-attended"] == f"{usage['nvlm']['cross_attended_tokens']} tokens"
    assert figures["answer"] == f"{usage['completion_tokens']} tokens"
    assert figures["images"] == f"{usage['prompt_tokens_details']['image_tiles']} tiles"
    for name in ("queue, images", "first token", "first text here", "speed"):
        assert re.fullmatch(r"\d+(\.\d)? (ms|tokens/s)", figures[name]), figures
    page.view.get_by_role("button", name="Regenerate").click()
    page.wait_for_answer(ANSWER)
    assert page.figures()["from the cache"] == "1 image"


def test_tiles_before_sending_are_those_of_the_command(
    open_page: Open, reading: LiveGateway, trained: Path, run_cli: Run, tmp_path: Path
) -> None:
    page = open_page(reading)
    page.add(RECEIPT)
    assert page.asked == []
    status, out, _ = run_cli("tiles", RECEIPT, "--output", tmp_path / "t.png", "--engine", trained, "--json")
    assert status == 0
    sheet = json.loads(out)
    attached = page.view.locator("#attachments")
    assert attached.locator(".tag").all_inner_texts() == sheet["tags"]
    columns, rows = sheet["grid"]
    tiling = f"{columns} × {rows} grid + thumbnail = {sheet['tiles']} tiles of {sheet['tile_size']} px"
    page.says(attached.locator(".tiling")).to_have_text(tiling)
    page.says(attached.locator(".size")).to_have_text("{} × {} px".format(*sheet["image_size"]))

    count = reading.post(COUNT, reading.body([image_part(RECEIPT.read_bytes())])).json
    tokens = [int(text.split()[0]) for text in attached.locator(".sheet .count").all_inner_texts()]
    (image,) = count["images"]
    assert (sum(tokens[:-1]), tokens[-1]) == (image["cross_tokens"], image["image_tokens"])
    page.says(page.view.locator("#count")).to_have_text(re.compile(f"^{count['input_tokens']} of 4096 tokens"))


def test_the_pixels_of_tiles(open_page: Open, reading: LiveGateway) -> None:
    """The browser reduces images by a filter of its own, so the pixels are nearly those that the model gets."""
    page = open_page(reading)
    page.add(RECEIPT)
    tiles = cut_tiles(Image.open(RECEIPT).convert("RGB"), 56, 6)
    canvases = page.view.locator("#attachments .sheet canvas")
    drawn = canvases.evaluate_all("canvases => canvases.map(canvas => canvas.toDataURL())")
    assert len(drawn) == len(tiles)
    for uri, tile in zip(drawn, tiles, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"), float)
        others = [np.abs(pixels - other.transpose(1, 2, 0)).mean() for other in tiles]
        own = np.abs(pixels - tile.transpose(1, 2, 0)).mean()
        assert own < 10
        assert own == min(others)  # equal for the two empty tiles


def test_a_question_that_is_sent_before_its_tiles_are_counted(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.says(page.view.locator("#model")).to_be_visible()
    page.view.locator("#text").fill(QUESTION)
    page.view.locator("#files").set_input_files(str(RECEIPT))
    page.view.locator("#text").press("Enter")
    page.wait_for_answer(ANSWER)
    page.says(page.view.locator(".question .tiling")).to_contain_text("7 tiles")


def test_fewer_tiles(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.add(RECEIPT)
    page.set(max_tiles=1)
    page.says(page.view.locator("#attachments .tiling")).to_have_text("1 tile of 56 px")
    page.ask(QUESTION)
    page.says(page.view.locator(".figures")).to_contain_text("1 tile")
    assert page.asked[0]["max_tiles"] == 1


def test_images_are_dropped_and_pasted(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    send = """([kind, data]) => {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
        const event = kind === "paste"
            ? new ClipboardEvent(kind, { clipboardData: transfer, bubbles: true, cancelable: true })
            : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
        document.querySelector("#text").dispatchEvent(event);
    }"""
    data = base64.b64encode(RECEIPT.read_bytes()).decode()
    page.view.evaluate(send, ["dragenter", data])
    page.says(page.view.locator("#dropping")).to_be_visible()
    page.view.evaluate(send, ["drop", data])
    page.says(page.view.locator("#dropping")).to_be_hidden()
    page.view.evaluate(send, ["paste", data])
    page.says(page.view.locator("#attachments .picture")).to_have_count(2)
    page.says(page.view.locator("#count")).to_have_text(re.compile("14 tiles"))
    page.view.get_by_role("button", name=re.compile("^Remove pasted")).first.click()
    page.says(page.view.locator("#count")).to_have_text(re.compile("7 tiles"))


def test_turns_are_sent_edited_and_asked_again(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.set(system="Be brief.", seed=7, temperature=0, top_p=0.9)
    page.add(RECEIPT)
    for question in (QUESTION, "And the tax?"):
        page.ask(question)
        page.says(page.view.locator("#stop")).to_be_hidden()
        page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1 + (question != QUESTION))
    body = page.asked[-1]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == ANSWER
    assert (body["seed"], body["temperature"], body["top_p"], body["max_tokens"]) == (7, 0, 0.9, 512)
    assert body["stream_options"] == {"include_usage": True}

    page.view.get_by_role("button", name="Edit").first.click()
    page.says(page.view.locator("#text")).to_have_value(QUESTION)
    page.says(page.view.locator("#attachments .picture")).to_have_count(1)
    page.ask("What is the tax?")
    page.says(page.view.locator(".exchange")).to_have_count(1)
    page.wait_for_answer("3.10")
    assert [message["role"] for message in page.asked[-1]["messages"]] == ["system", "user"]
    page.view.get_by_role("button", name="New").click()
    page.says(page.view.locator(".exchange")).to_have_count(0)
    page.says(page.view.locator("#empty")).to_be_visible()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_request_as_curl_and_as_python(open_page: Open, reading: LiveGateway) -> None:
    pytest.importorskip("openai", reason="needs openai: pip install 'nvlm-trt[test]'")
    page = open_page(reading)
    page.add(RECEIPT)
    page.set(max_tiles=6)
    page.ask(QUESTION)
    page.wait_for_answer(ANSWER)
    curl = page.copied("curl").replace("curl ", "curl --silent --noproxy '*' ", 1)
    program = page.copied("python")
    assert page.copied("copy") == ANSWER
    page.set(max_tiles=1, temperature=1)  # of what is asked next
    assert page.copied("curl").count('"max_tiles": 6') == 1
    assert '"temperature"' not in page.copied("curl")
    for command in (["bash", "-c", curl], [sys.executable, "-c", program]):
        done = subprocess.run(command, cwd=RECEIPT.parent, capture_output=True, text=True, check=True)
        assert ANSWER in done.stdout


def test_snippets_keep_every_character(open_page: Open, reading: LiveGateway, tmp_path: Path) -> None:
    image = tmp_path / "it's $(id) `x`.png"
    image.write_bytes(RECEIPT.read_bytes())
    page = open_page(reading)
    page.add(image)
    page.ask("""$HOME `id` $(id) \\n \\$ "quoted" 'single' EOF "url": "@image-0@" ü 漢 🙂""")
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    sent = {key: value for key, value in page.asked[0].items() if key not in ("stream", "stream_options")}

    shell = page.copied("curl").replace("curl ", "run ", 1)
    command = ["bash", "-c", f"run() {{ cat; }}\n{shell}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == sent

    program = page.copied("python")
    for theirs, ours in (
        ("from openai import OpenAI", "import json"),
        ("client = ", "#"),
        ("client.chat.completions.create(", "dict("),
        ("print(answer.choices[0].message.content)", "print(json.dumps(answer))"),
    ):
        assert program.count(theirs) == 1
        program = program.replace(theirs, ours)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == sent


SCHEMA = {
    "type": "object",
    "properties": {"url": {"const": True}, "total": {"enum": ["48.20", None]}},
    "required": ["url", "total"],
    "additionalProperties": False,
}


def test_an_answer_that_fits_a_schema(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.set(json_schema=json.dumps(SCHEMA))
    page.add(RECEIPT)
    page.ask(QUESTION)
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    assert json.loads(page.answers.last.inner_text())["url"] is True
    (sent,) = page.asked
    assert sent["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    program = page.copied("python").replace("print(answer.choices[0].message.content)", "print(answer)")
    program = program.replace("from openai import OpenAI", "").replace("client = ", "#")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("client.chat.completions.create(", "dict(")],
        cwd=RECEIPT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"'response_format': {sent['response_format']}" in done.stdout
    page.view.reload()
    page.says(page.view.locator("#json_schema")).to_have_value(json.dumps(SCHEMA))


@pytest.mark.parametrize(("text", "words"), [("{", "dictionary"), ('{"type": "text"}', "Invalid type: text")])
def test_a_schema_that_is_none(open_page: Open, reading: LiveGateway, text: str, words: str) -> None:
    page = open_page(reading)
    page.expected.append("400")
    page.set(json_schema=text)
    page.ask(QUESTION)
    page.says(page.fault).to_contain_text(words)


def test_the_export(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.set(key="secret-key")
    page.add(RECEIPT)
    page.ask(QUESTION)
    page.wait_for_answer(ANSWER)
    with page.view.expect_download() as download:
        page.view.get_by_role("button", name="Export").click()
    text = Path(download.value.path()).read_text()
    assert "secret-key" not in text
    exported = json.loads(text)
    assert exported["messages"] == [*page.asked[0]["messages"], {"role": "assistant", "content": ANSWER}]
    assert exported["answers"][0]["usage"]["prompt_tokens_details"]["image_tiles"] == 7
    assert exported["answers"][0]["images"][0]["columns"] == 3


def test_markup_in_an_answer_stays_text(open_page: Open, reading: LiveGateway) -> None:
    """The tiny model writes no markup, so the stream of this one answer is written here."""
    page = open_page(reading)
    chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.view.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.ask(HOSTILE)
    page.wait_for_answer(HOSTILE)
    page.says(page.view.locator(".question .text")).to_have_text(HOSTILE)
    assert page.view.locator(".exchange img, .exchange script").count() == 0
    assert page.view.title() == "nvlm-trt"


def test_counting_follows_the_text(open_page: Open, reading: LiveGateway) -> None:
    page = open_page(reading)
    page.view.locator("#text").press_sequentially("one")
    page.says(page.view.locator("#count")).to_have_text(re.compile(COUNTED))
    short = page.view.locator("#count").inner_text()
    page.view.locator("#text").press_sequentially(" and quite some words more")
    page.says(page.view.locator("#count")).not_to_have_text(re.compile(f"^({short})?$"))
    page.says(page.view.locator("#count")).to_have_text(re.compile(COUNTED))
