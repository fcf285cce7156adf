"""API keys from files and the environment, content filters by name, previews' steps."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from PIL import Image

from sana_export.errors import UsageError
from sana_export.serve.config import ModelConfig, QueueConfig, ServeConfig
from sana_export.serve.errors import Refusal
from sana_export.serve.filters import ContentFilters, ContentRefused
from sana_export.serve.keys import VARIABLE, read_keys
from sana_export.serve.previews import preview_steps
from sana_export.serve.queue import FairQueue, Ticket
from sana_export.serve.run import check_config

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice:{ALICE}\n\n  # bob:is-commented-out-here\nbob:{BOB}#1\n")
    assert read_keys(file, {VARIABLE: "x:" + "y" * 20}) == {"alice": ALICE, "bob": f"{BOB}#1"}


def test_keys_of_the_environment() -> None:
    assert read_keys(environment={VARIABLE: f"alice:{ALICE},bob:{BOB}"}) == {"alice": ALICE, "bob": BOB}
    assert read_keys(environment={}) == {}


@pytest.mark.parametrize(
    "text",
    [
        *("", "short:abc", f"a:{ALICE}\na:{BOB}", f"a b:{ALICE}", f":{ALICE}", "a:" + "ä" * 20, "a:" + "x" * 600),
        *(BOB, f"a:{ALICE}:{BOB}", f"a:{ALICE} # ours"),
    ],
)
def test_bad_keys_are_named_and_never_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_keys(file)
    assert str(file) in str(caught.value)
    assert not any(key in str(caught.value) for key in (ALICE, BOB, "abc", "xxxx", "ää"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_configuration_does_not_show_its_keys() -> None:
    config = ServeConfig((ModelConfig("x", "y"),), keys={"alice": ALICE})
    assert ALICE not in repr(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_other_addresses_than_loopback_need_keys() -> None:
    model = ModelConfig("x", "my bundle")
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        with pytest.raises(UsageError, match="may only listen on loopback") as caught:
            check_config(ServeConfig((model,), host))
        new_key, _, start = (caught.value.fix or "").partition("; ")
        assert new_key == 'echo "me:$(openssl rand -hex 24)" > api-keys'  # the key can be read afterwards
        assert start == f"sana-export serve 'my bundle' --host {host} --api-keys api-keys"
        check_config(ServeConfig((model,), host, keys={"alice": ALICE}))
        check_config(ServeConfig((model,), host, allow_without_keys=True))
    for host in ("localhost", "127.0.0.1", "::1"):
        check_config(ServeConfig((model,), host))


def test_the_queue_has_room_for_one_request_and_the_other_keys() -> None:
    keys, model = {"alice": ALICE, "bob": BOB, "carol": "c" * 20}, ModelConfig("x", "bundle")
    with pytest.raises(UsageError, match="no room for one request") as caught:
        check_config(ServeConfig((model,), keys=keys, queue=QueueConfig(places=11)))
    assert caught.value.fix == "--queue 12"
    config = ServeConfig((model,), keys=keys, queue=QueueConfig(places=12))
    check_config(config)
    FairQueue[int](config.queue.places, config.keys).put([Ticket("bob", None, index) for index in range(10)])
    with pytest.raises(Refusal):
        FairQueue[int](11, config.keys).put([Ticket("bob", None, index) for index in range(10)])


class NoDogs:
    def check_prompt(self, prompt: str, negative_prompt: str) -> None:
        if "dog" in prompt:
            raise ContentRefused(f"not {prompt}")


no_dogs, nothing = NoDogs(), object()


def make_no_dogs() -> NoDogs:
    return NoDogs()


@pytest.mark.parametrize("name", ["NoDogs", "no_dogs", "make_no_dogs"])
def test_filters_are_objects_classes_or_functions_that_make_one(name: str) -> None:
    filters = ContentFilters.load([f"{__name__}:{name}"])
    filters.check_prompt("a cat")
    with pytest.raises(Refusal) as caught:
        filters.check_prompt("a dog")
    assert (caught.value.code, str(caught.value)) == ("content_policy_violation", "not a dog")


def test_the_example_refuses_words_and_empty_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "serve"))
    monkeypatch.setenv("BLOCKED_WORDS", "Dragon, orc")
    filters = ContentFilters.load(["blocked_words:BlockedWords"])
    filters.check_prompt("dragonfly", "dragon")
    filters.check_image(Image.linear_gradient("L"), "x")
    for check, values in ((filters.check_prompt, ("a DRAGON!", "")), (filters.check_image, (Image.new("RGB", (8, 8), "red"), "x"))):
        with pytest.raises(Refusal) as caught:
            check(*values)  # type: ignore[operator]
        assert caught.value.code == "content_policy_violation"


@pytest.mark.parametrize(("name", "text"), [("nothing", "checks nothing"), ("missing", "cannot be imported")])
def test_what_is_no_filter(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ContentFilters.load([f"{__name__}:{name}"])
    with pytest.raises(UsageError, match="cannot be imported"):
        ContentFilters.load(["no_such_module:x"])


def test_a_refusal_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(Refusal("queue_full", "full", param="n", retry_after=3, headers={"A": "b"})))
    assert (again.code, str(again), again.param, again.retry_after, again.headers) == ("queue_full", "full", "n", 3, {"A": "b"})


@pytest.mark.parametrize(
    ("steps", "count", "after"), [(20, 0, ()), (20, 1, (9,)), (20, 3, (4, 9, 14)), (2, 1, (0,)), (2, 3, (0,)), (1, 3, ())]
)
def test_previews_are_spread_over_the_steps_but_the_last(steps: int, count: int, after: tuple[int, ...]) -> None:
    assert preview_steps(steps, count) == after
