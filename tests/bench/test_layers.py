"""The account of an engine's layers: FLOP and bytes of known layers, and all FLOP of a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sana_export.bench.work.count import Rates
from sana_export.bench.work.layers import Account, make_account
from sana_export.bench.work.onnx import onnx_work
from sana_export.cli.main import main
from sana_export.manifest import Manifest
from sana_export.trt.layers import EngineLayer, LayerTensor


def tensor(name: str, *shape: int, dtype: str = "Half") -> LayerTensor:
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return LayerTensor(name, shape, strides, dtype, "Linear")


#: A kernel that prepares the product, the product with its addition, and a cast.
PREPARED = EngineLayer("__myl_MoveReplConc_myl0_1", "kgen", (tensor("x", 7, 4),), (), (tensor("p", 8, 4),), ("product",))
PRODUCT = EngineLayer(
    "__myl_FcAdd_myl0_2", "runtime_fusion", (tensor("p", 8, 4),), (tensor("w", 4, 2),), (tensor("y", 8, 2),), ("product",)
)
WIDENED = EngineLayer("__myl_CastTran_myl12_3", "kgen", (tensor("y", 8, 2),), (), (tensor("z", 8, 2, dtype="Float"),), ("cast",))
NORM = EngineLayer("__myl_CastMean_myl12_4", "kgen", (tensor("z", 8, 2, dtype="Float"),), (), (tensor("m", 8),), ())
#: 2 FLOP and 4 bytes per second, so that times are easy to compute.
SLOW = {"slow": Rates(2.0, 4.0, "fp16", "made up")}


@pytest.fixture
def account(tmp_path: Path) -> Account:
    ends = [
        helper.make_tensor_value_info(*value)
        for value in (("x", TensorProto.FLOAT16, ["n", 4]), ("z", TensorProto.FLOAT, ["n", 2]))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Cast", ["y"], ["z"], name="cast", to=TensorProto.FLOAT),
    ]
    weights = [numpy_helper.from_array(np.ones((4, 2), np.float16), "w")]
    graph = helper.make_graph(nodes, "made", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "made.onnx")
    layers = [PREPARED, PRODUCT, WIDENED, NORM, NORM]
    return make_account("made", "static", tmp_path / "made.onnx", {"n": 7}, layers, [PRODUCT, WIDENED])


def test_each_product_belongs_to_one_layer(account: Account) -> None:
    assert [cost.flop for cost in account.costs] == [0, 2 * 7 * 4 * 2, 0, 0, 0]
    assert [cost.role for cost in account.costs] == ["copy", "product", "copy", "other", "other"]
    assert account.in_profile == {"product": 1, "copy": 1, "all": 2}


def test_bytes_are_those_of_the_tensors(account: Account) -> None:
    product, copies = account.by_role()["product"], account.by_role()["copy"]
    assert (product.read, product.weights, product.written, product.wide) == (2 * 8 * 4, 2 * 4 * 2, 2 * 8 * 2, 0)
    assert (copies.count, copies.read, copies.written, copies.wide) == (2, 2 * 7 * 4 + 2 * 8 * 2, 2 * 8 * 4 + 4 * 8 * 2, 4 * 8 * 2)
    assert account.by_role()["all"].bytes == sum(cost.bytes for cost in account.costs)


def test_equal_layers_are_one_row(account: Account) -> None:
    assert [(cost.count, cost.operations) for cost in account.grouped()][-1] == (2, "Cast Mean")
    text = account.as_text(SLOW)
    assert "| 2 | other | Cast Mean |" in text
    assert "| product | 1 | 1 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 56000.00 |" in text


def test_a_layer_takes_the_longer_of_its_two_times(account: Account) -> None:
    """The product has 112 FLOP and 112 bytes, so at 2 FLOP and 4 bytes per second its FLOP take longer."""
    assert account.milliseconds(SLOW["slow"]) == pytest.approx(
        {"product": 1e3 * 112 / 2, "copy": 1e3 * (120 + 96) / 4, "other": 1e3 * 2 * 80 / 4, "all": 1e3 * (56 + 54 + 40)}
    )


def test_an_engine_of_a_bundle_has_all_flop(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(tiny_bundle), "--backend", "tensorrt-rtx", "--profile", "static", "--graphs", "denoiser,vae_decoder"]
    assert main([*words, "--layers", "--json"]) == 0
    accounts = json.loads(capsys.readouterr().out)["accounts"]
    manifest = Manifest.load(tiny_bundle)
    assert [account["graph"] for account in accounts] == ["denoiser", "vae_decoder"]
    for account in accounts:
        file = tiny_bundle / manifest.graphs[account["graph"]].onnx.path
        assert account["totals"]["all"]["flop"] == onnx_work(file, account["sizes"]).flop > 0
        assert account["totals"]["all"]["count"] == len(account["layers"]) > account["totals"]["product"]["count"] > 0
    assert not Manifest.load(tiny_bundle).engines
