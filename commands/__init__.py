"""The commands that make and judge a model, one module each; importing a module registers its command."""
