"""The interactive page. `rendering` draws all pictures; `script/` shows one of them, colors it, and has the panel."""
