"""Weights from elsewhere, without torch and without running code from a file.

`readers.read_weights` turns a file into names and arrays, whatever its format; `filling.fill` puts arrays that already
carry this project's names into a network's variables. Between the two stand the converters, one for each foreign system.

`unpickling` reads pickles as data: it knows containers, and `numpy_pickles` and `torch_files` add arrays and tensors.
`safetensors` reads that format. Each of these raises ValueError with the reason; `readers` adds the file's name.
"""
