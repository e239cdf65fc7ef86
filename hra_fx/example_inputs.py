"""Example inputs (the arguments of one call of a model), and the state of random number generators around a call."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.compat import pytree
from hra_fx.errors import AdapterError

#: Positional and keyword arguments of one call.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def normalize_inputs(example_inputs: Any, what: str = "example_inputs") -> Call:
    """Return inputs (a tensor, a tuple or list, or a mapping) as positional and keyword arguments.

    `what` is their name in the error.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    found = type(example_inputs).__name__
    raise AdapterError(f"{what} must be a tensor, a tuple of positional or a dict of keyword arguments, got {found}.")


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter that is not on the meta device; the CPU if there is none."""
    return next((one.device for one in model.parameters() if not one.is_meta), torch.device("cpu"))


def example_call(model: nn.Module) -> Call | None:
    """Create random inputs for a transformers model from its configuration; `None` for other models.

    The inputs are two token sequences of length 8 with their mask, two images, or two audio recordings.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    make = _EXAMPLES.get(main) if isinstance(main, str) else None
    if config is None or make is None:
        return None
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        main_input = make(config)
    except AttributeError:  # the configuration has no sizes
        return None
    made: dict[str, Any] = {str(main): main_input.to(device, dtype if main_input.is_floating_point() else None)}
    accepted = inspect.signature(model.forward).parameters
    if main == "input_ids" and "attention_mask" in accepted:
        made["attention_mask"] = torch.ones_like(main_input, device=device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        made["decoder_input_ids"] = _tokens(config).to(device)
    return (), made


def guessed_call(model: nn.Module) -> Call | None:
    """Create the input of a model with one required argument, from its first layer; `None` if the model rejects it.

    The sizes of images are those of timm's `default_cfg`, and others that most models take.
    """
    required = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    layers = (part for part in model.modules() if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)))
    weight: Any = getattr(next(layers, None), "weight", None)
    if len(required) != 1 or not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    wanted = (getattr(model, "default_cfg", None) or {}).get("input_size", ())
    rows, width = weight.shape[:2]
    images = [(width, 64, 64), *([tuple(wanted)] if wanted else []), (width, 224, 224)]
    sizes: dict[int, list[tuple[int, ...]]] = {2: [(width,), (4, width)], 3: [(width, 64)], 4: images}
    with preserve_rng_state(), torch.no_grad():
        copied = copy.deepcopy(model).eval()
        for size in sizes.get(weight.dim(), ()):
            for x in (torch.randn(2, *size), torch.randint(0, rows, (2, 8))):
                x = x.to(weight.device, weight.dtype if x.is_floating_point() else None)
                with contextlib.suppress(Exception):
                    copied(x)
                    return (x,), {}
    return None


def _tokens(config: Any) -> Tensor:
    sizes = config.get_text_config() if hasattr(config, "get_text_config") else config
    return torch.randint(min(10, sizes.vocab_size - 1), sizes.vocab_size, (2, 8))  # the first ones are special tokens


def _images(config: Any) -> Tensor:
    of_images = getattr(config, "vision_config", config)
    size = getattr(of_images, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(2, getattr(of_images, "num_channels", 3), height, width)


#: The main input of a transformers model -> random values for it.
_EXAMPLES: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _tokens,
    "pixel_values": _images,
    "input_values": lambda _: torch.randn(2, 16000),
    "input_features": lambda config: torch.randn(
        2, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)
    ),
}


def clone_inputs(call: Call) -> Call:
    """Copy the tensors and other objects (a cache) of a call, because a forward may write into them.

    An object that is passed twice stays one: a forward may ask whether `query is key`. Tensors keep their layout.
    """
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    return copy.deepcopy(call, {id(value): copy.deepcopy(value.detach()) for value in tensors})


def separated_inputs(call: Call) -> Call:
    """Copy the inputs of a call, none of which is passed twice: torch.export would make one input of them."""
    leaves, spec = pytree.tree_flatten(call)
    separated: Call = pytree.tree_unflatten([clone_inputs(leaf) for leaf in leaves], spec)
    return separated


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the random number generators of torch, Python and numpy after the block."""
    numpy = sys.modules.get("numpy")  # if it is not loaded, no forward uses it
    states = random.getstate(), numpy.random.get_state() if numpy else None
    kind, devices = _initialized_devices()
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


def seed_everything(seed: int) -> None:
    """Seed torch, Python and numpy."""
    # `torch.manual_seed` would also set the seed of devices that are initialized later.
    seed_torch = torch.manual_seed if _initialized_devices()[1] else torch.default_generator.manual_seed
    seed_torch(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def _initialized_devices() -> tuple[str, range]:
    """Type and indices of all GPUs if this process has initialized them (this takes seconds); otherwise none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None  # 2.6 raises
    if accelerator is None:
        return "cpu", range(0)
    module: Any = torch.get_device_module(accelerator)
    is_initialized = not hasattr(module, "is_initialized") or module.is_initialized()  # MPS always is
    return accelerator.type, range(module.device_count() if is_initialized else 0)
