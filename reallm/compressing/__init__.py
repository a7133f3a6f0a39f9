"""The whole job in one call: `compress`."""
