"""Models, vocabulary and processor. The folder is flat because its files travel with checkpoints as remote code."""
