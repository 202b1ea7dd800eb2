"""Updates as small codes: keys and values under a calibrated transform, one step and an entropy coder."""
