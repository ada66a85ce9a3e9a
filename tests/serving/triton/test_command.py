from __future__ import annotations

from pathlib import Path

import pytest

from nvlm_trt.serving.triton.command import triton_command


@pytest.mark.parametrize("knows", [True, False])
def test_http_requests_are_bounded_where_the_server_has_an_option_for_it(knows: bool, tmp_path: Path) -> None:
    executable = tmp_path / "tritonserver"
    executable.write_bytes(b"\0http-port\0" + b"http-max-input-size\0" * knows)
    command = triton_command(
        executable,
        tmp_path / "models",
        tmp_path / "backends",
        "127.0.0.1",
        (1, 2, 3),
        "prefix_",
        answer_seconds=2.5,
        exit_seconds=40.5,
        request_bytes=300,
    )
    assert ("--http-max-input-size=400" in command) == knows
    assert "--grpc-max-connection-age-grace=2500" in command
    assert "--exit-timeout-secs=41" in command
