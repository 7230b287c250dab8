"""Callbacks for trainers of other packages. Each file imports its package, so import the one you need."""
