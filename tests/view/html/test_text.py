"""The text of a page: small, the same for the same model, and nothing of the model outside of its data."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import torchvision
from pages import page_of, trained_net

import hra_fx
from hra_fx.model.state import adapted_layers
from hra_fx.view.html.rendering import as_json


def test_the_policy_names_the_script_and_the_style_and_nothing_else() -> None:
    text = page_of(trained_net())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    for part, tag in (("script-src", '<script type="module">'), ("style-src", "<style>")):
        body = text.partition(tag)[2].partition(f"</{tag[1:].split(' ')[0].rstrip('>')}>")[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{part} 'sha256-{digest}';" in policy[1]
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe" not in policy[1]


def test_data_is_json_in_ascii_without_markup() -> None:
    name = "</script>\u2028\ud800层"
    text = as_json({"name": name})
    assert text.isascii()
    assert "<" not in text
    assert json.loads(text) == {"name": name}


def test_the_page_names_no_address() -> None:
    text = page_of(trained_net())
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}, "the name of a language"
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttpRequest", text)


def test_resnet50_is_a_small_page() -> None:
    model = hra_fx.transform(
        torchvision.models.resnet50(), hra_fx.HRAConfig(r=8, target_modules=r".*(conv\d|downsample\.0)")
    )
    text = page_of(model)
    assert len(adapted_layers(model)) == 53
    assert len(text.encode()) < 250_000
