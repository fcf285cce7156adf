"""The engine of one process, on runtimes whose images have the seeds' colors: nothing is lost, crossed or drawn in vain."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.serve import drawing, images
from sana_export.serve.config import ModelConfig, QueueConfig, ServeConfig
from sana_export.serve.engine import Accepted, Finished, ImageJob, Partial
from sana_export.serve.errors import Refusal, answer
from sana_export.serve.filters import ContentFilters, ContentRefused
from sana_export.serve.models import ModelStore
from sana_export.serve.worker import LocalEngine
from tests.support.serving import StandInRuntime, color, image_file, picture, pixel

Scene = Callable[[LocalEngine, Any], Awaitable[None]]


class Served:
    """Engines over stand-in runtimes, which are known by the names of their models."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.runtimes: list[StandInRuntime] = []

    def play(self, scene: Scene, *, filters: Any = (), keys: tuple[str, ...] = (), budget: int | None = None, **queue: Any) -> None:
        """Run a scene with an engine and the first runtime, which is loaded."""
        models = tuple(ModelConfig(name, self.bundle, device=index) for index, name in enumerate(("one", "two")))
        config = ServeConfig(
            models, queue=replace(QueueConfig(), **queue), keys=dict.fromkeys(keys, "k" * 16), memory_budget=budget
        )
        store = ModelStore(config.models, budget, opener=self._open)

        async def main() -> None:
            engine = LocalEngine(config, store=store, filters=ContentFilters(filters))
            engine.load()
            try:
                await asyncio.wait_for(scene(engine, self.runtimes[0]), 30)
            finally:
                engine.close()

        asyncio.run(main())

    def _open(self, config: ModelConfig, folder: Path) -> Any:
        self.runtimes.append(StandInRuntime(config, folder))
        return self.runtimes[-1]


@pytest.fixture
def served(tiny_bundle: Path) -> Served:
    return Served(tiny_bundle)


def job(*seeds: int, model: str = "one", timeout: float = 20.0, **others: Any) -> ImageJob:
    words = {"prompt": "a cat", "num_inference_steps": 3, **others.pop("words", {})}
    return ImageJob(model, words, seeds, timeout, **others)


async def finished(engine: LocalEngine, wanted: ImageJob) -> Finished:
    events = [event async for event in engine.submit(wanted)]
    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Finished)
    return events[-1]


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def refused(engine: LocalEngine, wanted: ImageJob) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await finished(engine, wanted)
    return caught.value


def test_every_client_gets_the_images_of_its_own_seeds(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        jobs = [job(seed, seed + 1, seed + 2, key=f"k{seed % 3}") for seed in range(0, 60, 3)]
        for wanted, result in zip(jobs, await asyncio.gather(*(finished(engine, each) for each in jobs)), strict=True):
            assert result.seeds == wanted.seeds
            assert [pixel(content) for content in result.images] == [color(seed) for seed in wanted.seeds]
        assert sorted(seed for batch in runtime.batches for seed in batch) == list(range(60))
        assert max(map(len, runtime.batches)) == 4

    served.play(scene)


def test_only_compatible_requests_share_a_batch(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        first = asyncio.create_task(finished(engine, job(0)))
        await until(lambda: runtime.batches == [[0]])
        others = [job(1), job(2, words={"num_inference_steps": 4}), job(3, words={"prompt": "a dog"}), job(4, partial_images=1)]
        tasks = [asyncio.create_task(finished(engine, each)) for each in others]
        await until(lambda: engine.status().waiting == 4)
        runtime.gate.set()
        results = await asyncio.gather(first, *tasks)
        assert sorted(map(sorted, runtime.batches)) == [[0], [1, 3], [2], [4]]
        assert [result.batch for result in results] == [1, 2, 1, 2, 1]

    served.play(scene)


def test_an_image_of_a_batch_of_one_is_drawn_alone(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        await asyncio.gather(*(finished(engine, job(seed)) for seed in range(5)))
        assert list(map(len, runtime.batches)) == [1] * 5

    served.play(scene, max_batch=1)


def test_a_client_that_leaves_frees_its_place_and_stops_its_sampling(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        drawing = asyncio.create_task(finished(engine, job(1)))
        await until(lambda: engine.status().running == 1)
        waiting = asyncio.create_task(finished(engine, job(2)))
        await until(lambda: engine.status().waiting == 1)
        waiting.cancel()
        await until(lambda: engine.status().waiting == 0)
        drawing.cancel()
        await until(lambda: engine.status().running == 0)
        assert (runtime.batches, runtime.steps_taken) == ([[1]], 0)
        runtime.gate.set()
        assert pixel((await finished(engine, job(3))).images[0]) == color(3)
        assert runtime.batches == [[1], [3]]

    served.play(scene)


def test_a_batch_goes_on_while_one_of_its_clients_is_there(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        tasks = [asyncio.create_task(finished(engine, job(seed))) for seed in (1, 2)]
        runtime.gate.clear()
        await until(lambda: engine.status().running == 2)
        tasks[0].cancel()
        runtime.gate.set()
        assert pixel((await tasks[1]).images[0]) == color(2)

    served.play(scene, batch_wait_ms=200, max_batch=2)


def test_a_generator_that_is_closed_early_frees_its_place(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        events = engine.submit(job(1))
        assert isinstance(await anext(events), Accepted)
        await until(lambda: engine.status().running == 1)
        await events.aclose()
        await until(lambda: engine.status().running == 0)
        assert runtime.steps_taken == 0

    served.play(scene)


def test_a_deadline_ends_a_request_and_its_sampling(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        first, second = await asyncio.gather(
            *(refused(engine, job(seed, timeout=0.2, words={"num_inference_steps": seed})) for seed in (1, 2))
        )
        assert (first.code, second.code) == ("timeout", "timeout")
        assert str(first) == "the image was not ready after 0.2 seconds"
        await until(lambda: engine.status().running == engine.status().waiting == 0)
        assert runtime.steps_taken == 0

    served.play(scene)


def test_a_call_that_does_not_return_makes_the_server_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "STEP_SECONDS", 0.3)

    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        returns = threading.Event()
        monkeypatch.setattr(runtime, "generate_many", lambda *_, **__: returns.wait(20) and [])
        assert (await refused(engine, job(1, timeout=0.2))).code == "timeout"
        assert engine.status().ready  # its step may still end
        await until(lambda: not engine.status().ready)
        assert re.fullmatch(r"a call that draws has not returned for \d+ seconds; a request may take 0.2", engine.status().reason)
        monkeypatch.undo()
        returns.set()
        await until(lambda: engine.status().ready)
        assert pixel((await finished(engine, job(2))).images[0]) == color(2)

    served.play(scene, timeout=0.2)


def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(finished(engine, job(seed))) for seed in (0, 1)]
        await until(lambda: engine.status().running == 1 and engine.status().waiting == 1)
        tasks += [asyncio.create_task(finished(engine, job(seed))) for seed in (2, 3)]
        await until(lambda: engine.status().waiting == 3)
        refusal = await refused(engine, job(4))
        assert (refusal.code, refusal.retry_after) == ("queue_full", 2)  # half of 3 images of a second each
        runtime.gate.set()
        await asyncio.gather(*tasks)

    served.play(scene, places=3, max_batch=1)


def test_drain_finishes_what_runs_and_refuses_what_waits(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        running = asyncio.create_task(finished(engine, job(1)))
        await until(lambda: engine.status().running == 1)
        waiting = asyncio.create_task(refused(engine, job(2)))
        await until(lambda: engine.status().waiting == 1)
        draining = asyncio.create_task(engine.drain())
        assert (await waiting).code == "shutting_down"
        assert (await refused(engine, job(3))).code == "shutting_down"
        assert not engine.status().ready
        assert not draining.done()
        runtime.gate.set()
        assert pixel((await running).images[0]) == color(1)
        await draining

    served.play(scene)


def test_drain_finishes_all_images_of_a_request_that_runs(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        running = asyncio.create_task(finished(engine, job(1, 2, 3)))
        await until(lambda: engine.status().running == 1)
        waiting = asyncio.create_task(refused(engine, job(4, 5)))
        await until(lambda: engine.status().waiting == 4)
        draining = asyncio.create_task(engine.drain())
        assert (await waiting).code == "shutting_down"
        runtime.gate.set()
        assert [pixel(content) for content in (await running).images] == [color(seed) for seed in (1, 2, 3)]
        await draining
        assert runtime.batches == [[1], [2], [3]]

    served.play(scene, max_batch=1)


def test_close_stops_what_runs(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        running = asyncio.create_task(refused_or_cancelled(engine, job(1)))
        await until(lambda: engine.status().running == 1)
        await asyncio.to_thread(engine.close)
        assert await running == "shutting_down"
        assert runtime.closed

    async def refused_or_cancelled(engine: LocalEngine, wanted: ImageJob) -> str:
        try:
            await finished(engine, wanted)
        except Exception as error:
            return answer(error).code
        return "finished"

    served.play(scene)


def test_what_does_not_fit_together_is_drawn_alone(served: Served) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.fails = lambda seeds: DependencyError("out of memory") if len(seeds) > 1 else None
        results = await asyncio.gather(*(finished(engine, job(seed)) for seed in (1, 2, 3)))
        assert [pixel(result.images[0]) for result in results] == [color(seed) for seed in (1, 2, 3)]

    served.play(scene, batch_wait_ms=200, max_batch=3)
    assert served.runtimes[0].closed  # its memory is free for the next attempt
    assert sorted(served.runtimes[1].batches) == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DependencyError("out of memory", fix="--memory staged"), 503, "out_of_resources"),
        (ArtifactError("/secret/bundle is damaged", fix="sana-export export"), 500, "model_damaged"),
        (ZeroDivisionError("/secret"), 500, "internal_error"),
    ],
)
def test_a_failed_model_is_loaded_again_and_the_server_lives_on(
    served: Served, error: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.fails = lambda seeds: error
        with pytest.raises(type(error)) as caught:
            await finished(engine, job(1, request_id="r1"))
        found = answer(caught.value, "one")
        assert (found.status, found.code) == (status, code)
        assert "'one'" in found.body["error"]["message"] or code == "internal_error"
        assert not any(word in str(found) for word in ("secret", "export export", "--memory"))
        assert pixel((await finished(engine, job(2))).images[0]) == color(2)

    served.play(scene)
    assert [runtime.batches for runtime in served.runtimes] == [[[1]], [[2]]]
    assert f"request r1: the model one failed: {error}" in caplog.text


def test_a_model_that_cannot_be_loaded_is_the_servers_fault(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def use(store: ModelStore, name: str) -> Any:
        raise UsageError("there is no LoRA", found="/secret/a.safetensors", wanted="a file")

    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        monkeypatch.setattr(ModelStore, "use", use)
        with pytest.raises(ArtifactError) as caught:
            await finished(engine, job(1, request_id="r1"))
        found = answer(caught.value, "one")
        assert (found.status, found.code) == (500, "model_damaged")
        assert "secret" not in str(found)

    served.play(scene)
    assert "request r1: the model one failed: there is no LoRA" in caplog.text
    assert "/secret/a.safetensors" in caplog.text


def test_requests_are_checked_before_they_wait(served: Served, tiny_bundle: Path) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        for words, text in (
            ({"scheduler": "nope"}, "unknown scheduler 'nope'"),
            ({"guidance_scale": 1e9}, "guidance_scale is out of range"),
            ({"strength": 0.5}, "strength has no meaning without an image"),
        ):
            refusal = await refused(engine, job(1, words=words))
            assert refusal.code == "invalid_value"
            assert text in str(refusal)
            assert str(tiny_bundle) not in str(refusal)
        assert (await refused(engine, job(1, model="three"))).code == "model_not_found"
        assert (await refused(engine, job(1, image=b"x"))).param == "model"
        assert runtime.batches == []

    served.play(scene)


def test_an_error_of_one_image_is_its_own(served: Served) -> None:
    class OneFails(StandInRuntime):
        def generate_many(self, requests: Any, **others: Any) -> Any:
            for request, result in zip(requests, super().generate_many(requests, **others), strict=True):
                yield UsageError("too large", found=f"{self.bundle}/x") if request.seed == 2 else result

    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        good, bad = await asyncio.gather(finished(engine, job(1)), refused(engine, job(2)))
        assert pixel(good.images[0]) == color(1)
        assert str(bad) == "too large; found: one/x"

    served._open = lambda config, folder: served.runtimes.append(OneFails(config, folder)) or served.runtimes[-1]  # type: ignore[method-assign, func-returns-value]
    served.play(scene, batch_wait_ms=200, max_batch=2)


def test_filters_see_prompts_before_and_images_after(served: Served) -> None:
    class Filter:
        def check_prompt(self, prompt: str, negative_prompt: str) -> None:
            if "dog" in prompt or "dog" in negative_prompt:
                raise ContentRefused("no dogs here")

        def check_image(self, image: Any, prompt: str) -> None:
            assert prompt == "a cat"
            if image.getpixel((0, 0)) == color(2):
                raise ContentRefused()
            if image.getpixel((0, 0)) == color(3):
                raise OSError("the filter is broken")

    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        for words in ({"prompt": "a dog"}, {"negative_prompt": "dog"}):
            refusal = await refused(engine, job(9, words=words))
            assert (refusal.code, str(refusal)) == ("content_policy_violation", "no dogs here")
        assert runtime.batches == []
        assert (await refused(engine, job(2))).code == "content_policy_violation"
        with pytest.raises(OSError, match="broken"):
            await finished(engine, job(3))
        assert pixel((await finished(engine, job(1))).images[0]) == color(1)
        assert len(served.runtimes) == 1

    served.play(scene, filters=[Filter()])


def test_a_long_life_keeps_nothing(served: Served) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(each) in (ImageJob, Partial, Finished) for each in gc.get_objects())

    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        before = alive()
        for round_ in range(2):
            await asyncio.gather(*(finished(engine, job(seed)) for seed in range(12)))
            runtime.gate.clear()
            leaving = [asyncio.create_task(finished(engine, job(seed))) for seed in range(12)]
            await until(lambda: engine.status().waiting >= 8)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            runtime.gate.set()
            del leaving, task, round_
        await finished(engine, job(1))
        await until(lambda: engine.status().running == 0)
        assert alive() <= before + 2

    served.play(scene)


def test_uploads_are_decoded_when_their_turn_comes(img2img_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting edits hold no pixels, and the edits of one key do not delay another key's image by more than a turn."""
    decoded: list[str] = []
    read = images.read_upload

    def counted(name: str, *others: Any) -> Image.Image:
        decoded.append(name)
        return read(name, *others)

    monkeypatch.setattr(images, "read_upload", counted)

    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        runtime.gate.clear()
        files = {"image": image_file(picture(1, (64, 32))), "mask": image_file(Image.new("L", (64, 32)))}
        edits = [asyncio.create_task(finished(engine, job(seed, key="alice", **files))) for seed in range(4)]
        await until(lambda: engine.status().running == 1 and engine.status().waiting == 3 and runtime.batches)
        bob = asyncio.create_task(finished(engine, job(9, key="bob")))
        await until(lambda: engine.status().waiting == 4)
        assert decoded == ["image", "mask"]
        runtime.gate.set()
        await asyncio.gather(bob, *edits)
        assert [batch for [batch] in runtime.batches].index(9) <= 2
        assert decoded == ["image", "mask"] * 4

    Served(img2img_bundle).play(scene, keys=("alice", "bob"))


def test_bad_uploads_are_the_clients_error_before_and_after_they_wait(img2img_bundle: Path) -> None:
    async def scene(engine: LocalEngine, runtime: StandInRuntime) -> None:
        whole = image_file(picture(1, (64, 64)))
        with pytest.raises(Refusal) as caught:
            await anext(engine.submit(job(1, image=b"text")))
        assert (caught.value.code, caught.value.param) == ("invalid_image", "image")
        for files in ({"image": whole[:-30]}, {"image": whole, "mask": whole[:-30]}):
            events = engine.submit(job(1, **files))
            assert isinstance(await anext(events), Accepted)
            with pytest.raises(Refusal) as caught:
                await anext(events)
            assert (caught.value.code, caught.value.param) == ("invalid_image", "mask" if "mask" in files else "image")
        assert pixel((await finished(engine, job(2, image=whole))).images[0]) == color(2)
        assert runtime.batches == [[2]]

    Served(img2img_bundle).play(scene)
