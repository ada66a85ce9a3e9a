"""Makes the requests of the fuzz: number n of a seed is the same request in every run."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence

from tritonclient.grpc import service_pb2

from lab.reliability import values
from lab.reliability.http_cases import HTTP_KINDS
from lab.reliability.mutations import mutate
from lab.reliability.request_case import ANSWER, EITHER, REFUSAL, RequestCase
from lab.reliability.texts import broken, plain, text
from lab.reliability.valid_files import valid_files

MODELS = ("nvlm", "nvlm", "nvlm_ensemble", "image_encoder", "tiling", "vision_encoder", "absent", "", "../nvlm")
_TYPES = ("BYTES", "INT32", "FP32", "UINT8", "INT64", "BOOL", "FP16", "BF16", "", "STRING")

Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> datatype, shape, content


def request_case(seed: int, number: int) -> RequestCase:
    """Makes the request of a number."""
    source = random.Random(f"{seed} request {number}")
    kind = source.choice(KINDS)
    return kind(source)


def strings(*contents: bytes) -> tuple[str, list[int], bytes]:
    """Makes a tensor of strings."""
    return "BYTES", [len(contents)], b"".join(struct.pack("<I", len(content)) + content for content in contents)


def message(tensors: Mapping[str, tuple[str, list[int], bytes]], model: str = "nvlm") -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(model_name=model)
    for name, (datatype, shape, content) in tensors.items():
        made.inputs.add(name=name, datatype=datatype, shape=shape)
        made.raw_input_contents.append(content)
    return made


def image(source: random.Random, valid: bool = False) -> bytes:
    files = [file for file in valid_files() if file.read]
    file = source.choice(files)
    if valid:
        return file.data
    choice = source.randrange(8)
    if choice == 0:
        return b""
    if choice == 1:
        return source.randbytes(source.choice((1, 100, 10_000)))
    return mutate(source, file.data, source.choice(files).data)[0] if choice < 6 else file.data


def _valid(source: random.Random) -> RequestCase:
    """Asks what has to be answered."""
    tensors: Tensors = {"sampling_parameters": strings(values.dumped(values.valid_sampling(source)))}
    if source.random() < 0.5:
        tensors["prompt"] = strings(plain(source).encode())
    else:
        tensors["messages"] = strings(values.dumped(values.valid_messages(source)))
    if source.random() < 0.4:
        tensors["image"] = strings(*(image(source, valid=True) for _ in range(source.choice((1, 1, 2)))))
        tensors["max_tiles"] = ("INT32", [1], struct.pack("<i", source.randint(1, 6)))
    return RequestCase("a valid request", message(tensors), expected=ANSWER)


def _texts(source: random.Random) -> RequestCase:
    tensors: Tensors = {"sampling_parameters": strings(values.dumped(values.valid_sampling(source)))}
    if source.random() < 0.3:
        tensors["prompt"] = strings(broken(source).encode(errors="surrogatepass"))
        return RequestCase("half a surrogate pair", message(tensors), expected=REFUSAL)
    if source.random() < 0.1:
        tensors["prompt"] = strings(source.randbytes(source.randrange(1, 300)))
        return RequestCase("bytes that are seldom UTF-8", message(tensors))
    if source.random() < 0.05:
        tensors["prompt"] = strings((text(source) or "x").encode() * source.choice((1000, 20_000)))
        return RequestCase("a long text", message(tensors))
    tensors["prompt"] = strings(text(source).encode())
    return RequestCase("a text of many scripts", message(tensors))


def _sampling(source: random.Random) -> RequestCase:
    tensors = {
        "prompt": strings(plain(source).encode()),
        "sampling_parameters": strings(values.dumped(values.sampling(source))),
    }
    return RequestCase("odd sampling parameters", message(tensors), take=source.choice((1, 3, 20)))


def _conversation(source: random.Random) -> RequestCase:
    tensors: Tensors = {
        "messages": strings(values.dumped(values.messages(source))),
        "sampling_parameters": strings(values.dumped(values.valid_sampling(source))),
    }
    if source.random() < 0.4:
        tensors["image"] = strings(*(image(source) for _ in range(source.choice((1, 2, 3)))))
    return RequestCase("odd messages", message(tensors))


def _json_text(source: random.Random) -> RequestCase:
    name = source.choice(("messages", "sampling_parameters"))
    choice = source.randrange(3)
    written = (
        values.nested(source, source.choice((10, 500, 5_000, 100_000)))
        if choice == 0
        else source.randbytes(40)
        if choice == 1
        else mutate(source, values.dumped(values.valid_messages(source)), b'{"temperature": 0.5}')[0]
    )
    tensors = {name: strings(written)} | ({} if name == "messages" else {"prompt": strings(b"Hello")})
    return RequestCase(f"damaged JSON in {name}", message(tensors), take=3)


def _images(source: random.Random) -> RequestCase:
    count = source.choice((0, 1, 1, 1, 2, 3, 17, 40))
    tensors: Tensors = {
        "prompt": strings(plain(source).encode() + b" <image>" * source.choice((0, 0, 1, 2))),
        "sampling_parameters": strings(b'{"max_tokens": 2}'),
        "image": strings(*(image(source) for _ in range(count))),
    }
    if source.random() < 0.02:
        tensors["image"] = strings(image(source, valid=True) + bytes(33 << 20))
    if source.random() < 0.5:
        tiles = source.choice((1, 2, 6, 7, 0, -1, 2**31 - 1, -(2**31)))
        tensors["max_tiles"] = ("INT32", [1], struct.pack("<i", tiles))
    return RequestCase(f"{count} images, some damaged", message(tensors), ours=count > 0)


def _tensors(source: random.Random) -> RequestCase:
    """Sends tensors whose type, shape or content is not the model's: tritonserver's own checks refuse most of them."""
    tensors: Tensors = {"prompt": strings(b"Hello"), "sampling_parameters": strings(b'{"max_tokens": 2}')}
    for _ in range(source.choice((1, 1, 2))):
        name = source.choice((*tensors, "image", "max_tiles", "image_tokens", "tiles_per_image", "other", ""))
        shape = [source.choice((0, 1, 2, 3, 16, 192, -1, 2**31, 2**62)) for _ in range(source.choice((0, 1, 1, 3)))]
        tensors[name] = (
            source.choice(_TYPES),
            shape,
            source.choice((b"", bytes(4), bytes(8), source.randbytes(30), strings(b"Hello")[2])),
        )
    made = message(tensors, source.choice(MODELS))
    for _ in range(source.choice((0, 0, 1, 2))):
        _change(source, made)
    return RequestCase("wrong tensors", made, take=3, ours=False)


def _change(source: random.Random, made: service_pb2.ModelInferRequest) -> None:
    """Changes parts of a message that clients seldom send."""
    choice = source.randrange(7)
    if choice == 0 and made.raw_input_contents:
        del made.raw_input_contents[-1]
    elif choice == 1:
        made.raw_input_contents.append(source.randbytes(9))
    elif choice == 2:
        made.model_version = source.choice(("1", "7", "-1", "x" * 1000))
    elif choice == 3:
        made.outputs.add(name=source.choice(("text", "absent", "")))
    elif choice == 4:
        name = source.choice(("sequence_id", "priority", "timeout", "shared_memory_region", "triton_x", "x"))
        made.parameters[name].int64_param = source.choice((0, 1, -1, 2**62))
    elif choice == 5 and made.inputs:
        made.inputs[0].parameters["shared_memory_region"].string_param = "region"
        made.inputs[0].parameters["shared_memory_byte_size"].int64_param = 64
    elif made.inputs:
        made.inputs[0].contents.bytes_contents.append(b"Hello")


def _missing(source: random.Random) -> RequestCase:
    both: Tensors = {"prompt": strings(b"Hello"), "messages": strings(values.dumped(values.valid_messages(source)))}
    return source.choice(
        (
            RequestCase("both prompt and messages", message(both), expected=REFUSAL),
            RequestCase("neither prompt nor messages", message({}), expected=EITHER, ours=False),
            RequestCase("an empty prompt", message({"prompt": strings(b"")}), expected=REFUSAL),
        )
    )


KINDS: Sequence[Callable[[random.Random], RequestCase]] = (
    _valid,
    _valid,
    _texts,
    _sampling,
    _sampling,
    _conversation,
    _json_text,
    _images,
    _tensors,
    _missing,
    *HTTP_KINDS,
)
