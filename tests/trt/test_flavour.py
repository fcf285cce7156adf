import sys
from pathlib import Path

import pytest
import tensorrt_rtx

from sana_export.environment import operating_system
from sana_export.errors import DependencyError, UsageError
from sana_export.trt import flavour
from sana_export.trt.flavour import FLAVOURS, Target, flavour_of, load, network_flags, offered_capabilities, target_for


def test_load_gives_the_module_of_the_backend() -> None:
    assert load("tensorrt-rtx") is tensorrt_rtx


def test_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)

    with pytest.raises(DependencyError) as caught:
        load("tensorrt")

    assert caught.value.exit_code == 3
    assert caught.value.fix == 'pip install "tensorrt>=10.13"'
    assert "own package index" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise RuntimeError('install it from the index of NVIDIA')", "RuntimeError: install it from the index of NVIDIA"),
        ("import ctypes; ctypes.CDLL('libnvinfer-not-there.so.10')", "OSError"),
        ("", "without its builder"),
    ],
)
def test_package_that_does_not_load_is_a_missing_dependency(
    source: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    with pytest.raises(DependencyError) as caught:
        load("tensorrt")

    assert found in str(caught.value)
    assert 'pip install "tensorrt>=10.13"' in str(caught.value)
    sys.modules.pop("tensorrt", None)


def test_unknown_backend_lists_those_that_build_engines() -> None:
    with pytest.raises(UsageError, match="tensorrt-rtx or tensorrt"):
        load("onnxruntime")


def test_offered_capabilities_are_the_modules_own_enum() -> None:
    offered = offered_capabilities(tensorrt_rtx)

    assert offered["8.9"] == tensorrt_rtx.ComputeCapability.SM89
    assert offered["12.0"] == tensorrt_rtx.ComputeCapability.SM120
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(offered)
    assert not {"NONE", "CURRENT"} & set(offered)


def test_rtx_target_is_portable_across_gpus_and_systems_unless_told() -> None:
    version = tensorrt_rtx.__version__

    assert target_for("tensorrt-rtx", tensorrt_rtx) == Target("tensorrt-rtx", version, (), "any")
    chosen = target_for("tensorrt-rtx", tensorrt_rtx, ("12.0", "8.9", "12.0"))
    assert chosen.compute_capabilities == ("8.9", "12.0")


@pytest.mark.parametrize("name", ["9.0", "8.10", "ada", "89", ""])
def test_unknown_compute_capability_lists_what_the_module_offers(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        target_for("tensorrt-rtx", tensorrt_rtx, ("8.9", name))
    assert "7.5, 8.0, 8.6, 8.9, 12.0" in str(caught.value)
    assert caught.value.exit_code == 2


def test_tensorrt_builds_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "gpu_compute_capability", lambda: "9.0")

    target = target_for("tensorrt", tensorrt_rtx)

    assert (target.compute_capabilities, target.operating_system) == (("9.0",), operating_system())
    assert target_for("tensorrt", tensorrt_rtx, ("9.0",)) == target
    with pytest.raises(UsageError, match=r"8\.9"):
        target_for("tensorrt", tensorrt_rtx, ("8.9",))


def test_tensorrt_without_a_gpu_says_so_and_names_the_backend_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "gpu_compute_capability", lambda: None)

    with pytest.raises(DependencyError, match="--backend tensorrt-rtx"):
        target_for("tensorrt", tensorrt_rtx)


def test_rows_differ_in_what_binds_an_engine() -> None:
    rtx, datacenter = flavour_of("tensorrt-rtx"), flavour_of("tensorrt")

    assert (rtx.ahead_of_time, rtx.bound_to_system, rtx.timing_cache) == (True, False, False)
    assert (datacenter.ahead_of_time, datacenter.bound_to_system, datacenter.timing_cache) == (False, True, True)
    assert all(name == row.backend for name, row in FLAVOURS.items())


def test_strongly_typed_is_asked_for_where_the_version_has_the_flag() -> None:
    class WithFlag:
        class NetworkDefinitionCreationFlag:
            STRONGLY_TYPED = 1

    assert network_flags(WithFlag) == 2
    assert network_flags(object()) == 0
