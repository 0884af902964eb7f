"""The only folder that imports ``llama_cpp``: handles with owners, and return codes turned into `engines.errors`.

Every handle has one owner at a time and is closed by it; a context is closed before its model. Names starting with
``n_`` are llama.cpp's own.
"""
