"""A convolutional network: reflections on the convolutions of a ResNet, and its fx graph with all of them."""

from __future__ import annotations

import copy

import torch
from torchvision.models import resnet18

import hra_fx


def main() -> None:
    torch.manual_seed(0)
    base = resnet18(num_classes=10).eval()
    config = hra_fx.HRAConfig(r=8, target_modules=["conv1", "conv2"], modules_to_save=["fc"])
    model = hra_fx.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()

    x, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        print(f"step {step}  loss {loss.item():.3f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    graph = hra_fx.graphs(model)[""]  # "" is the whole model
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    print("reflections in the fx graph:", sum(target.endswith(".hra_u") for target in calls))
    with torch.no_grad():
        adapted = model(x)
        folded = model.merge_and_unload()
        print(f"folded, largest difference of a logit: {(folded(x) - adapted).abs().max().item():.1e}")
    print("the base model's keys:", list(folded.state_dict()) == list(base.state_dict()))


if __name__ == "__main__":
    main()
