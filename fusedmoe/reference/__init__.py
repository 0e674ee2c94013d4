"""The operator in plain PyTorch (`operator.py`, read it first) and the layers as users write them (`layers/`)."""
