"""Some quick models of the zoo.

`make zoo` checks all models.
"""

from __future__ import annotations

import pytest
from zoo.checks import check
from zoo.models import entries
from zoo.result import CHECKS

ENTRIES = entries()
#: Quick ones of each library: convolutions, attention, readers of weights (beit, swin), tied weights (gpt2).
QUICK = (
    *("torchvision/swin_t", "timm/vit_tiny_patch16_224", "timm/beit_base_patch16_224", "timm/test_nfnet"),
    "transformers/gpt2",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_model_of_the_zoo(name: str) -> None:
    result = check(ENTRIES[name])
    assert not result.failures
    assert list(result.checks) == list(CHECKS)
    assert result.matched
