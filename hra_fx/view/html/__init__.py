"""The interactive page: one self-contained HTML file.

Python collects the data of a model (`data`) and computes the order of boxes. `script/` measures text,
places boxes when they are opened, and draws. Data of a model are never used as markup or code.
"""
