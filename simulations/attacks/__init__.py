"""Attacks on what travels, run against this library's own clients: what an undefended delta gives away."""
