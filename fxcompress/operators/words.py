"""Names of the operators with a weight that forms rewrite, known without torch."""

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")

TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
