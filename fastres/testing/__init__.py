"""Test doubles that enforce the rules of what they replace. Product code does not import them."""
