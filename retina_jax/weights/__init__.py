"""Weights from other systems, read without torch and without running code from the file.

`readers.read_weights` reads a file of any supported format into names and arrays (`pickles` reads pickles).
`torchvision` and `detectron` give the arrays this package's names, `named` downloads published files, and `importing` does
all of it from KIND:FILE and puts the arrays into a network's variables.
"""
