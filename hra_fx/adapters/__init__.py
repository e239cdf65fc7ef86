"""Several adapters on one model: adding, switching, merging, weakening, combining and taking them off."""
