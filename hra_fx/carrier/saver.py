"""The carrier of a model that can save itself: it saves its adapters, in PEFT's format, and loses none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from hra_fx.carrier.swap import Carrier, original_class
from hra_fx.checkpoint.keys import adapter_entries
from hra_fx.checkpoint.saving import save_adapters
from hra_fx.errors import AdapterError


class SaverCarrier(Carrier):
    """A model of transformers or diffusers with adapters: `save_pretrained` writes those, as it does with PEFT's.

    The base class would write base weights and vectors into one file, and drop the vectors when it is loaded.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        selected_adapters: Iterable[str] | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **kwargs: object,
    ) -> None:
        """Write adapters: "default" into the folder, others into subfolders of their names; no base weights.

        `from_pretrained` of transformers, with PEFT installed, loads base model and adapter from such a folder; so does
        `hra_fx.load_adapter` over the base model. To write a whole model, fold it first.

        Args:
            save_directory: the folder.
            is_main_process: only the main process writes.
            state_dict: the model's, where a wrapper has gathered it.
            selected_adapters: names; `None` for all.
            safe_serialization: must be true, for a pickle is never written.
            push_to_hub: must be false; call `model.push_to_hub(...)`.
            kwargs: what the base class knows besides (`max_shard_size`, `variant`), which has no meaning here.

        Raises:
            AdapterError: `safe_serialization=False` or `push_to_hub=True`, or there is no such adapter.
            CheckpointError: the adapter cannot be written.
        """
        if not safe_serialization:
            raise AdapterError("safe_serialization=False: a pickle is never written. Leave it True.")
        if push_to_hub:
            raise AdapterError("push_to_hub=True: save first, then call model.push_to_hub(...).")
        if is_main_process:
            save_adapters(self, save_directory, selected_adapters, state_dict)

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What `save_pretrained` does not write; transformers' Trainer misses these keys knowingly when it resumes."""
        return set(self.state_dict()) - set(adapter_entries(self))


def can_save(model: nn.Module) -> bool:
    """Whether the class of a model knows `save_pretrained`."""
    return callable(getattr(original_class(model), "save_pretrained", None))
