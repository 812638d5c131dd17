"""Test doubles with the rules of the real thing. Product code does not import them."""
