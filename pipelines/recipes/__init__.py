"""Recipes: settings of whole runs, by name."""
