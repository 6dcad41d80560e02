"""The four-stage DLCM and the dense baseline, in plain PyTorch."""
