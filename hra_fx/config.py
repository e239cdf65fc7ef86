"""`HRAConfig`: the configuration of an adapter, with the fields, defaults and file format of `peft.HRAConfig`.

Source: PEFT 0.21. In addition, every field is checked when the configuration is created.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hra_fx.atomic_write import atomic_write
from hra_fx.config_fields import check_field
from hra_fx.errors import ConfigError, HRAWarning
from hra_fx.hub import local_folder

CONFIG_NAME = "adapter_config.json"
#: Fields that PEFT's `HRAConfig` does not have -> values that are not written.
_NOT_IN_PEFT: dict[str, tuple[Any, ...]] = {"rank_pattern": ({},), "target_parameters": (None, []), "pairs": (True,)}


@dataclass(kw_only=True)
class HRAConfig:
    """Configuration of Householder reflection adaptation (https://huggingface.co/papers/2405.17484).

    Args:
        r: rank, the number of reflections per layer; a positive int.
        rank_pattern: layer name -> rank, for layers with a rank other than `r`, as in PEFT's LoRA. A name is a regular
            expression that matches a layer's full path, or the end of it after a dot; the first match wins. PEFT's
            HRA does not have this field and does not load adapters that use it; `save_as_lora` writes a LoRA for PEFT.
        apply_GS: make the vectors of a layer orthonormal (Gram-Schmidt) before they are used as reflections.
        target_modules: the layers to adapt. A collection of names matches a layer if its path equals a name or ends
            with "." + name. A str is a regular expression that must match the full path, or "all-linear" for every
            linear layer except the output layer. None selects the default for `model.config.model_type`.
        exclude_modules: layers to leave out, written like `target_modules`. It overrides `target_modules`.
        init_weights: if True, the adapter starts as the identity; if False, with random reflections.
        layers_to_transform: one or more block indices >= 0. Layers that match by suffix are adapted only in these
            blocks. An empty list means no restriction.
        layers_pattern: one or more regular expressions for the name of the module list that `layers_to_transform`
            indexes, such as "h".
        bias: which biases are trained: "none", "all", or "hra_only" for the biases of adapted layers.
        pairs: train the sums and differences of pairs of vectors (`hra_fx.functional.chain`), at the learning rates of
            LoRA; if False, train the vectors, as PEFT does. Adapters with an odd rank or with `apply_GS` always train
            their vectors. Files contain vectors in both cases. PEFT's HRAConfig does not have this field.
        modules_to_save: names of modules that are trained and saved in full. Layers inside them are not adapted.
        target_parameters: names of 3-D parameters (experts) to adapt, as in PEFT's LoraConfig. A parameter matches if
            its path equals a name or ends with "." + name. `exclude_modules` and `layers_to_transform` do not restrict
            them. With target_modules=None, only these parameters are adapted. PEFT's HRAConfig does not have this
            field.
        task_type: None or a PEFT task type, such as "SEQ_CLS".
        peft_type: always "HRA".
        auto_mapping, peft_version, base_model_name_or_path, revision, inference_mode: as in PEFT.

    Collections in `target_modules` and `exclude_modules` become sets, and other collections become lists.

    Raises:
        ConfigError: a field of the wrong type or value, or fields that exclude each other. It is a `ValueError`.
        TypeError: an unknown keyword.

    >>> config = HRAConfig(r=4, target_modules=["query", "value"])
    >>> sorted(config.target_modules), config.bias
    (['query', 'value'], 'none')
    >>> HRAConfig(r=8, rank_pattern={"layers.0.q_proj": 16, "v_proj": 4}).rank_of("model.layers.0.q_proj")
    16
    >>> HRAConfig(r=0)
    Traceback (most recent call last):
    hra_fx.errors.ConfigError: `r` must be a positive int, got 0.
    """

    task_type: str | None = None
    peft_type: str = "HRA"
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | os.PathLike[str] | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    apply_GS: bool = False
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    bias: str = "none"
    modules_to_save: Collection[str] | None = None
    target_parameters: Collection[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    pairs: bool = True

    def __post_init__(self) -> None:
        """Check each field and convert it to one form, then check the fields that depend on each other."""
        for name in _field_names():
            value = getattr(self, name)
            check_field(name, value)
            if isinstance(value, Mapping):
                setattr(self, name, dict(value))
            elif isinstance(value, Collection) and not isinstance(value, str):
                is_set = name in ("target_modules", "exclude_modules")
                # The order of a set differs between processes.
                setattr(self, name, set(value) if is_set else _plain(value) if isinstance(value, Set) else list(value))
        if self.base_model_name_or_path is not None:
            self.base_model_name_or_path = os.fspath(self.base_model_name_or_path)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                fix = "Put the indices into the regular expression, or pass `target_modules` as a list."
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str. {fix}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def rank_of(self, path: str) -> int:
        """The rank of the layer at `path`: that of the first entry of `rank_pattern` that matches, else `r`."""
        # A 3-D parameter also matches by its own name.
        paths = {path, re.sub(r"(^|\.)hra_([^.]+)$", r"\1\2", path)}
        for pattern, rank in self.rank_pattern.items():
            if any(re.match(rf"(.*\.)?({pattern})$", known) for known in paths):
                return rank
        return self.r

    def trains_pairs(self, path: str) -> bool:
        """Whether the layer at `path` trains pairs."""
        return self.pairs and not self.apply_GS and self.rank_of(path) % 2 == 0

    @property
    def is_prompt_learning(self) -> bool:
        """Not supported. PEFT's functions read this attribute first, and only accept PEFT's own configurations.

        Raises:
            AttributeError: always; the message says what to call instead.
        """
        raise AttributeError(
            "hra_fx.HRAConfig is not a peft.PeftConfig. Call the function of hra_fx with the same name, such as "
            "hra_fx.get_peft_model, or convert it: peft.HRAConfig.from_peft_type(**config.to_dict())."
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dict for JSON. Sets become sorted lists, and values are copied.

        Fields that PEFT does not have are omitted at their default value, because PEFT warns about them.

        >>> HRAConfig(target_modules={"b", "a"}).to_dict()["target_modules"]
        ['a', 'b']
        """
        values = {name: getattr(self, name) for name in _field_names()}
        for name, defaults in _NOT_IN_PEFT.items():
            if values[name] in defaults:
                del values[name]
        return {name: _plain(value) for name, value in values.items()}

    def to_json_string(self) -> str:
        """The text of `adapter_config.json`, in PEFT's style."""
        # Only the fields are sorted, because the order of the patterns in `rank_pattern` matters.
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` atomically into `save_directory`, which is created if it does not exist."""
        directory, text = Path(save_directory), self.to_json_string()
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / CONFIG_NAME, text.encode())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HRAConfig:
        """Create a configuration from a dict as returned by `to_dict`.

        Raises:
            ConfigError: a field has a wrong value, as in the constructor.

        Warns:
            HRAWarning: entries that have a value are ignored because they are not fields, as in PEFT.
        """
        known = {name: value for name, value in values.items() if name in _field_names()}
        unknown = [name for name, value in values.items() if name not in known and value]
        if unknown:
            text = f"the configuration has entries that are not fields of HRAConfig and are ignored: {sorted(unknown)}."
            warnings.warn(text, HRAWarning, stacklevel=2)
        return cls(**known)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> HRAConfig:
        """Read an `adapter_config.json` that hra_fx or PEFT wrote.

        Args:
            directory: a local folder; otherwise the name of a Hub repository.
            subfolder: path of the adapter in `directory`.
            hub: passed to `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir` and others.

        Raises:
            CheckpointError: the folder does not exist, and it cannot be downloaded.
            ConfigError: the file is missing, does not contain a JSON object, or has a wrong value. The message names
                the file.
            TypeError: an unknown keyword argument.
        """
        path = local_folder(directory, subfolder, [CONFIG_NAME], hub) / (subfolder or "") / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fix = f"Pass a folder that contains {CONFIG_NAME}, or the name of a Hub repository."
            raise ConfigError(f"{path}: cannot be read as JSON ({error}). {fix}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must contain a JSON object, got a {type(values).__name__}.")
        try:
            return cls.from_dict(values)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from error


def _field_names() -> list[str]:
    return [f.name for f in fields(HRAConfig)]


def _plain(value: Any) -> Any:
    """A copy of `value` in which tuples become lists and sets become sorted lists."""
    if isinstance(value, Set):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
