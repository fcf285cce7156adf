"""Everything that an export does not support is found when a checkpoint is opened, and reported as one list."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from transformers import Gemma2Config

from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.errors import ArtifactError
from sana_export.supported import SCHEDULERS, SUPPORTED
from tests.support.checkpoint_edits import LEFT_OUT, edit_config, edit_json, linked_copy


@pytest.fixture
def folder(tiny_checkpoint: Any, tmp_path: Path) -> Path:
    return linked_copy(tiny_checkpoint.folder, tmp_path / "checkpoint")


def refusal(folder: Path) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.exit_code == 4
    assert None not in (caught.value.found, caught.value.wanted)
    return caught.value


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("transformer", "norm_elementwise_affine", True, "False"),
        ("transformer", "norm_eps", "1e-6", "a positive number"),
        ("transformer", "interpolation_scale", -1.0, "a positive number or null"),
        ("transformer", "sample_size", 16.5, "a whole number"),
        ("transformer", "guidance_embeds_scale", None, "a number"),
        ("vae", "decoder_act_fns", "gelu", "silu"),
        ("vae", "decoder_act_fns", ["silu"] * 5 + ["gelu"], "silu"),
        ("vae", "decoder_in_shortcut", "yes", "True or False"),
        ("vae", "scaling_factor", 0, "a positive number"),
        ("vae", "scaling_factor", float("nan"), "a positive number"),
        ("text_encoder", "hidden_activation", "silu", "gelu_pytorch_tanh"),
        ("text_encoder", "sliding_window", 64, "at least 2048"),
        ("text_encoder", "model_type", "gemma", "gemma2"),
        ("text_encoder", "attn_logit_softcapping", 0.0, "a positive number or null"),
        ("text_encoder", "use_bidirectional_attention", True, "False or None"),
        ("text_encoder", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "without scaling"),
        ("scheduler", "use_flow_sigmas", False, "True"),
        ("scheduler", "prediction_type", "epsilon", "'flow_prediction'"),
        ("scheduler", "solver_order", 4, "1 or 2 or 3"),
        ("scheduler", "final_sigmas_type", "one", "'zero' or 'sigma_min'"),
        ("scheduler", "use_lu_lambdas", True, "False"),
        ("scheduler", "thresholding", True, "False"),
        ("scheduler", "use_karras_sigmas", True, "False"),
        ("scheduler", "flow_shift", -3.0, "a positive number"),
    ],
)
def test_an_unsupported_setting_is_named(folder: Path, part: str, key: str, value: object, wanted: str) -> None:
    edit_config(folder, part, **{key: value})
    error = refusal(folder)
    config = "scheduler/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    assert error.message == f"{config} has an unsupported {key}"
    assert error.found == repr(json.loads(json.dumps(value))) or part == "text_encoder"
    assert wanted in str(error.wanted)
    assert error.fix is not None


def test_old_spellings_of_rotary_scaling_are_refused(folder: Path) -> None:
    edit_config(folder, "text_encoder", rope_parameters=LEFT_OUT, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert refusal(folder).message == "text_encoder/config.json has an unsupported rope_parameters"


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("transformer", "caption_channels", 128, "64 (hidden_size of the text encoder)"),
        ("transformer", "out_channels", 64, "32 (in_channels)"),
        ("transformer", "cross_attention_dim", 64, "128 (num_attention_heads * attention_head_dim)"),
        ("transformer", "guidance_embeds", True, "False, because model_index.json names SanaPipeline"),
        ("vae", "latent_channels", 16, "32 (in_channels of the transformer)"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(folder: Path, part: str, key: str, value: object, words: str) -> None:
    edit_config(folder, part, **{key: value})
    error = refusal(folder)
    assert f"{part}/config.json has an unsupported {key}" in str(error)
    assert words in str(error)


def test_a_quantized_part_needs_the_weights_from_before(folder: Path) -> None:
    edit_config(folder, "transformer", quantization_config={"quant_method": "bitsandbytes"})
    error = refusal(folder)
    assert error.message == "transformer/config.json has an unsupported quantization_config"
    assert (error.found, error.fix) == ("bitsandbytes", "use the weights before they were quantized")


def test_a_missing_config_says_what_to_do(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    assert refusal(folder).fix == "download the checkpoint again"


def test_a_key_that_is_left_out_says_so(folder: Path) -> None:
    edit_config(folder, "scheduler", use_flow_sigmas=LEFT_OUT)
    assert refusal(folder).found == "False (the default of DPMSolverMultistepScheduler: the key is missing)"


def test_all_problems_are_one_list(folder: Path) -> None:
    edit_config(folder, "transformer", patch_size=2)
    edit_config(folder, "scheduler", use_flow_sigmas=False, prediction_type="epsilon")
    edit_config(folder, "index", vae=["diffusers", "AutoencoderKL"])
    edit_config(folder, "text_encoder", head_dim="wide")
    next((folder / "text_encoder").glob("*.safetensors")).unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "vae" / "config.json").write_text("[]")
    error = refusal(folder)
    lines = str(error.found).splitlines()
    assert [line.split(".")[0].strip() for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    assert error.message == f"{folder} cannot be exported, for {len(lines)} reasons"
    wanted = (
        *("AutoencoderKL", "text_encoder/config.json is refused by Gemma2Model", "patch_size: found 2, wanted 1"),
        *("use_flow_sigmas: found False, wanted True", "prediction_type: found 'epsilon'"),
        *("text_encoder of", "tokenizer of"),
    )
    for words in wanted:
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert "None" not in str(error.fix)
    assert "--vae dc-ae-lite" in str(error.fix)
    numbers = [line.strip().removeprefix("for ").split(":")[0] for line in str(error.fix).splitlines()]
    assert sorted(", ".join(numbers).split(", "), key=int) == [str(number) for number in range(1, len(lines) + 1)]


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"num_layers": -1, "num_attention_heads": "many"}, "TypeError"),
        ("transformer", {"num_layers": 10**9}, "num_layers = 1000000000"),
        ("transformer", {"caption_channels": 10**12}, "caption_channels = 1000000000000"),
        ("vae", {"decoder_block_out_channels": [128]}, "decoder_block_out_channels"),
        ("vae", {"decoder_block_types": "AttnBlock"}, "AttnBlock"),
        ("text_encoder", {"num_key_value_heads": None}, "is refused by Gemma2Model"),
        ("scheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "Only one of"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps = 1000000000000"),
    ],
)
def test_a_config_that_its_class_refuses_is_the_users(folder: Path, part: str, changes: dict[str, Any], words: str) -> None:
    edit_config(folder, part, **changes)
    assert words in str(refusal(folder))


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "EulerDiscreteScheduler"])
def test_an_unsupported_scheduler_is_refused_with_the_command_that_replaces_it(folder: Path, name: str) -> None:
    edit_config(folder, "index", scheduler=["diffusers", name])
    edit_config(folder, "scheduler", flow_shift=4.0)
    error = refusal(folder)
    assert error.found == f"model_index.json names {name}"
    assert error.wanted == " or ".join(name for name in SCHEDULERS if name != "SCMScheduler")
    assert "diffusers.DPMSolverMultistepScheduler(flow_shift=4.0, use_flow_sigmas=True" in str(error.fix)


def test_the_command_of_a_checkpoint_in_the_current_folder_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, "index", scheduler=["diffusers", "DEISMultistepScheduler"])
    for current, name in ((folder, "."), (folder / "vae", "..")):
        monkeypatch.chdir(current)
        with pytest.raises(ArtifactError) as caught:
            open_checkpoint(name)
        assert f'pipeline.save_pretrained("{folder.name}-fixed")' in str(caught.value.fix)


@pytest.mark.parametrize("entry", [None, [None, None], ["diffusers"], "AutoencoderDC", ["my_code", "AutoencoderDC"], 3, {}])
def test_an_entry_of_the_index_that_names_no_class(folder: Path, entry: object) -> None:
    edit_config(folder, "index", vae=entry)
    error = refusal(folder)
    assert "vae" in error.message
    assert error.wanted == "AutoencoderDC"


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [("SanaPipeline", "SCMScheduler"), ("SanaSprintPipeline", "DPMSolverMultistepScheduler")]
)
def test_the_scheduler_fits_the_pipeline(folder: Path, pipeline: str, scheduler: str) -> None:
    edit_config(folder, "index", _class_name=pipeline, scheduler=["diffusers", scheduler])
    text = str(refusal(folder))
    assert f"model_index.json names {scheduler}" in text
    assert f"pipeline.scheduler = diffusers.{'SCM' if pipeline == 'SanaSprintPipeline' else 'DPMSolverMultistep'}Scheduler(" in text


def test_every_rule_is_for_a_key_of_its_class() -> None:
    for name, rules in SUPPORTED.items():
        if name == "Gemma2Model":
            keys = set(Gemma2Config().to_dict())
        else:
            keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters)
        assert rules.keys() <= keys


@pytest.mark.parametrize("name", ["NoTokenizer", "Gemma2Model"])
def test_a_tokenizer_that_transformers_does_not_load(folder: Path, name: str) -> None:
    edit_config(folder, "index", tokenizer=["transformers", name])
    assert "tokenizer" in refusal(folder).message


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert refusal(folder).message == f"the tokenizer of {folder} cannot be loaded"


@pytest.mark.parametrize(("key", "value"), [("model_max_length", "300"), ("padding_side", None)])
def test_a_damaged_config_of_the_tokenizer(folder: Path, key: str, value: object) -> None:
    edit_json(folder / "tokenizer" / "tokenizer_config.json", **{key: value})
    assert refusal(folder).message == f"the tokenizer of {folder} cannot be loaded"


def test_a_tokenizer_with_more_tokens_than_embeddings(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {f"extra{number}": size + number for number in range(5)}
    path.write_text(json.dumps(content))
    error = refusal(folder)
    assert "more tokens than the text encoder has embeddings" in error.message
    assert error.found == f"{size + 5} tokens"
    assert str(size) in str(error.wanted)


def test_a_tokenizer_without_the_first_token(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"].pop("the", None)
    edit_config(folder, "index", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    path.write_text(json.dumps({**content, "post_processor": None}))
    assert "encodes the instruction differently" in refusal(folder).message
