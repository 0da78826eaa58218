"""Pure: Arrow columns of tensors to numpy arrays and back, without Python objects per element.

``kinds``: what a column's type holds; ``reading``: a column to ``rows``, the tensors of its rows, which are checked and
stacked there; ``writing``: stacked results to a column. Buffer views of 20,000 x 384 floats take 0.2 ms where
``to_pylist`` takes 580 ms.
"""
