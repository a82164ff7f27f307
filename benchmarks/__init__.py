"""Measurements of what is built here, and the small trained models they are measured on."""
