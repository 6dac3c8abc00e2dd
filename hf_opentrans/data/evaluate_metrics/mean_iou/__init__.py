"""Mean IoU for `evaluate`."""
