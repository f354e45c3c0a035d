"""Transform coding, one file a stage: pure functions on tensors, no files, no model library, no choice of device."""
