"""Where models come from and which weight matrices they have."""
