"""The operator in plain PyTorch (`operator.py`), and the layers as users write them (`layers/`)."""
