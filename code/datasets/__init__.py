"""MNIST, binarised MNIST and the digits that ship with the project, as batches held in memory."""
