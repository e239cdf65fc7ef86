"""The formats that an adapter is written in, one for each kind of runtime."""
