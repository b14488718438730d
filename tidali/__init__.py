"""tidali: from a folder of labelled images to a trained, measured ResNet-18."""

__version__ = "0.1.0"
