"""What transformers adds to a forward: generation with a cache, hidden states, attentions."""

from __future__ import annotations

import pytest
import torch
from integrations.models.zoo import BERT, HUGGING, OPT, T5, Case, adapted, assert_same, folded_copy


@pytest.mark.parametrize("case", [OPT, T5], ids=lambda case: case.name)
def test_greedy_generation(case: Case) -> None:
    base, model = adapted(case)
    inputs = {"input_ids": case.inputs(2, 7)["input_ids"]}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    actual = model.generate(**inputs, **settings)
    expected = folded_copy(base, model).generate(**inputs, **settings)
    plain = base.generate(**inputs, **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same(actual.scores, expected.scores)
    assert not torch.allclose(actual.scores[0], plain.scores[0])
    # An untrained T5, whose embedding is its output layer, repeats the token that it was given.
    assert case is T5 or not torch.equal(actual.sequences, plain.sequences)


@pytest.mark.parametrize("case", HUGGING, ids=lambda case: case.name)
def test_hidden_states_and_attentions(case: Case) -> None:
    base, model = adapted(case)
    inputs = case.inputs(2, case.sizes[0]) | {"output_hidden_states": True, "output_attentions": True}
    outputs = []
    for each in (model, folded_copy(base, model)):
        each.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(each(**inputs))
    actual, expected = outputs
    assert list(actual) == list(expected)
    assert any("hidden_states" in key for key in actual)
    assert any("attentions" in key for key in actual)
    for key in expected:
        if not hasattr(expected[key], "get_seq_length"):  # a cache, which generation reads
            assert_same(actual[key], expected[key])


def test_a_call_with_labels_gives_the_loss() -> None:
    base, model = adapted(BERT)
    inputs = BERT.inputs(2, 7) | {"labels": torch.tensor([1, 3])}
    with torch.no_grad():
        assert_same(model(**inputs).loss, folded_copy(base, model)(**inputs).loss)
