"""Results that the documentation quotes, each with the script that makes them."""
