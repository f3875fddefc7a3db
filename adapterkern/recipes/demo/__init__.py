"""The demo, and the texts and the model that things are shown on."""
