"""What TensorRT logs reaches the piece of work that caused it, also if several run at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from sana_export.contract import GraphSpec
from sana_export.errors import ArtifactError
from sana_export.profiles import Range
from sana_export.trt.build import build_engine
from sana_export.trt.logger import CollectedLog, logger_for
from tests.support.small_bundles import sampler, vae_decoder

ERROR, INFO = tensorrt_rtx.ILogger.Severity.ERROR, tensorrt_rtx.ILogger.Severity.INFO


class Module:
    ILogger = tensorrt_rtx.ILogger


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def test_threads_collect_apart() -> None:
    logger, both = logger_for(Module), threading.Barrier(2)

    def work(name: str, activations: int) -> CollectedLog:
        with logger.collect() as log:
            for index in range(3):
                both.wait()
                logger.log(ERROR, f"{name} {index}")
                logger.log(INFO, f"Total Activation Memory: {activations + index}")
            both.wait()
        return log

    first, second = in_threads(lambda: work("first", 100), lambda: work("second", 200))
    assert (first.errors, first.activation_bytes) == (["first 0", "first 1", "first 2"], 102)
    assert (second.errors, second.activation_bytes) == (["second 0", "second 1", "second 2"], 202)


def test_nothing_is_kept_between_two_pieces_of_work() -> None:
    logger = logger_for(Module)
    with logger.collect() as before:
        logger.log(ERROR, "before")
        logger.log(INFO, "Total Activation Memory: 7")
    logger.log(ERROR, "between")
    with logger.collect() as log:
        pass
    assert before.errors == ["before"]
    assert (log.errors, log.activation_bytes) == ([], 0)


def test_an_inner_log_takes_what_is_said_while_it_is_open() -> None:
    logger = logger_for(Module)
    with logger.collect() as outer:
        with logger.collect() as inner:
            logger.log(ERROR, "inner")
        logger.log(ERROR, "outer")
    assert (inner.errors, outer.errors) == (["inner"], ["outer"])


def test_a_thread_of_the_library_reaches_every_open_log() -> None:
    logger = logger_for(Module)
    with logger.collect() as log:
        in_threads(lambda: logger.log(ERROR, "from the library's own thread"))
    assert log.errors == ["from the library's own thread"]


RANGES: dict[str, Range] = {"batch": (1, 1, 2), "branches": (1, 2, 3), "latent_height": (4, 8, 16), "latent_width": (4, 8, 24)}


def test_two_builds_at_once_do_not_mix(tmp_path: Path) -> None:
    """With the real compiler: each engine has its own activation bytes, and a broken graph only its own error."""

    def build(make: Callable[[Path, int], GraphSpec], name: str) -> int:
        spec = make(tmp_path / name / "model.onnx", 0)
        return build_engine(tensorrt_rtx, tmp_path / name / "model.onnx", tmp_path / name / "e", spec, RANGES).activation_bytes

    def broken() -> str:
        spec = sampler(tmp_path / "broken" / "model.onnx", 0)
        (tmp_path / "broken" / "model.onnx").write_bytes(b"not an ONNX file" * 9)
        with pytest.raises(ArtifactError) as caught:
            build_engine(tensorrt_rtx, tmp_path / "broken" / "model.onnx", tmp_path / "broken" / "e", spec, RANGES)
        return str(caught.value)

    alone = [build(sampler, "a"), build(vae_decoder, "b"), broken()]
    together = in_threads(lambda: build(sampler, "c"), lambda: build(vae_decoder, "d"), broken)
    assert 0 < alone[0] < alone[1]
    assert together == alone
