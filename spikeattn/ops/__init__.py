"""Pure functions of tensors: no modules, no hidden state."""
