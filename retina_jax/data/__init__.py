"""Images and boxes: sources, the order they are visited in, preprocessing, and the input pipeline."""
