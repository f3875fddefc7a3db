"""A saved adapter on disk: our folder (folder.py), its model card (card.py), AdapterHub's and PEFT's formats."""
