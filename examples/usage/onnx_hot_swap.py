"""Load one ONNX graph in onnxruntime, and switch between two adapters that are inputs of the graph."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnxruntime
import torch
from transformers import BertConfig, BertForSequenceClassification

import hra_fx

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DYNAMIC = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}


def bert_with_two_adapters() -> BertForSequenceClassification:
    """A small random BERT with random adapters instead of trained ones."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.2, **SIZES)
    model = BertForSequenceClassification(config).eval()
    hra_fx.transform(model, hra_fx.HRAConfig(r=8, target_modules=["query", "value"], pairs=False), "room")
    hra_fx.add_adapter(model, "polite", hra_fx.HRAConfig(r=8, target_modules=["query", "value"]))
    hra_fx.add_adapter(model, "terse", hra_fx.HRAConfig(r=3, target_modules=["query"], apply_GS=True))
    with torch.no_grad():
        for name, vectors in model.named_parameters():
            if name.endswith(("hra_u.polite", "hra_u.terse")):
                vectors.normal_()
    return model


def export(model: BertForSequenceClassification, path: Path) -> onnxruntime.InferenceSession:
    """Export a graph with eight reflections per query and value; without inputs for them it is the base model."""
    hra_fx.set_adapter(model, "room")
    ids = torch.randint(0, 64, (2, 7))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)  # raised by torch itself
        program = torch.onnx.export(
            model, (ids,), dynamo=True, optimize=False, dynamic_shapes={"input_ids": DYNAMIC}, verbose=False
        )
    hra_fx.make_swappable(program, model).save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns about weights that are inputs, which is intended here
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def save_adapter_file(factors: dict, path: Path) -> None:
    """Write the adapter as a file of onnxruntime, for a machine without torch: a few kilobytes."""
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in factors.items()})
    file.export_adapter(str(path))


def main() -> None:
    model = bert_with_two_adapters()
    ids = torch.randint(0, 64, (3, 11))  # a batch size and length not used for export
    with tempfile.TemporaryDirectory() as folder:
        session = export(model, Path(folder, "model.onnx"))
        inputs = session.get_overridable_initializers()
        print(f"the graph: {len(inputs)} inputs such as {inputs[0].name} {inputs[0].shape}")
        (alone,) = session.run(None, {"input_ids": ids.numpy()})
        for name in ("polite", "terse", "polite", "room"):
            factors = hra_fx.adapter_inputs(model, inputs, name)
            (logits,) = session.run(None, {"input_ids": ids.numpy(), **factors})
            hra_fx.set_adapter(model, name)
            with torch.no_grad():
                error = abs(logits - model(ids).logits.numpy()).max()
            print(
                f"{name}: changes a logit by up to {abs(logits - alone).max():.3f}, differs from PyTorch by {error:.1e}"
            )

        file = Path(folder, "polite.onnx_adapter")
        save_adapter_file(hra_fx.adapter_inputs(model, inputs, "polite"), file)
        options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
        (logits,) = session.run(None, {"input_ids": ids.numpy()}, options)
        hra_fx.set_adapter(model, "polite")
        with torch.no_grad():
            error = abs(logits - model(ids).logits.numpy()).max()
        print(f"polite, from a file of {file.stat().st_size // 1024} kB: differs from PyTorch by {error:.1e}")


if __name__ == "__main__":
    main()
