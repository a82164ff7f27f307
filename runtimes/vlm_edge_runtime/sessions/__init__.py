"""Sessions: a loaded bundle and what can be asked of it, one class per kind of model. `load` makes them."""
