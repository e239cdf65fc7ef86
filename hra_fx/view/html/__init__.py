"""The interactive page: one self-contained HTML file.

Python packs what is known of a model (`data`, `items`, `packing`) and works out the order of boxes; `script/` measures
text, places boxes as they are opened, and draws. Nothing that comes from a model is ever markup or code.
"""
