"""The adapters of one layer: `<layer>.hra_u`, a `ParameterDict` that can be called.

The parameter `hra_u.<adapter>` contains pairs, `(d, r / 2, 2)` (`hra_fx.functional.chain`), or vectors as in PEFT,
`(d, r)`. Directions that an adapter does not change are in the buffer `hra_u.<adapter>_kept`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from hra_fx.compat import is_plain_eager
from hra_fx.errors import AdapterError
from hra_fx.functional import chain as chains, geodesic, householder
from hra_fx.functional.chain import chain_of, pairs_shape, to_pairs, without
from hra_fx.functional.factors import Changes, Factors, batched_factors
from hra_fx.functional.rotate import as_rows, rows_to_weight
from hra_fx.layers.accelerate_hooks import offloading_hook
from hra_fx.layers.adapter_states import check_orthonormal, prepare_load, why_refused
from hra_fx.layers.running import WITHOUT_FACTORS, Run, during, factors_for
from hra_fx.layers.sharding import distribute_like, full_tensor
from hra_fx.layers.target import KEPT, REFLECTION, SCALED, LayerKind, check_adapter_name, weight_name, weight_place

#: Where a module has a tensor: a dictionary of the module, and the name in it.
Place: TypeAlias = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of one layer.

    Attributes:
        r: number of trained vectors.
        apply_GS: whether Gram-Schmidt makes them orthonormal first.
        init_weights: start at the identity, if `householder.init_vectors` can; otherwise with random vectors.
        pairs: whether the parameter contains pairs of vectors.
    """

    r: int
    apply_GS: bool = False
    init_weights: bool = True
    pairs: bool = False


class HouseholderAdapters(nn.ParameterDict):
    """The adapters of one layer: adapter name -> what is trained. Calling it reflects the layer's input or its weight.

    Attributes:
        layer_path: name of the layer in its model, for messages.
        kind: the kind of layer.
        fan_in_fan_out: whether the weight is `(in, out)`.
        weight_name: the name of the weight in the layer.
        reflects_input: whether a call of the layer reflects its input; otherwise only the weight is rotated.
        replaces_input: whether a node of a graph reflects the input (`hra_fx.passes.reflection`).
        width: `d`.
        specs: adapter name -> `AdapterSpec`.
        active: names of the adapters in use, in the order of the product `W Q_a Q_b ...`.
        scales: adapter name -> its scale, if the scale is not 1.
        shares: adapter name -> the share of the inputs of `hra_fx.protect` that the kept directions hold.
        traced: the factors of the layer, while TorchDynamo or `torch.export` records its model.
        needs_parameter: whether code of the model that reads `layer.weight` needs the parameter, not `W Q`.
        is_read: whether the forward of the model has read the weight of a layer that is called.
        unmerged: the weight before a merge; `None` if no adapter is merged.
    """

    reflects_input: ClassVar[bool] = False
    replaces_input: ClassVar[bool] = False
    layer_path: str = "a layer"
    needs_parameter: bool = False
    is_read: bool = False
    unmerged: Tensor | None

    def __init__(self, width: int, kind: LayerKind = "linear", *, fan_in_fan_out: bool = False) -> None:
        """Create an empty container for vectors of length `width`."""
        super().__init__()
        self.kind = kind
        self.fan_in_fan_out = fan_in_fan_out
        self.weight_name = weight_name(kind)
        self.width = width
        self.specs: dict[str, AdapterSpec] = {}
        self.active: tuple[str, ...] = ()
        self.scales: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.traced: Any = None
        self.register_buffer("unmerged", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the container like any module, because `nn.ParameterDict` cannot be called."""
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(
        self,
        x: Tensor | None = None,
        run: Run | None = None,
        *,
        weight: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Compute `W Q` for the `weight` of the layer, its factors in `dtype`, or a node of a graph.

        In a graph, the result for the input `x` of the layer is its new input, or its argument `reflected`. `run` has
        the factors that were computed for all layers at the start of the graph.
        """
        if weight is not None:
            return self.rotate(weight)
        if dtype is not None:
            return self.factors(dtype)
        return during(run or WITHOUT_FACTORS, self.reflect, x)

    def rotate(self, weight: Tensor) -> Tensor:
        """Compute `W Q = W + (W R^T) F` for the weight `W` of the layer, in its dtype."""
        factors = self.factors(weight.dtype)
        if factors is None:
            return weight
        rows, down = factors
        # Experts compute it once in a forward, but for each expert in a checkpointed part that runs again.
        hidden = hidden_from_checkpoint() if self.kind == "experts" else nullcontext()
        with householder.without_autocast(weight), hidden:
            matrix = self.rows(weight)
            add = torch.baddbmm if matrix.dim() == 3 else torch.addmm
            rotated = add(matrix, matrix @ rows.mT, down)
            return rows_to_weight(rotated, weight, transposed=self.fan_in_fan_out)

    def factors(self, dtype: torch.dtype) -> Factors | None:
        """Compute the factors `R` and `F: (k, d)` of the active adapters in `dtype`; `None` for the identity."""
        parts = self.places()
        if not parts:
            return None
        tensors = [place[name] for _, held in parts for place, name in held]
        if any(tensor.is_meta for tensor in tensors):
            raise AdapterError(
                f"{self.layer_path}: the vectors of {', '.join(self.active)} are on the meta device, without data. "
                "Call hra_fx.reset_adapters, hra_fx.load_adapter or model.load_state_dict(..., assign=True) first."
            )
        if self.kind == "experts":
            tensors = [expert for tensor in tensors for expert in tensor.unbind()]
        # A checkpointed block uses the factors of a batch first, and computes its own when it runs again.
        with hidden_from_checkpoint():
            found = batched_factors(tensors, [form for form, _ in parts], dtype)
        if self.kind != "experts":
            return found[0]
        rows, down = zip(*found, strict=True)
        return torch.stack(rows), torch.stack(down)

    def reflect(self, x: Tensor) -> Any:
        """What a call in a graph returns for the input `x` of the layer (`reflects_input`)."""
        if isinstance(x, fx.Proxy):
            raise AdapterError(
                f"{self.layer_path}: torch.fx cannot trace the reflections of a graph again. Use `model.graph`, or "
                "a copy of it."
            )
        return self.second_argument(x, factors_for(self, x, self.factors))

    def second_argument(self, x: Tensor, factors: Factors | None) -> Any:
        """What a graph passes to the layer as its second argument; only for layers that reflect their input."""
        raise NotImplementedError

    def add(
        self, name: str, spec: AdapterSpec, dtype: torch.dtype, device: torch.device, *, on_meta: bool = False
    ) -> None:
        """Add an adapter with new vectors. The adapter is not active.

        The vectors have dtype `dtype`, but at least float32 (as with PEFT's `autocast_adapter_dtype=True`). With
        `on_meta`, or on the meta device, they are created without data and without random numbers.
        """
        dtype, on_meta = householder.working_dtype(dtype), on_meta or device.type == "meta"
        empty = torch.empty(self.vectors_shape(spec.r), dtype=dtype, device="meta")
        self.put(name, spec, empty if on_meta else self.initial(spec, dtype).to(device))

    def initial(self, spec: AdapterSpec, dtype: torch.dtype) -> Tensor:
        """Create new vectors `U: (d, r)` (`householder.init_vectors`), on the CPU."""
        return householder.init_vectors(
            self.width, spec.r, apply_GS=spec.apply_GS, init_weights=spec.init_weights, dtype=dtype
        )

    def vectors_shape(self, r: int) -> tuple[int, ...]:
        """The shape of the vectors of an adapter of rank `r`: `(d, r)`."""
        return self.width, r

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter of an adapter: that of its pairs, or of its vectors."""
        spec = self.specs[name]
        shape = self.vectors_shape(spec.r)
        return pairs_shape(shape) if spec.pairs else shape

    def put(self, name: str, spec: AdapterSpec, vectors: Tensor) -> None:
        """Add an adapter with given vectors `U: (d, r)`. The adapter is not active."""
        check_adapter_name(name, self)
        self[name] = nn.Parameter(to_pairs(vectors).to(vectors.dtype) if spec.pairs else vectors)
        self.specs[name] = spec

    def replace(self, name: str, vectors: Tensor, device: torch.device) -> None:
        """Set the vectors of an adapter. A parameter on the meta device is created on `device`."""
        own = self[name]
        new = to_pairs(vectors) if self.specs[name].pairs else vectors
        if own.is_meta:
            self[name] = nn.Parameter(new.to(device, own.dtype), requires_grad=own.requires_grad)
        else:
            own.copy_(distribute_like(new, own))

    def turn_into_pairs(self, name: str) -> None:
        """Convert the vectors of an adapter to pairs, in the same parameter."""
        own = self[name]
        own.grad, own.data = None, to_pairs(own.detach()).to(own.dtype)
        self.specs[name] = replace(self.specs[name], pairs=True)

    def remove(self, name: str) -> None:
        """Remove an adapter, if it exists."""
        if name not in self.specs:
            return
        del self[name], self.specs[name]
        self.scales.pop(name, None)
        self.shares.pop(name, None)
        for suffix in (KEPT, SCALED):
            self._buffers.pop(name + suffix, None)
        self.set_active(other for other in self.active if other != name)

    def set_active(self, names: Iterable[str]) -> None:
        """Set the adapters in use. Factors that were computed before are not used any more."""
        # nn.Module.__setattr__ would take longer than everything else that happens to a layer in a switch.
        vars(self)["active"] = (*names,)
        Changes.count += 1

    def set_trainable(self, name: str, wanted: bool) -> None:
        """Train or freeze the vectors of an adapter."""
        self._parameters[name].requires_grad_(wanted)  # type: ignore[union-attr]

    def scaled(self, name: str, alpha: float) -> Tensor:
        """Compute the chain of an adapter at scale `alpha`, in at least float32."""
        trained = full_tensor(self[name].detach())
        wide = trained.to(householder.working_dtype(trained.dtype))
        full = chain_of(self.form(name), wide, self.kept(name))
        return geodesic.fractional_rotation(full, alpha)

    def scale(self, name: str, alpha: float, chain: Tensor | None) -> None:
        """Set the scale of an adapter, with its chain from `scaled`; `None` restores full scale.

        The constant chain takes the place of the trained one, so the vectors do not get a gradient.
        """
        self.scales.pop(name, None)
        self._buffers.pop(name + SCALED, None)
        if chain is not None:
            self.scales[name] = alpha
            # Not in the state_dict, because it can be computed from the vectors and the scale.
            self.register_buffer(name + SCALED, chain, persistent=False)
        self.set_active(self.active)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast tensors, but do not round kept directions and scaled chains to 16 bits.

        Such directions would not be orthonormal, and a small rotation is a small difference of two vectors.
        """
        wide = {key: one for key, one in self._buffers.items() if key.endswith((KEPT, SCALED)) and one is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        Changes.count += 1
        for key, before in wide.items():
            moved: Any = self._buffers[key]
            if householder.working_dtype(moved.dtype) is not moved.dtype:
                self._buffers[key] = before.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load a state, also one with kept directions, or nothing of it."""
        refused = [why_refused(self, name, state_dict, prefix + name) for name in self.specs]
        if any(refused):
            rest[-1].extend(filter(None, refused))
            return
        for name in self.specs:
            prepare_load(self, name, state_dict, prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def kept(self, name: str) -> Tensor | None:
        """The directions that an adapter does not change: orthonormal or zero columns `V: (d, n)`, or `None`."""
        kept = self._buffers.get(name + KEPT)
        if kept is not None and is_plain_eager():
            check_orthonormal({f"{self.layer_path}.{REFLECTION}.{name}": kept})
        return kept

    @torch.no_grad()
    def keep(self, name: str, directions: Tensor | None, share: float | None = None) -> None:
        """Set the directions that an adapter does not change, and the share of inputs that they hold; `None` for none.

        Its chain does not have the parts of the vectors along the previous directions, so these parts become zero.
        """
        vectors, kept = self[name], self._buffers.get(name + KEPT)
        if kept is not None and not vectors.is_meta:
            flat = vectors.flatten(-2) if self.specs[name].pairs else vectors
            vectors.copy_(without(flat, distribute_like(kept, vectors)).view(vectors.shape))
        self._buffers.pop(name + KEPT, None)
        self.shares.pop(name, None)
        if directions is not None:
            dtype = householder.working_dtype(vectors.dtype)
            self.register_buffer(name + KEPT, directions.to(vectors.device, dtype))
        if share is not None:
            self.shares[name] = share
        self.set_active(self.active)

    def chain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The adapter at its current scale as plain reflections, `(d, k)`, computed in `dtype`."""
        scaled = self._buffers.get(name + SCALED)
        if scaled is not None:
            return scaled if dtype is None else scaled.to(dtype)
        trained = self[name] if dtype is None else self[name].to(dtype)
        return chain_of(self.form(name), trained, self.kept(name))

    def form(self, name: str) -> int:
        """How the chain of an adapter at full scale is computed (`hra_fx.functional.chain.vectors_of`)."""
        spec = self.specs[name]
        kept = chains.KEPT if name + KEPT in self._buffers else 0
        return kept + chains.PAIRS * spec.pairs + chains.GRAM_SCHMIDT * spec.apply_GS

    def joint_vectors(self, names: Iterable[str], dtype: torch.dtype | None = None) -> Tensor | None:
        """Several adapters as one chain, in order; its vectors have any length. `None` if they are all the identity."""
        chains = [self.chain(name, dtype) for name in names if self.scales.get(name) != 0]
        if not chains:
            return None
        return chains[0] if len(chains) == 1 else torch.cat(chains, dim=-1)

    def places(self) -> list[tuple[int, list[Place]]]:
        """The form of each part of the chain (`form`), and where its tensors are, without the identity."""
        found: list[tuple[int, list[Place]]] = []
        parameters: Any = self._parameters
        buffers: Any = self._buffers
        for name in self.active:
            if name in self.scales:
                if self.scales[name]:
                    found.append((0, [(buffers, name + SCALED)]))
                continue
            # A replica of DataParallel has attributes instead of parameters.
            held = parameters if name in parameters else self.__dict__
            self.check_parameter(name)
            kept = [(buffers, name + KEPT)] if self.kept(name) is not None else []
            found.append((self.form(name), [(held, name), *kept]))
        return found

    def check_parameter(self, name: str) -> None:
        """Raise an error if another tool computes the vectors of an adapter."""
        if name not in self._parameters and (f"{name}_orig" in self._parameters or "parametrizations" in self._modules):
            raise AdapterError(
                f"{self.layer_path}: the vectors of {name!r} are no longer a parameter, because pruning or a "
                "parametrization was applied to them. Undo that first (prune.remove, remove_parametrizations)."
            )

    def device_of(self, layer: nn.Module) -> torch.device:
        """The device on which the layer computes: the device of its base weight, which may be offloaded."""
        hook = offloading_hook(weight_place(layer)[0])
        return self.weight_of(layer).device if hook is None else torch.device(hook.execution_device)

    def weight_of(self, layer: nn.Module) -> nn.Parameter:
        """The base weight of the layer. Raises an `AdapterError` if another tool has replaced the parameter."""
        weight = layer._parameters.get(self.weight_name)
        if weight is not None:
            return weight
        owner, name = weight_place(layer)
        for held in (owner._parameters, owner._buffers, owner.__dict__):  # FSDP1 and DataParallel set a plain attribute
            if (found := held.get(name)) is not None:
                return found  # type: ignore[return-value]
        raise AdapterError(
            f"{self.layer_path}: its {name} is no longer a parameter, because weight_norm, pruning or similar "
            "was applied after hra_fx.transform. Undo that first (remove_weight_norm, prune.remove)."
        )

    def rows(self, weight: Tensor) -> Tensor:
        """Reshape the weight, or a tensor of its shape, to the matrix `(out, d)` of the layer or of each expert."""
        return as_rows(weight, transposed=self.fan_in_fan_out, batched=self.kind == "experts")


def hidden_from_checkpoint() -> AbstractContextManager[object]:
    """Hide what is saved from activation checkpointing, whose second run must not save more tensors than the first."""
    return saved_tensors_hooks(lambda saved: saved, lambda saved: saved) if is_plain_eager() else nullcontext()


def get_adapters(layer: nn.Module) -> HouseholderAdapters | None:
    """The adapters of a layer, or `None`."""
    # The children of a scripted module are not in a dict.
    if REFLECTION not in layer._modules:
        return None
    reflection = layer._modules[REFLECTION]
    return reflection if isinstance(reflection, HouseholderAdapters) else None
