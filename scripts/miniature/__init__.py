"""The pretrained backbones of the miniature experiments."""
