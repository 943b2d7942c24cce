"""Recipes: what to train with a C that was not spent yet. `recipe.recipe` says what one is and makes it."""
