from __future__ import annotations

import os
from pathlib import Path

import pytest

from sana_export.bench.workload import Workload, built_in_workloads, load_workload, prompts_of
from sana_export.errors import UsageError

TEXT = """
height = 256
width = 128
num_inference_steps = 3
guidance_scale = 2
prompts = ["one", "二"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text, "utf-8")
    return path


def test_the_built_in_workloads() -> None:
    found = {name: load_workload(name) for name in built_in_workloads()}
    assert set(found) == {"cpu", "cpu-128", "smoke", "prompts", "laptop", "datacenter", "datacenter-batch4"}
    assert all(name == workload.name for name, workload in found.items())
    cpu, batch4 = found["cpu"], found["datacenter-batch4"]
    assert (cpu.height, cpu.width, cpu.num_inference_steps, cpu.guidance_scale) == (512, 512, 8, 4.5)
    assert (cpu.warmup, cpu.repeats, cpu.device) == (1, 5, "cpu")
    assert (batch4.height, batch4.num_inference_steps, batch4.images_per_prompt, batch4.device) == (1024, 20, 4, "cuda")


def test_a_workload_from_a_file(tmp_path: Path) -> None:
    workload = load_workload(write(tmp_path, TEXT + "threads = 3\nwarmup = 2\n"))
    assert workload == Workload("own", 256, 128, 3, 2, ("one", "二"), warmup=2, threads=3)
    assert workload.resolved_threads() == 3
    assert load_workload(write(tmp_path, TEXT)).resolved_threads() == len(os.sched_getaffinity(0))


def test_an_unknown_workload_suggests_similar_names() -> None:
    with pytest.raises(UsageError) as error:
        load_workload("datacentre")
    assert error.value.wanted == "datacenter, datacenter-batch4"
    assert error.value.fix == "--workload datacenter"


@pytest.mark.parametrize(
    ("line", "message", "found", "wanted"),
    [
        ("repeat = 3", "unknown key", "repeat", "repeats"),
        ("seed = 1.5", "seed in", "1.5", "a whole number"),
        ("warmup = true", "warmup in", "True", "a whole number"),
        ("warmup = 0", "warmup in", 0, "from 1 to 1000"),
        ("threads = 0", "threads in", 0, "from 1 to 1024"),
        ('device = "gpu"', "device in", "gpu", "cpu or cuda"),
        ("threads = ", "cannot be read", "Invalid value", "a TOML file"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str, found: object, wanted: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_workload(write(tmp_path, f"{TEXT}{line}\n"))
    assert str(found) in str(error.value.found)
    assert wanted in str(error.value.wanted)


@pytest.mark.parametrize(
    ("old", "new", "message", "found"),
    [
        ("height = 256", "height = 250", "height in", 250),
        ('["one", "二"]', "[]", "prompts in", "[]"),
        ('["one", "二"]', '["one", 2]', "prompts in", "['one', 2]"),
        ("guidance_scale = 2", "", "is incomplete", "no guidance_scale"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, old: str, new: str, message: str, found: object) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_workload(write(tmp_path, TEXT.replace(old, new)))
    assert error.value.found == found


def test_sets_of_prompts(tmp_path: Path) -> None:
    text = TEXT.replace('prompts = ["one", "二"]', 'prompt_sets = ["chinese", "short"]')
    workload = load_workload(write(tmp_path, text))
    assert workload.prompts == (*prompts_of(["chinese"], "test"), "a red apple")
    (long,) = prompts_of(["long"], "test")
    assert len(long.split()) > 80
    assert "\n" not in long
    assert any("\N{PANDA FACE}" in prompt for prompt in prompts_of(["emoji"], "test"))
    assert len(load_workload("prompts").prompts) == 5
    for bad in ('prompt_sets = ["shrt"]', "prompt_sets = []", "prompt_sets = 3"):
        with pytest.raises(UsageError, match="unknown set of prompts"):
            load_workload(write(tmp_path, TEXT.replace('prompts = ["one", "二"]', bad)))


def test_a_sweep_changes_what_it_names(tmp_path: Path) -> None:
    workload = load_workload(write(tmp_path, TEXT + "[[sweep]]\nheight = 512\n[[sweep]]\nimages_per_prompt = 4\nrepeats = 2\n"))
    higher, more = workload.points()
    assert (higher.height, higher.width, higher.images_per_prompt, higher.sweep) == (512, 128, 1, ())
    assert (more.height, more.images_per_prompt, more.repeats) == (256, 4, 2)
    assert workload.prompts == more.prompts


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("height = 250", "not a valid size"),
        ("guidance_scale = 2", "invalid entry"),
        ("height = true", "invalid entry"),
        ("repeats = 0", "out of range"),
    ],
)
def test_a_bad_point_is_named(tmp_path: Path, point: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_workload(write(tmp_path, f"{TEXT}[[sweep]]\n{point}\n"))
