"""Select the layers to adapt: PEFT's matching rules, default targets, and checks of the selected layers."""
