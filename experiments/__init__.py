"""Command-line programs that train, evaluate, measure and compare classifiers."""
