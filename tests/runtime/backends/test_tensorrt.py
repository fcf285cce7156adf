"""The TensorRT backend on a device in host memory, with engines that run the bundle's own ONNX files.

Everything but the GPU's own calls is real here: what is enqueued when, at which addresses, in whose memory, what is captured and
replayed. The images must be those of ONNX Runtime, which other tests compare with diffusers.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sana_export.errors import UsageError
from sana_export.machine import Gpu
from sana_export.profiles import Profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.base import BackendSettings
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.runtime.backends.tensorrt_options import EngineOptions
from sana_export.runtime.request import Request
from sana_export.runtime.sampling import sampler_feeds
from sana_export.trt.compatibility import Host
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy, HostTensorRT, with_engines

SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 3}
HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")
WIDE = Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512)))
#: float32 in another order: text tokens are padded to a multiple of 32 here.
TOLERANCE = 2e-4


def pixels(images: Any) -> npt.NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def opened(bundle: Path, device: HostDevice, module: HostTensorRT, *, engine_options: Any = None, **options: Any) -> SanaRuntime:
    settings = BackendSettings(options=engine_options or {})

    def backend(bundle: Path, manifest: Any) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", settings, module=module, device=device, machine=HERE)

    return SanaRuntime.from_pretrained(bundle, backend=backend, **options)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    with_engines(copy, WIDE)
    return copy


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def module(device: HostDevice) -> HostTensorRT:
    return HostTensorRT(device)


@pytest.fixture
def runtime(bundle: Path, device: HostDevice, module: HostTensorRT) -> SanaRuntime:
    return opened(bundle, device, module)


def assert_same(runtime: SanaRuntime, reference: SanaRuntime, prompt: Any, **options: Any) -> Any:
    options = {**SMALL, "seed": 7, **options}
    found = runtime(prompt, output_type="latent", **options).images
    wanted = reference(prompt, output_type="latent", **options).images
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    difference = pixels(runtime(prompt, **options).images) - pixels(reference(prompt, **options).images)
    assert np.abs(difference).max() <= 1
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"pag_scale": 2.0, "negative_prompt": "blue"},
        {"pag_scale": 2.0, "guidance_scale": 1.0, "pag_adaptive_scale": 0.004},
        {"prompt": ["fox", "一只可爱的熊猫在吃竹子", ""], "num_images_per_prompt": 2, "seed": [1, 2, 3, 4, 5, 6]},
        {"prompt": "a very detailed painting of a house by the lake, " * 60},
        {"height": 128, "width": 128, "decoder_tile": 64},
        {"num_inference_steps": 1},
        {"num_inference_steps": 4},
        {"complex_human_instruction": False, "negative_prompt": "blurry, bad anatomy"},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_images_are_those_of_onnxruntime(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice, options: dict[str, Any]
) -> None:
    options = {"prompt": "A cute 🐼 eating 🎋", **options}
    assert_same(runtime, tiny_runtime, options.pop("prompt"), **options)
    assert (device.captures, device.replays) == (1, 2)


def test_a_captured_loop_serves_other_prompts_seeds_and_scales(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT
) -> None:
    first = assert_same(runtime, tiny_runtime, "a red fox")
    assert device.captures == 1
    others = [
        assert_same(runtime, tiny_runtime, "a blue whale"),
        assert_same(runtime, tiny_runtime, "a red fox", seed=8),
        assert_same(runtime, tiny_runtime, "a red fox", guidance_scale=7.0),
        assert_same(runtime, tiny_runtime, "", negative_prompt="red"),
    ]
    assert device.captures == 1
    assert all(np.abs(first - other).max() > 0.1 for other in others)
    # Other shapes have loops of their own, and the first one is still there afterwards.
    assert_same(runtime, tiny_runtime, "a red fox", width=96)
    assert_same(runtime, tiny_runtime, "a red fox", num_inference_steps=2)
    assert_same(runtime, tiny_runtime, "a red fox", pag_scale=2.0)
    assert device.captures == 4
    np.testing.assert_array_equal(assert_same(runtime, tiny_runtime, "a red fox"), first)
    assert device.captures == 4
    assert module.loads == len(set(module.runs))


#: A request, and the changes of it that run in between. The last two have the same shapes, in loops of their own.
OTHERS: list[dict[str, Any]] = [
    {"pag_scale": 2.0},
    {"guidance_scale": 1.0},
    {"width": 96},
    {"prompt": "a very detailed painting of a house by the lake, " * 10},
    {"num_images_per_prompt": 2},
    {"num_inference_steps": 2},
    {"callback_on_step_end": lambda *_: None},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_a_captured_loop_stays_valid_whatever_runs_in_between(
    runtime: SanaRuntime, device: HostDevice, other: dict[str, Any]
) -> None:
    """The stand-in fails if captured work runs after its context has changed."""

    def drawn(**changes: Any) -> Any:
        return runtime(**{"prompt": "a red fox", "seed": 7, **SMALL, **changes}).images

    runtime.backend.shared.reserve(1 << 24)  # enough for all of them, so it does not move  # type: ignore[attr-defined]
    first = drawn()
    assert device.captures == 1
    between = drawn(**other)
    captures = device.captures
    assert pixels(drawn()).tolist() == pixels(first).tolist()
    assert pixels(drawn(**other)).tolist() == pixels(between).tolist()
    assert device.captures == captures, "each is captured once"


def test_runs_of_a_graph_do_not_disturb_captured_work(runtime: SanaRuntime, device: HostDevice) -> None:
    first = runtime("a red fox", seed=7, **SMALL).images
    latents = np.random.default_rng(0).normal(size=(2, 32, 4, 4)).astype(np.float32)
    feeds = sampler_feeds(latents[None], latents, [latents] * 3, latents, np.ones(8, np.float32), np.ones(1, np.float32))
    runtime.run("sampler", feeds)
    assert runtime("a red fox", seed=7, **SMALL).images == first
    assert device.captures == 1


def test_a_loop_is_captured_again_when_its_memory_has_moved(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice
) -> None:
    def drawn(**changes: Any) -> None:
        options = {**SMALL, "seed": 7, **changes}
        found, wanted = (pixels(by("a red fox", **options).images) for by in (runtime, tiny_runtime))
        assert np.abs(found - wanted).max() <= 1

    drawn()
    generation = runtime.backend.generation
    drawn(height=512, width=512, num_inference_steps=1)
    assert runtime.backend.generation > generation
    assert device.captures == 2
    for _ in range(2):
        drawn()
        assert device.captures == 3


@pytest.mark.parametrize("by_hand", [False, True], ids=["called", "stage by stage"])
def test_the_loop_is_captured_once_though_the_decoder_needs_more_memory(
    runtime: SanaRuntime, device: HostDevice, module: HostTensorRT, by_hand: bool
) -> None:
    """The block has its final size before the loop is captured."""
    module.work_factors = {"vae_decoder": 1000}

    def draw() -> None:
        if not by_hand:
            runtime("a red fox", seed=7, **SMALL)
            return
        plan = runtime.plan(Request("a red fox", seed=7, **SMALL))
        *_, last = runtime.steps(plan, runtime.encode(plan))
        runtime.decode(plan, last.latents)

    for _ in range(2):
        draw()
        assert device.captures == (SMALL["num_inference_steps"] if by_hand else 1)


def test_tiles_are_reserved_before_the_loop_is_captured(runtime: SanaRuntime, device: HostDevice, module: HostTensorRT) -> None:
    module.work_factors = {"vae_decoder_tail": 1000}
    for _ in range(2):
        runtime("a red fox", seed=7, decoder_tile=64, **SMALL)
        assert device.captures == 1


def test_steps_are_replayed_one_by_one_for_a_callback(runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice) -> None:
    replacement = np.random.default_rng(0).normal(size=(1, 32, 3, 5)).astype(np.float32)

    def drawn(by: SanaRuntime) -> tuple[list[Any], Any]:
        seen: list[Any] = []

        def callback(_: Any, index: int, timestep: float, values: dict[str, Any]) -> dict[str, Any] | None:
            seen.append((index, timestep, values["latents"].copy()))
            values["latents"][:] = 9  # a copy: of no effect
            return {"latents": replacement} if index == 1 else None

        result = by("fox", seed=4, output_type="latent", callback_on_step_end=callback, **{**SMALL, "num_inference_steps": 4})
        return seen, result

    (ours, found), (theirs, wanted) = drawn(runtime), drawn(tiny_runtime)
    assert [step[:2] for step in ours] == [step[:2] for step in theirs]
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine[2], reference[2], atol=TOLERANCE)
    np.testing.assert_allclose(found.images, wanted.images, atol=TOLERANCE)
    assert device.captures == 4
    assert len(found.timings.denoise) == 4
    drawn(runtime)
    assert (device.captures, device.replays) == (4, 8)


def test_the_steps_that_a_caller_drives_stay_as_they_are(runtime: SanaRuntime, tiny_runtime: SanaRuntime) -> None:
    def steps(by: SanaRuntime) -> list[Any]:
        plan = by.plan(Request("fox", output_type="latent", seed=8, **SMALL))
        listed = list(by.steps(plan, by.encode(plan)))
        return [[by.backend.to_host(tensor) for tensor in (step.latents, step.x0)] for step in listed]

    for found, wanted in zip(steps(runtime), steps(tiny_runtime), strict=True):
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    "scheduler", [{"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "dpm++3m-sde", "heun"], ids=str
)
def test_every_step_finds_the_x0_of_those_before(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice, scheduler: Any
) -> None:
    """Also in the second run of a captured loop, whose buffers hold the last x0 of the first one."""
    options = {**SMALL, "num_inference_steps": 7, "scheduler": scheduler, "output_type": "latent"}
    for seed in (3, 4):
        found, wanted = (by("a red fox", seed=seed, **options).images for by in (runtime, tiny_runtime))
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    assert (device.captures, device.replays) == (1, 2)


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        ({"guidance_interval": (0.2, 0.8)}, 3),
        ({"guidance_interval": (0.4, 1)}, 2),
        ({"pag_scale": 2.0, "pag_interval": (0, 0.4)}, 2),
        ({"pag_scale": 2.0, "pag_interval": (0, 0.4), "guidance_interval": (0.2, 0.6)}, 4),
        ({"pag_scale": 2.0, "pag_interval": (0, 0.4), "guidance_interval": (0.4, 1), "num_images_per_prompt": 2}, 2),
    ],
    ids=str,
)
def test_each_segment_of_an_interval_is_captured_once(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice, options: dict[str, Any], segments: int
) -> None:
    options = {"num_inference_steps": 5, "negative_prompt": "blue, a long negative prompt", **options}
    assert_same(runtime, tiny_runtime, "a red fox", **options)
    assert (device.captures, device.replays) == (segments, 2 * segments)
    assert_same(runtime, tiny_runtime, "a blue whale", **{**options, "seed": 9, "guidance_scale": 6.0})
    assert (device.captures, device.replays) == (segments, 4 * segments), "no memory has moved since the first capture"
    assert_same(runtime, tiny_runtime, "a red fox", num_inference_steps=5)
    assert_same(runtime, tiny_runtime, "a red fox", **options)


def test_steps_of_an_interval_one_by_one(runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice) -> None:
    def halve(by: Any, index: int, timestep: float, tensors: dict[str, Any]) -> Any:
        return {"latents": tensors["latents"] * np.float32(0.5)} if index == 1 else None

    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_interval": (0.25, 0.75), "callback_on_step_end": halve}
    assert_same(runtime, tiny_runtime, "a red fox", **options)
    assert (device.captures, device.replays) == (4, 8)


def test_branches_of_an_interval_share_memory(bundle: Path) -> None:
    """Beside what a run with guidance in all steps holds: the context of the prompts alone, and small tables."""

    def held(**options: Any) -> int:
        device = HostDevice()
        with opened(bundle, device, HostTensorRT(device)) as runtime:
            runtime("a red fox", seed=1, **{**SMALL, "num_inference_steps": 5, **options})
            device.wait()
            return device.used

    layers, heads, dim, tokens = 3, 2, 64, 32
    context, mask, weights, perturbed, source = layers * 2 * heads * tokens * dim * 4, tokens * 4, 5 * 256, 4, 8
    more = held(guidance_interval=(0.2, 0.8)) - held()
    assert more == context + mask + weights + perturbed + source
    noise_pred = 32 * 3 * 5 * 4
    more_with_pag = held(pag_scale=2.0, pag_interval=(0, 0.4)) - held(pag_scale=2.0)
    assert more_with_pag == 5 * 256 + 2 * 4 + 2 * 8 < noise_pred


def test_only_tokens_noise_tables_and_pixels_cross(runtime: SanaRuntime, device: HostDevice) -> None:
    runtime("a red fox", seed=1, **SMALL)
    model = runtime.manifest.model
    up, down = device.uploaded, device.downloaded
    runtime("a red cat", seed=2, **SMALL)
    latents = 32 * 3 * 5 * 4
    assert device.downloaded - down == latents + 96 * 160 * 3
    tokens = runtime.text.tokenize("a red cat", max_sequence_length=300, instruction=runtime.manifest.model.instruction)
    assert len(tokens.ids) - tokens.shared < 32
    rows = (32 + 1) * model.text_channels * 4  # padded, and BOS's
    tables = 3 * 3 * 256
    resize = 2 * (96 + 160) * (8 + 4)
    noise = 2 * latents + 2048  # what sampling starts from, no x0 yet, and in a table no fresh noise
    masks = 2 * 32 * 4 + 2 * 4 + 2 * 8  # and what each branch continues
    assert device.uploaded - up == rows + tables + resize + noise + masks
    up = device.uploaded
    runtime("a red cat", seed=3, **SMALL)
    assert device.uploaded - up == rows + tables + resize + noise + masks - 32 * model.text_channels * 4, (
        "a known prompt stays on the device"
    )


def test_times_are_of_the_device(runtime: SanaRuntime) -> None:
    timings = runtime("fox", seed=1, **SMALL).timings
    assert timings.denoise == ()
    parts = (timings.text_encoder, timings.context, timings.denoise_loop, timings.vae_decoder)
    assert min(parts) > 0
    assert sum(parts) <= timings.total


def test_work_that_cannot_be_captured_is_enqueued(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    module.capturable = False
    assert_same(runtime, tiny_runtime, "fox")
    assert_same(runtime, tiny_runtime, "fox", seed=3)
    assert (device.captures, device.replays) == (0, 0)
    assert [record.message for record in caplog.records].count(
        "the steps cannot be captured as a CUDA graph, so they are enqueued one by one: an engine cannot be captured"
    ) == 1


def test_a_capture_that_fails_is_replaced_by_steps_without_a_graph(
    runtime: SanaRuntime, tiny_runtime: SanaRuntime, device: HostDevice, module: HostTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    """The image is drawn all the same, and one warning has the engine's own reason."""
    module.breaks_captures = True
    assert_same(runtime, tiny_runtime, "fox")
    assert_same(runtime, tiny_runtime, "fox", seed=3)
    assert (device.captures, device.replays) == (0, 0)
    (warning,) = [record.message for record in caplog.records if "cannot be captured" in record.message]
    assert "running the engine of denoiser failed" in warning
    assert "operation not permitted when stream is capturing" in warning
    module.breaks_captures = False
    assert_same(runtime, tiny_runtime, "fox", num_inference_steps=2)
    assert (device.captures, device.replays) == (1, 2)


def test_how_each_graph_is_run(bundle: Path) -> None:
    """Kernels of the loop exist before they are captured, and `backend_options` change only what is outside of it."""
    strategies, off = DynamicShapesKernelSpecializationStrategy, CudaGraphStrategy.DISABLED
    loop = dict.fromkeys(("denoiser", "sampler"), (strategies.EAGER, off))
    outside = ("text_encoder", "context", "vae_decoder", "postprocess")

    def settings(**options: Any) -> dict[str, Any]:
        device = HostDevice()
        module = HostTensorRT(device)
        opened(bundle, device, module, engine_options=options)("fox", seed=1, **SMALL)
        return {
            name: (config.dynamic_shapes_kernel_specialization_strategy, config.cuda_graph_strategy)
            for name, config in module.contexts
        }

    assert settings() == {
        **loop,
        **dict.fromkeys(outside, (strategies.LAZY, off)),
        "postprocess": (strategies.NONE, off),
    }
    changed = settings(dynamic_shapes_kernel_specialization_strategy="eager", cuda_graph_strategy="whole_graph_capture")
    assert changed == {**loop, **dict.fromkeys(outside, (strategies.EAGER, CudaGraphStrategy.WHOLE_GRAPH_CAPTURE))}


def test_contexts_that_capture_their_own_work_find_the_same_addresses(bundle: Path, tiny_runtime: SanaRuntime) -> None:
    device = HostDevice()
    module = HostTensorRT(device)
    runtime = opened(bundle, device, module, engine_options={"cuda_graph_strategy": "whole_graph_capture"})
    conditionings = []  # while they exist, other tensors have other addresses
    for seed in range(3):
        assert_same(runtime, tiny_runtime, "a red fox", seed=seed)
        conditionings.append(runtime.encode(runtime.plan(Request("a red fox", **SMALL))))
    assert sorted(module.own_captures) == ["context", "postprocess", "text_encoder", "vae_decoder"]
    assert device.captures == 1
    assert_same(runtime, tiny_runtime, "a red fox", width=96)
    assert sorted(module.own_captures) == ["context", *["postprocess"] * 2, "text_encoder", *["vae_decoder"] * 2]


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("tensorrt-rtx", {"cuda_graphs": True}, "unknown backend option of tensorrt-rtx"),
        ("tensorrt", {"cuda_graph_strategy": "disabled"}, "unknown backend option of tensorrt"),
        ("tensorrt-rtx", {"cuda_graph_strategy": True}, "the backend option cuda_graph_strategy is out of range"),
        ("tensorrt-rtx", {"dynamic_shapes_kernel_specialization_strategy": "EAGER"}, "strategy is out of range"),
        ("tensorrt", {"text_multiple": 0}, "the backend option text_multiple is out of range"),
        ("tensorrt", {"text_multiple": 1.5}, "the backend option text_multiple is out of range"),
    ],
)
def test_options_that_engines_do_not_have(backend: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        EngineOptions.parse(options, backend)
    assert caught.value.found
    assert caught.value.wanted


@pytest.mark.parametrize("multiple", [1, 32])
def test_prompts_of_similar_length_have_one_shape(bundle: Path, tiny_runtime: SanaRuntime, multiple: int) -> None:
    device = HostDevice()
    module = HostTensorRT(device)
    runtime = opened(bundle, device, module, engine_options={"text_multiple": multiple})
    prompts = ("fox", "a red fox", "a red fox by the lake")
    for prompt in prompts:
        assert_same(runtime, tiny_runtime, prompt)
    assert device.captures == (1 if multiple == 32 else len(prompts))
    shapes = {shapes for graph, shapes in module.shapes if graph == "text_encoder"}
    assert len(shapes) == (1 if multiple == 32 else len(prompts))


def test_compiled_kernels_are_saved_next_to_the_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE)

    def draw(device: HostDevice) -> None:
        with opened(copy, device, HostTensorRT(device)) as runtime:
            runtime("fox", seed=1, **SMALL)

    def caches() -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in copy.rglob("*.cache")}

    assert caches() == {}
    draw(HostDevice())
    written = caches()
    assert len(written) == 6
    names = {path.name for path in copy.rglob("*.cache")}
    assert "denoiser.host-gpu-1.cache" in names
    draw(HostDevice())
    assert caches() == written
    other = HostDevice()
    other.name = "Host GPU 2"
    draw(other)
    assert len(list(copy.rglob("*.cache"))) == 12
    path = next(copy.rglob("denoiser.host-gpu-1.cache"))
    path.write_text(path.read_text().replace("Host GPU 1", "Host GPU 9"))
    draw(HostDevice())
    assert path.read_text() == written[path.parent.name]


def test_threads_share_a_runtime(runtime: SanaRuntime) -> None:
    seeds = range(6)
    alone = [runtime("fox", seed=seed, output_type="latent", **SMALL).images for seed in seeds]
    found: dict[int, Any] = {}

    def draw(seed: int) -> None:
        found[seed] = runtime("fox", seed=seed, output_type="latent", **SMALL).images

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        np.testing.assert_array_equal(found[seed], alone[seed])


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_steps_go_on_in_other_threads_and_beside_another_device(bundle: Path, tiny_runtime: SanaRuntime, memory: str) -> None:
    device, other = HostDevice(), HostDevice()
    runtime = opened(bundle, device, HostTensorRT(device), memory=memory)
    request = Request("fox", seed=1, output_type="latent", **SMALL)
    plan = runtime.plan(request)
    steps = runtime.steps(plan, runtime.encode(plan))
    latents = []

    def advance() -> None:
        other.enter()
        latents.append(runtime.to_host(next(steps).latents))

    for _ in plan.schedule.timesteps:
        thread = threading.Thread(target=advance)
        thread.start()
        thread.join()
    wanted = tiny_runtime("fox", seed=1, output_type="latent", **SMALL).images
    np.testing.assert_allclose(latents[-1], wanted, atol=TOLERANCE)


def test_sprint_draws_fresh_noise_every_step(sprint_bundle: Path, sprint_runtime: SanaRuntime, tmp_path: Path) -> None:
    copy = shutil.copytree(sprint_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE)
    device = HostDevice()
    runtime = opened(copy, device, HostTensorRT(device))
    for steps in (2, 4):
        assert_same(runtime, sprint_runtime, "a red fox", num_inference_steps=steps, guidance_scale=4.5)
        assert_same(runtime, sprint_runtime, "a red fox", num_inference_steps=steps, guidance_scale=2.0, seed=9)
    assert device.captures == 2
