"""Which layers to adapt: the matching rules of PEFT, and which layers can be adapted."""
