"""The network, its weights in and out of files, export, and prediction."""
