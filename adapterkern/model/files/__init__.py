"""What a saved adapter is on disk: our folder, its model card, AdapterHub's format."""
