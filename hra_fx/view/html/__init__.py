"""The interactive page: one self-contained HTML file.

Python collects the data of a model (`data`) and draws its pictures (`pictures`). `script/` shows one picture at a time,
colors it, and has the panel and the search. Data of a model are never used as markup or code.
"""
