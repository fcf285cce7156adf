import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest

from sana_export.contract import GRAPH_GROUPS, resolve
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.files import FileEntry, file_entry, hash_file
from sana_export.manifest import EngineEntry, GraphEntry, Manifest
from sana_export.profiles import PROFILES, Profile, custom_profile
from sana_export.trt import plan
from sana_export.trt.flavour import Target
from sana_export.trt.options import DEFAULT_OPTIONS, BuildOptions
from sana_export.trt.plan import EngineSpec, PlannedEngine, dynamic_axes, engine_spec, onnx_sha256, plan_engines, stale_fields
from tests.support.small_bundles import INSTRUCTION_TOKENS, model_info, write_bundle

TARGET = Target("tensorrt-rtx", "1.7", ("8.9",), "any")
RANGES = PROFILES["default"].ranges(model_info(), instruction_tokens=INSTRUCTION_TOKENS)


@pytest.fixture
def graph(bundle: Path) -> GraphEntry:
    return Manifest.load(bundle).graphs["vae_decoder"]


def key(graph: GraphEntry, target: Target = TARGET, options: BuildOptions = DEFAULT_OPTIONS, **ranges: Any) -> str:
    # The manifest says all that the key of an engine with weights needs: no file is read.
    return engine_spec(Path("nowhere"), graph, target, {**RANGES, **ranges}, options, export="").key


def changed(file: FileEntry, **changes: Any) -> FileEntry:
    return dataclasses.replace(file, **changes)


def test_the_key_changes_with_all_that_changes_the_engine(graph: GraphEntry) -> None:
    other_data = (changed(graph.data[0], sha256="1" * 64),)
    keys = [
        key(graph),
        key(dataclasses.replace(graph, onnx=changed(graph.onnx, sha256="2" * 64))),
        key(dataclasses.replace(graph, data=other_data)),
        key(dataclasses.replace(graph, spec=dataclasses.replace(graph.spec, name="vae_decoder_tail"))),
        key(graph, dataclasses.replace(TARGET, backend="tensorrt")),
        key(graph, dataclasses.replace(TARGET, version="1.8")),
        key(graph, dataclasses.replace(TARGET, compute_capabilities=())),
        key(graph, dataclasses.replace(TARGET, compute_capabilities=("8.9", "12.0"))),
        key(graph, dataclasses.replace(TARGET, operating_system="linux-x86_64")),
        key(graph, options=BuildOptions(tf32=True)),
        key(graph, batch=(1, 1, 3)),
        key(graph, batch=(1, 2, 4)),
        key(graph, latent_width=(2, 16, 32)),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(digest) == 64 for digest in keys)


def test_the_key_stays_with_all_that_does_not(graph: GraphEntry) -> None:
    first = key(graph)

    assert key(dataclasses.replace(graph, parameters=99, opset=21)) == first
    moved = dataclasses.replace(graph, onnx=changed(graph.onnx, path="elsewhere/model.onnx", bytes=1))
    assert key(moved) == first
    # The decoder has no text and no branches.
    assert key(graph, text_tokens=(1, 2, 3), branches=(1, 1, 1), tokens=(1, 1, 1), output_height=(1, 1, 1)) == first
    assert engine_spec(Path("nowhere"), graph, TARGET, RANGES, BuildOptions(), export="").ranges == {
        axis: RANGES[axis] for axis in ("batch", "latent_height", "latent_width")
    }


def test_axes_are_those_of_the_inputs_in_the_contracts_order(bundle: Path) -> None:
    graphs = Manifest.load(bundle).graphs
    assert dynamic_axes(graphs["sampler"].spec) == ("batch", "branches", "latent_height", "latent_width")


def test_a_graph_without_external_data_is_known_by_its_file_alone(graph: GraphEntry) -> None:
    assert onnx_sha256(dataclasses.replace(graph, data=())) == graph.onnx.sha256
    assert onnx_sha256(graph) not in (graph.onnx.sha256, graph.data[0].sha256)


def record(bundle: Path, planned: PlannedEngine, **changes: Any) -> EngineEntry:
    """Write a file for the planned engine and record its entry, with `changes`, in the manifest."""
    spec = planned.spec
    path = bundle / spec.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"engine of " + spec.graph.encode())
    entry = EngineEntry(
        **{field.name: getattr(spec, field.name) for field in dataclasses.fields(EngineSpec)},
        key=spec.key,
        file=FileEntry(spec.path, hash_file(path), path.stat().st_size),
        profile=planned.profile,
    )
    if changes:
        entry = dataclasses.replace(entry, key="f" * 64, **changes)
    Manifest.load(bundle).with_engine(entry).save(bundle)
    return entry


def planned(bundle: Path, target: Target = TARGET, profile: Profile = PROFILES["default"], **options: Any) -> dict:
    engines = plan_engines(bundle, Manifest.load(bundle), target, profile, instruction_tokens=INSTRUCTION_TOKENS, **options)
    return {engine.spec.graph: engine for engine in engines}


def test_an_empty_bundle_misses_every_engine_in_the_contracts_order(bundle: Path) -> None:
    engines = planned(bundle)

    assert list(engines) == ["sampler", "vae_decoder"]
    assert {engine.reason for engine in engines.values()} == {"missing"}
    path = engines["sampler"].spec.path
    assert path == f"engines/tensorrt-rtx/{engines['sampler'].spec.key[:12]}/sampler.engine"


def test_a_recorded_engine_exists(bundle: Path) -> None:
    record(bundle, planned(bundle)["sampler"])
    engines = planned(bundle)

    assert (engines["sampler"].reason, engines["vae_decoder"].reason) == ("exists", "missing")
    assert engines["sampler"].exists
    assert not engines["vae_decoder"].exists


def test_a_file_without_an_entry_is_not_trusted(bundle: Path) -> None:
    path = bundle / planned(bundle)["sampler"].spec.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine of a build that was killed")

    assert planned(bundle)["sampler"].reason == "missing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "is missing"), (b"short", "is damaged"), (b"engine of SAMPLER", "is damaged or was replaced")],
)
def test_a_damaged_engine_is_named(content: bytes | None, reason: str, bundle: Path) -> None:
    entry = record(bundle, planned(bundle)["sampler"])
    path = bundle / entry.file.path
    path.unlink() if content is None else path.write_bytes(content)

    assert planned(bundle)["sampler"].reason.startswith(f"damaged: {entry.file.path} {reason}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend_version": "1.6"}, "stale: backend_version was 1.6, is 1.7"),
        ({"operating_system": "windows-amd64"}, "stale: operating_system was windows-amd64, is any"),
        ({"options": {"tf32": True}}, "stale: tf32 was True, is False"),
        ({"options": {}}, "stale: tf32 was not set, is False"),
    ],
)
def test_a_stale_engine_names_the_field(changes: dict[str, Any], reason: str, bundle: Path) -> None:
    entry = record(bundle, planned(bundle)["sampler"], **changes)
    engine = planned(bundle)["sampler"]

    assert engine.reason == reason
    assert engine.superseded == (entry,)


def test_other_ranges_under_the_same_profile_are_stale(bundle: Path) -> None:
    before = planned(bundle)["sampler"]
    record(bundle, before, ranges={**before.spec.ranges, "batch": (1, 1, 2)})

    assert planned(bundle)["sampler"].reason == "stale: batch was min 1 opt 1 max 2, is min 1 opt 1 max 4"


def test_another_export_of_the_graph_is_stale(bundle: Path) -> None:
    entry = record(bundle, planned(bundle)["vae_decoder"])
    write_bundle(bundle, seed=1)
    engine = planned(bundle)["vae_decoder"]

    assert engine.reason.startswith(f"stale: onnx_sha256 was {entry.onnx_sha256[:12]}..., is ")
    assert engine.superseded == (entry,)
    assert planned(bundle)["sampler"].reason == "missing"


def test_engines_for_other_targets_and_profiles_live_side_by_side(bundle: Path) -> None:
    record(bundle, planned(bundle)["sampler"])
    portable = dataclasses.replace(TARGET, compute_capabilities=())

    assert planned(bundle, portable)["sampler"].reason == "missing"
    assert planned(bundle, dataclasses.replace(TARGET, backend="tensorrt"))["sampler"].reason == "missing"
    assert planned(bundle, profile=PROFILES["laptop"])["sampler"].reason == "missing"
    record(bundle, planned(bundle, portable)["sampler"])
    assert planned(bundle)["sampler"].exists
    assert planned(bundle, portable)["sampler"].exists


def test_a_bundle_without_pag_layers_is_built_for_two_branches(bundle: Path) -> None:
    assert planned(bundle)["sampler"].spec.ranges["branches"] == (1, 2, 3)
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, options=dataclasses.replace(manifest.options, pag_layers=())).save(bundle)

    assert planned(bundle)["sampler"].spec.ranges["branches"] == (1, 2, 2)


def test_graphs_are_chosen_by_name_and_an_unknown_one_lists_those_held(bundle: Path) -> None:
    assert list(planned(bundle, graphs=["vae_decoder"])) == ["vae_decoder"]
    with pytest.raises(UsageError, match="no graph named denoiser") as caught:
        planned(bundle, graphs=["sampler", "denoiser"])
    assert "sampler, vae_decoder" in str(caught.value)


def test_the_reason_survives_the_manifest_file(bundle: Path) -> None:
    """Ranges and capabilities come back from JSON as they went in, so storing an engine does not make it stale."""
    entry = record(bundle, planned(bundle)["sampler"])

    assert Manifest.load(bundle).engines == (entry,)
    assert stale_fields(Manifest.load(bundle).engines[0], planned(bundle)["sampler"].spec) == []


def test_the_key_of_an_engine_with_weights_has_no_part_for_those_without(graph: GraphEntry) -> None:
    spec = engine_spec(Path("nowhere"), graph, TARGET, RANGES, BuildOptions(), export="")
    assert spec.options == {"tf32": False}
    assert spec.onnx_sha256 == onnx_sha256(graph)


REFITTABLE = BuildOptions(refittable=True)


def test_a_refittable_engine_serves_other_weights_of_the_same_structure(bundle: Path) -> None:
    before = planned(bundle, options=REFITTABLE)["vae_decoder"]
    record(bundle, before)
    record(bundle, planned(bundle)["vae_decoder"])
    data = Manifest.load(bundle).graphs["vae_decoder"].data
    write_bundle(bundle, seed=1)

    assert Manifest.load(bundle).graphs["vae_decoder"].data != data
    assert planned(bundle, options=REFITTABLE)["vae_decoder"].exists
    assert planned(bundle)["vae_decoder"].reason.startswith("stale: onnx_sha256 was ")


def test_a_refittable_engine_of_another_structure_is_stale(bundle: Path) -> None:
    entry = record(bundle, planned(bundle, options=REFITTABLE)["vae_decoder"])
    path = bundle / "onnx" / "vae_decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].name = "another"
    path.write_bytes(model.SerializeToString())
    manifest = Manifest.load(bundle)
    changed_graph = dataclasses.replace(manifest.graphs["vae_decoder"], onnx=file_entry(bundle, path))
    dataclasses.replace(manifest, graphs={**manifest.graphs, "vae_decoder": changed_graph}).save(bundle)
    engine = planned(bundle, options=REFITTABLE)["vae_decoder"]

    assert engine.reason.startswith("stale: onnx_sha256 was ")
    assert engine.superseded == (entry,)


def test_engines_with_and_without_weights_live_side_by_side(bundle: Path) -> None:
    record(bundle, planned(bundle)["vae_decoder"])
    assert planned(bundle, options=REFITTABLE)["vae_decoder"].reason == "missing"
    entry = record(bundle, planned(bundle, options=REFITTABLE)["vae_decoder"])

    assert entry.refittable
    assert entry.options == {"tf32": False, "refittable": True}
    assert planned(bundle)["vae_decoder"].exists
    assert planned(bundle, options=REFITTABLE)["vae_decoder"].exists


def test_an_engine_that_was_built_with_other_settings_is_stale(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = record(bundle, planned(bundle)["sampler"])
    monkeypatch.setattr(plan, "FLAGS", (*plan.FLAGS, "ANOTHER"))
    engine = planned(bundle)["sampler"]
    assert engine.reason == "stale: it was built with the settings of an older version of sana-export"
    assert engine.superseded == (entry,)


@pytest.mark.parametrize(
    ("backend", "version", "refused"),
    [
        ("tensorrt", "11.3.0.99", True),
        ("tensorrt", "11.2.1.2", False),
        ("tensorrt", "11.4.0.106", False),
        ("tensorrt-rtx", "11.3", False),
    ],
)
def test_no_refittable_engine_is_built_by_a_version_that_may_lose_a_bias(
    bundle: Path, backend: str, version: str, refused: bool
) -> None:
    target = dataclasses.replace(TARGET, backend=backend, version=version)
    assert planned(bundle, target)["vae_decoder"].reason == "missing"  # with its weights inside
    assert planned(bundle, target, options=REFITTABLE, graphs=["sampler"])  # it has no weights
    with pytest.raises(DependencyError, match="may drop the bias") if refused else contextlib.nullcontext() as caught:
        planned(bundle, target, options=REFITTABLE)
    if refused:
        assert caught.value.found == f"tensorrt {version}"
        assert caught.value.fix == 'pip install "tensorrt>=11.4", or leave out --refittable'


def test_a_graph_without_weights_has_one_engine_for_both(bundle: Path) -> None:
    assert planned(bundle, options=REFITTABLE)["sampler"] == planned(bundle)["sampler"]


def test_the_key_of_a_refittable_engine_is_not_taken_from_a_damaged_file(bundle: Path) -> None:
    (bundle / "onnx" / "vae_decoder" / "model.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        planned(bundle, options=REFITTABLE)


DECODERS = ("vae_decoder", "vae_decoder_head", "vae_decoder_tail")
WHOLE, TILED = DECODERS[:1], DECODERS[1:]


@pytest.mark.parametrize(
    ("sample_size", "profile", "held", "wanted"),
    [
        (16, "default", DECODERS, WHOLE),
        (32, "default", DECODERS, WHOLE),
        (32, "datacenter", DECODERS, WHOLE),
        (32, (2048, 2048), DECODERS, WHOLE),
        (32, (4096, 2080), DECODERS, TILED),
        (64, "laptop", DECODERS, WHOLE),
        (64, "default", DECODERS, DECODERS),
        (128, "laptop", DECODERS, TILED),
        (128, (1024, 1024), DECODERS, WHOLE),
        (128, "static", DECODERS, TILED),
        (128, "static", WHOLE, WHOLE),
        (32, "static", TILED, TILED),
    ],
)
def test_only_the_decoders_that_a_profile_uses_are_built(
    sample_size: int, profile: Any, held: tuple[str, ...], wanted: tuple[str, ...], bundle: Path
) -> None:
    manifest = Manifest.load(bundle)
    model = model_info(sample_size)
    decoder = manifest.graphs["vae_decoder"]
    graphs = {name: dataclasses.replace(decoder, spec=dataclasses.replace(decoder.spec, name=name)) for name in held}
    dataclasses.replace(manifest, model=model, graphs={"sampler": manifest.graphs["sampler"], **graphs}).save(bundle)
    shapes = PROFILES[profile] if isinstance(profile, str) else custom_profile(model, height=profile[0], width=profile[1])

    assert tuple(planned(bundle, profile=shapes)) == ("sampler", *wanted)
    assert tuple(planned(bundle, profile=shapes, graphs=held)) == held


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((2048, 2048), ("vae_encoder",)), ((4096, 2080), ("vae_encoder_head", "vae_encoder_tail"))],
)
def test_only_the_encoders_that_a_profile_uses_are_built(size: tuple[int, int], wanted: tuple[str, ...], bundle: Path) -> None:
    """A group of graphs can be built by its name."""
    manifest = Manifest.load(bundle)
    model = dataclasses.replace(model_info(128), encoder_tile_halo=3, encoder_tile_scale=8)
    held = GRAPH_GROUPS["img2img"]
    graphs = {
        name: dataclasses.replace(
            manifest.graphs["sampler"], spec=resolve(name, {"latent_channels": 4, "encoder_feature_channels": 8}, "float32")
        )
        for name in held
    }
    dataclasses.replace(manifest, model=model, graphs={"sampler": manifest.graphs["sampler"], **graphs}).save(bundle)
    shapes = custom_profile(model, height=size[0], width=size[1])
    assert tuple(planned(bundle, profile=shapes)) == ("sampler", *wanted, "blend")
    every = planned(bundle, profile=shapes, graphs=["img2img"])
    assert tuple(every) == held
    head, tail = (every[name].spec.ranges for name in ("vae_encoder_head", "vae_encoder_tail"))
    assert head["window_image_width"] == (8 * (256 // 8 + 6), 8 * (1024 // 8 + 6), 8 * (1024 // 8 + 6))
    assert tail["encoded_height"] == (size[0] // 8,) * 3


def test_guidance_that_is_embedded_leaves_one_branch(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, guidance_embeds=True)).save(bundle)
    assert planned(bundle)["sampler"].spec.ranges["branches"] == (1, 1, 1)
