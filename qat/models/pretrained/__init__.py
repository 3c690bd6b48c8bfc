"""Published checkpoints as plain NNX models: a file's tensors, by name, become the variables of an abstract model.

    gguf_file.GGUFFile(path)    one .gguf file of llama.cpp
    folder.Folder(path)         a folder in Hugging Face's layout

Both have `.model(dtype)`, `.tokenizer()` and `.facts()`. `names` says which tensor is which variable, `fill` does it.
"""
