"""The tiny models' tokenizer."""

import pytest

from nvlm_trt.prompt.tokenizer import Tokenizer
from training.tokens import write_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder, 512, 6, rounds=300)
    return Tokenizer.from_directory(folder)
