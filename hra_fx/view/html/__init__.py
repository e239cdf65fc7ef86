"""The interactive page: one self-contained HTML file.

Python collects the data of a model (`data`) and draws its pictures (`rendering`). `script/` shows one picture at a
time, colors it, and contains the panel and the search. Data of a model is never used as markup or code.
"""
