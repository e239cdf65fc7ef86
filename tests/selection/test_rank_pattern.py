"""`rank_pattern`: ranks of some layers, matched as PEFT's LoRA matches them; outputs against dense products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from model.many import adapted, assert_close, config, net, normal, oracle
from peft.utils.other import get_pattern_key
from transformers import MixtralConfig, MixtralForCausalLM

import hra_fx
from hra_fx.errors import ConfigError, HRAWarning, UnsupportedLayerError

WORDS = st.sampled_from(["q", "v", "k_proj", "q_proj", "layers", "0", "1", "10", "block"])
PATHS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(PATHS, st.sampled_from([r"layers\.\d", ".*proj", "q|v", r"^q", r"[01]\.q"]))


@given(st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4), PATHS)
def test_the_first_match_counts_as_in_lora(pattern: dict[str, int], path: str) -> None:
    wanted = pattern.get(get_pattern_key(list(pattern), path), 20)
    assert hra_fx.HRAConfig(r=20, rank_pattern=pattern).rank_of(path) == wanted


RANKS = {"first": 3, "second": 2, "head": 4}


def ranked(**fields: Any) -> hra_fx.HRAConfig:
    return config("first", "second", "head", **{"r": 4, "rank_pattern": {"first": 3, r"sec\w+d": 2}, **fields})


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"init_weights": False}], ids=str)
def test_ranks_start_outputs_and_a_fold(fields: dict[str, Any]) -> None:
    x = normal(5, 6)
    if fields.get("init_weights", True):
        assert_close(hra_fx.transform(net(), ranked(**fields))(x), net()(x))
    plain, model = adapted(net(), a=ranked(**fields))
    assert {row.path: row.r for row in hra_fx.report(model)} == RANKS
    vectors = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(u.shape) for u in vectors] == [(6, 3), (8, 2), (8, 4)]
    wanted = oracle(plain, model, ["a"], x)
    assert_close(model(x), wanted)
    assert_close(hra_fx.fold(model)(x), wanted)


def test_a_captured_program_and_a_graph_have_the_same_ranks() -> None:
    program = hra_fx.transform(torch.export.export(net(), (normal(5, 6),)), ranked())
    assert {row.path: row.r for row in hra_fx.report(program)} == RANKS
    graph = hra_fx.transform(net(), ranked(), trace=True)
    assert {row.path: row.r for row in hra_fx.report(graph)} == RANKS


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"q": 0}, "`rank_pattern['q']` must be a positive int, got 0."),
        ({"q": True}, "`rank_pattern['q']` must be a positive int, got True."),
        ([("q", 1)], "`rank_pattern` must be a dict of names and ranks, got [('q', 1)]."),
        ({"": 1}, "`rank_pattern` must be a dict of names and ranks, got {'': 1}."),
        ({"(": 1}, "`rank_pattern`: '(' is not a valid regular expression: missing ), unterminated subpattern"),
        ({"(?i)q": 1}, "`rank_pattern`: '(?i)q' is not a valid regular expression inside"),
    ],
)
def test_bad_patterns(pattern: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        hra_fx.HRAConfig(rank_pattern=pattern)
    assert str(error.value).startswith(message)


def test_a_pattern_without_layers_is_named() -> None:
    with pytest.warns(HRAWarning) as seen:
        hra_fx.transform(net(), ranked(rank_pattern={"first": 2, "frist": 3, "2": 1}))
    text = "rank_pattern: 'frist', '2' matches none of the adapted layers, which are first, second, head."
    assert [str(warning.message) for warning in seen] == [text]


def test_a_rank_that_gram_schmidt_cannot_have() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"first \(Linear\): with `apply_GS=True`, `r` must be .* got 7\."):
        hra_fx.transform(net(), ranked(apply_GS=True, rank_pattern={"first": 7}))


def test_the_order_is_kept_in_the_file_and_an_empty_pattern_is_not_written(tmp_path: Path) -> None:
    ordered = ranked(rank_pattern={"v": 1, "a": 2, "0.v": 3})
    ordered.save_pretrained(tmp_path)
    assert list(hra_fx.HRAConfig.from_pretrained(tmp_path).rank_pattern) == ["v", "a", "0.v"]
    assert "rank_pattern" not in json.loads(hra_fx.HRAConfig().to_json_string())
    with pytest.warns(UserWarning, match=r"\['rank_pattern'\]"):
        peft.HRAConfig.from_pretrained(str(tmp_path))


def test_the_rank_of_experts_goes_by_the_name_of_their_parameter() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    )
    names = ["experts.gate_up_proj", "experts.down_proj"]
    pattern = {"experts.down_proj": 2}
    hra_fx.transform(
        model, hra_fx.HRAConfig(r=4, rank_pattern=pattern, target_modules=["q_proj"], target_parameters=names)
    )
    vectors = {name: tuple(value.shape) for name, value in model.named_parameters() if ".hra_u." in name}
    assert [shape[-1] for name, shape in vectors.items() if "down_proj" in name] == [2]
    assert [shape[-1] for name, shape in vectors.items() if "down_proj" not in name] == [4, 4]
