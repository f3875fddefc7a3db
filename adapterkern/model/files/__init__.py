"""A saved adapter on disk: our folder (folder.py), its model card (card.py), AdapterHub's format (adapterhub.py)."""
