"""Programs that train, evaluate, measure and compare."""
